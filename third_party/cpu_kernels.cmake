# One relocatable object an instruction set, in which only the kernel table is global: the linker
# can then not merge an inline function of one instruction set into another's code.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(all_isas portable avx2 avx512 avx512bf16)
else()
  set(all_isas portable)
endif()
set(EFFOPS_ISAS "${all_isas}" CACHE STRING "instruction sets to build, slowest first; portable is always one")
set(EFFOPS_BUILT_ISAS "")
foreach(isa ${all_isas})
  if(isa STREQUAL "portable" OR isa IN_LIST EFFOPS_ISAS)
    list(APPEND EFFOPS_BUILT_ISAS ${isa})
  endif()
endforeach()
foreach(isa ${EFFOPS_ISAS})
  if(NOT isa IN_LIST all_isas)
    message(FATAL_ERROR "EFFOPS_ISAS: expected some of ${all_isas} on ${CMAKE_SYSTEM_PROCESSOR}, got ${isa}")
  endif()
endforeach()
# Isas and kernel tables are listed to C++ by the one macro of this header.
list(TRANSFORM EFFOPS_BUILT_ISAS REPLACE "(.+)" "X(\\1)" OUTPUT_VARIABLE calls)
list(JOIN calls " " calls)
file(CONFIGURE OUTPUT generated/built_isas.h CONTENT "#pragma once\n#define EFFOPS_BUILT_ISAS(X) ${calls}\n")
include_directories(${CMAKE_CURRENT_BINARY_DIR}/generated)

set(EFFOPS_FLAGS_portable "")
set(EFFOPS_FLAGS_avx2 -mavx2 -mfma -mf16c -DEFFOPS_ISA_AVX2)
set(EFFOPS_FLAGS_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -DEFFOPS_ISA_AVX512)
set(EFFOPS_FLAGS_avx512bf16 ${EFFOPS_FLAGS_avx512} -mavx512vnni -mavx512bf16)

set(EFFOPS_CPU_OBJECTS "")
foreach(isa ${EFFOPS_BUILT_ISAS})
  add_library(effops_cpu_${isa} OBJECT csrc/cpu/kernels.cpp csrc/cpu/attention/kernels.cpp csrc/cpu/gemv/kernels.cpp
              csrc/cpu/moe/kernels.cpp csrc/cpu/selection/kernels.cpp)
  target_compile_definitions(effops_cpu_${isa} PRIVATE EFFOPS_ISA=${isa})
  # GNU's unique symbols would stay global through objcopy; an inline variable that is read from memory is one.
  target_compile_options(effops_cpu_${isa} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fno-gnu-unique>)
  # GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a mistake of ours.
  target_compile_options(effops_cpu_${isa} PRIVATE ${EFFOPS_FLAGS_${isa}} -Wno-uninitialized -Wno-maybe-uninitialized)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/effops_cpu_${isa}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${CMAKE_LINKER} -r --force-group-allocation -o ${object} $<TARGET_OBJECTS:effops_cpu_${isa}>
    COMMAND ${CMAKE_OBJCOPY} --keep-global-symbol=effops_cpu_${isa} ${object}
    DEPENDS effops_cpu_${isa} $<TARGET_OBJECTS:effops_cpu_${isa}>
    COMMAND_EXPAND_LISTS VERBATIM)
  list(APPEND EFFOPS_CPU_OBJECTS ${object})
endforeach()
