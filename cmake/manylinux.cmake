# Links modules that load on glibc 2.28 and later, whatever the glibc of the machine that builds. The compiler is the
# machine's own GCC, as for every build; zig brings the symbol tables of old glibc versions and links against them. The
# C++ library goes into the module, because an old system has none that is new enough.

foreach(library libstdc++.a libgcc_eh.a)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${library}
                  OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT IS_ABSOLUTE "${path}")
    message(FATAL_ERROR "a manylinux wheel needs GCC's static ${library}, which ${CMAKE_CXX_COMPILER} does not have")
  endif()
  string(APPEND libraries " ${path}")
endforeach()
list(JOIN ZIMAGE_RT_MANYLINUX_LINKER " " linker)
set(CMAKE_CXX_CREATE_SHARED_MODULE
  "${linker} cc -target x86_64-linux-gnu.2.28 -shared <LINK_FLAGS> -o <TARGET> <OBJECTS> <LINK_LIBRARIES> ${libraries} -lpthread -ldl -lrt -lm")
