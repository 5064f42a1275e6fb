# torch's headers and its one library, found through the interpreter that builds: EFFOPS_TORCH_DIR,
# else the torch that it can import, else the one in its purelib (an isolated build sees only that).
find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
set(EFFOPS_TORCH_DIR "" CACHE PATH "directory of the torch package")
set(find_torch [=[
import importlib.util, os, sysconfig
spec = importlib.util.find_spec("torch")
base = os.path.dirname(spec.origin) if spec and spec.origin else ""
for scheme in ("purelib", "platlib"):
    if not base:
        for prefix in {os.environ.get("VIRTUAL_ENV"), sysconfig.get_config_var("base"), sysconfig.get_config_var("installed_base")} - {None, ""}:
            candidate = os.path.join(sysconfig.get_path(scheme, vars={"base": prefix, "platbase": prefix}), "torch")
            if os.path.exists(os.path.join(candidate, "lib", "libtorch_cpu.so")):
                base = candidate
print(base, end="")
]=])
if(NOT EFFOPS_TORCH_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${find_torch}" OUTPUT_VARIABLE EFFOPS_TORCH_FOUND)
  set(EFFOPS_TORCH_DIR "${EFFOPS_TORCH_FOUND}" CACHE PATH "" FORCE)
endif()
if(NOT EXISTS "${EFFOPS_TORCH_DIR}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "effops needs torch >= 2.11 to build: install it first, or set EFFOPS_TORCH_DIR to the directory of the torch package")
endif()
file(READ "${EFFOPS_TORCH_DIR}/version.py" torch_version)
string(REGEX MATCH "__version__ = '([^']+)'" _ "${torch_version}")
set(EFFOPS_TORCH_VERSION "${CMAKE_MATCH_1}")
if(EFFOPS_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "effops needs torch >= 2.11, found ${EFFOPS_TORCH_VERSION} in ${EFFOPS_TORCH_DIR}")
endif()
message(STATUS "torch ${EFFOPS_TORCH_VERSION} in ${EFFOPS_TORCH_DIR}")

# The ABI of 2.11 is asked for, so that one library serves every torch from there on.
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${EFFOPS_TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000 TORCH_STABLE_ONLY)
target_link_libraries(torch_stable INTERFACE "${EFFOPS_TORCH_DIR}/lib/libtorch_cpu.so")
