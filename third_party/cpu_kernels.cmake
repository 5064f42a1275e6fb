# One relocatable object an instruction set, in which only the kernel table is global: the linker
# can then not merge an inline function of one instruction set into another's code.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(EFFOPS_ISAS portable avx2 avx512 avx512bf16)
else()
  set(EFFOPS_ISAS portable)
endif()
set(EFFOPS_FLAGS_portable "")
set(EFFOPS_FLAGS_avx2 -mavx2 -mfma -mf16c -DEFFOPS_ISA_AVX2)
set(EFFOPS_FLAGS_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -DEFFOPS_ISA_AVX512)
set(EFFOPS_FLAGS_avx512bf16 ${EFFOPS_FLAGS_avx512} -mavx512vnni -mavx512bf16)

set(EFFOPS_CPU_OBJECTS "")
foreach(isa ${EFFOPS_ISAS})
  add_library(effops_cpu_${isa} OBJECT csrc/cpu/kernels.cpp)
  target_compile_definitions(effops_cpu_${isa} PRIVATE EFFOPS_ISA=${isa})
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
