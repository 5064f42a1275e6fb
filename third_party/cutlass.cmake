# CUTLASS, for the grouped product on sm_90a: off unless asked for. Headers: $CUTLASS_INCLUDE, else those of the package
# cutlass_library (pip install --no-deps nvidia-cutlass==4.2.0.0) of the interpreter.
option(EFFOPS_CUTLASS "build the grouped product of CUTLASS for sm_90a (needs EFFOPS_CUDA)" OFF)
if(NOT EFFOPS_CUTLASS)
  return()
endif()
if(NOT EFFOPS_BUILD_CUDA)
  message(FATAL_ERROR "EFFOPS_CUTLASS=ON needs the CUDA kernels (EFFOPS_CUDA=on)")
endif()

find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
  OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_path(EFFOPS_CUTLASS_INCLUDE cutlass/version.h HINTS ENV CUTLASS_INCLUDE PATHS ${package}/source/include
          NO_DEFAULT_PATH)
if(NOT EFFOPS_CUTLASS_INCLUDE)
  message(FATAL_ERROR "EFFOPS_CUTLASS=ON needs cutlass/version.h in the folder $CUTLASS_INCLUDE or in the package cutlass_library of "
          "${Python_EXECUTABLE} (pip install --no-deps nvidia-cutlass==4.2.0.0)")
endif()
message(STATUS "CUTLASS: ${EFFOPS_CUTLASS_INCLUDE}")

# Assertions would serialise wgmma.
add_library(effops_cutlass OBJECT cuda/moe/hopper_grouped.cu)
set_target_properties(effops_cutlass PROPERTIES CUDA_STANDARD 20)
target_include_directories(effops_cutlass PRIVATE cuda)
target_include_directories(effops_cutlass SYSTEM PRIVATE ${EFFOPS_CUTLASS_INCLUDE})
target_compile_definitions(effops_cutlass PRIVATE EFFOPS_CUTLASS NDEBUG)
target_compile_options(effops_cutlass PRIVATE --expt-relaxed-constexpr "SHELL:-gencode arch=compute_90a,code=sm_90a")
target_compile_definitions(effops_cuda PRIVATE EFFOPS_CUTLASS)
