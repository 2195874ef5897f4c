# Warnings, hidden symbols, reproducible paths and sanitizers: the same for every target.
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(APPLE)
  set(TRANSMLA_ORIGIN "@loader_path")
else()
  set(TRANSMLA_ORIGIN "$ORIGIN")
endif()

function(transmla_hygiene target)
  set_target_properties(${target} PROPERTIES
    POSITION_INDEPENDENT_CODE ON
    CXX_VISIBILITY_PRESET hidden
    CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    INSTALL_RPATH "${TRANSMLA_ORIGIN}")
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:
    -Wall -Wextra -ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>)
  if(TRANSMLA_SANITIZE)
    set(sanitize -fsanitize=${TRANSMLA_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_compile_options(${target} PUBLIC $<$<COMPILE_LANGUAGE:CXX>:${sanitize}>)
    target_link_options(${target} PUBLIC ${sanitize})
  endif()
endfunction()
