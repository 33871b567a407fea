# add_python_module(NAME SOURCES ... LIBRARIES ... [DEFINITIONS ...]): one extension module for each Python of
# ZIMAGE_RT_PYTHONS. Libraries are compiled once; only the bindings depend on a Python's headers.

find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
if(NOT ZIMAGE_RT_PYTHONS)
  set(ZIMAGE_RT_PYTHONS "${Python_SOABI}=${Python_INCLUDE_DIRS}")
endif()

function(add_python_module name)
  cmake_parse_arguments(PARSE_ARGV 1 MODULE "" "" "SOURCES;LIBRARIES;DEFINITIONS")
  set(exports ${CMAKE_CURRENT_SOURCE_DIR}/cmake/python_module.map)
  foreach(python IN LISTS ZIMAGE_RT_PYTHONS)
    string(REGEX MATCH "^([^=]+)=(.+)$" matched "${python}")
    set(soabi ${CMAKE_MATCH_1})
    set(target ${name}.${soabi})
    add_library(${target} MODULE ${MODULE_SOURCES})
    set(include ${CMAKE_MATCH_2})
    # Debian's pyconfig.h includes the one of the architecture by its path from the folder above.
    cmake_path(GET include PARENT_PATH above)
    target_include_directories(${target} SYSTEM PRIVATE ${include} ${above})
    target_link_libraries(${target} PRIVATE ${MODULE_LIBRARIES} pybind11::headers)
    target_compile_definitions(${target} PRIVATE ${MODULE_DEFINITIONS})
    target_compile_options(${target} PRIVATE ${ZIMAGE_RT_WARNINGS})
    target_link_options(${target} PRIVATE -Wl,--version-script=${exports} $<$<CONFIG:Release>:-s>)
    set_target_properties(${target} PROPERTIES PREFIX "" OUTPUT_NAME ${name} SUFFIX .${soabi}.so LINKER_LANGUAGE CXX
                          LINK_DEPENDS ${exports})
    if(ZIMAGE_RT_OUTPUT)
      set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${ZIMAGE_RT_OUTPUT})
    endif()
  endforeach()
endfunction()
