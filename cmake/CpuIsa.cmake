# transmla_cpu_kernels(<target> <op>...): adds csrc/cpu/<op>.cpp to <target> once per instruction
# set, each copy in the namespace transmla::<isa>.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(TRANSMLA_CPU_ISAS scalar avx2 avx512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(TRANSMLA_CPU_ISAS neon)
else()
  set(TRANSMLA_CPU_ISAS scalar)
endif()
set(TRANSMLA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(TRANSMLA_FLAGS_avx512 ${TRANSMLA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)

function(transmla_cpu_kernels target)
  list(TRANSFORM ARGN PREPEND csrc/cpu/)
  list(TRANSFORM ARGN APPEND .cpp)
  foreach(isa ${TRANSMLA_CPU_ISAS})
    add_library(transmla_${isa} OBJECT ${ARGN})
    target_include_directories(transmla_${isa} PRIVATE
      $<TARGET_PROPERTY:${target},INTERFACE_INCLUDE_DIRECTORIES>)
    target_compile_definitions(transmla_${isa} PRIVATE TRANSMLA_ISA=${isa})
    target_compile_options(transmla_${isa} PRIVATE ${TRANSMLA_FLAGS_${isa}}
      -fno-math-errno -fno-trapping-math -ffp-contract=fast)
    transmla_hygiene(transmla_${isa})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:transmla_${isa}>)
  endforeach()
endfunction()
