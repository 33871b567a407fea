# Warnings of our own code, and the sanitizers of a test build.

# Missing braces let a pointer become the first member of a struct in silence.
set(ZIMAGE_RT_WARNINGS -Wall -Wextra -Wshadow -Wmissing-braces)
if(ZIMAGE_RT_WERROR)
  list(APPEND ZIMAGE_RT_WARNINGS -Werror)
endif()

if(ZIMAGE_RT_SANITIZE)
  add_compile_options(-fsanitize=${ZIMAGE_RT_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${ZIMAGE_RT_SANITIZE})
endif()
