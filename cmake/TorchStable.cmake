# Torch::Stable: headers and libraries of any torch >= 2.10, held to the stable ABI of 2.10.
if(NOT EXISTS "${TORCH_ROOT}/version.py")
  message(FATAL_ERROR "TORCH_ROOT='${TORCH_ROOT}' is not the directory of an installed torch package.")
endif()
file(STRINGS "${TORCH_ROOT}/version.py" torch_version REGEX "^__version__ = ")
string(REGEX REPLACE "^__version__ = '([0-9.]+).*" "\\1" torch_version "${torch_version}")
if(torch_version VERSION_LESS 2.10)
  message(FATAL_ERROR "transmla needs torch >= 2.10; ${TORCH_ROOT} holds ${torch_version}.")
endif()

add_library(Torch::Stable INTERFACE IMPORTED)
target_include_directories(Torch::Stable SYSTEM INTERFACE "${TORCH_ROOT}/include")
target_compile_definitions(Torch::Stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# Symbols of the CUDA half live behind libtorch.so, which a CPU-only torch has as an empty shell.
target_link_options(Torch::Stable INTERFACE $<$<PLATFORM_ID:Linux>:LINKER:--no-as-needed>)
foreach(library torch torch_cpu)
  target_link_libraries(Torch::Stable INTERFACE
    "${TORCH_ROOT}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}${library}${CMAKE_SHARED_LIBRARY_SUFFIX}")
endforeach()
