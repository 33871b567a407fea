# _cuda: kernels, models and their bindings. cuBLASLt and cuDNN are needed as headers alone: both are opened when
# a pipeline is made, so the module imports on a machine without them, and without a driver.

macro(skip_cuda reason)
  if(ZIMAGE_RT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ZIMAGE_RT_CUDA=ON, but ${reason}")
  endif()
  message(STATUS "_cuda is not built: ${reason}")
  set(ZIMAGE_RT_CUDA_SKIPPED "${reason}")
  return()
endmacro()

# NVIDIA's wheels, wherever the Python that builds would import them from: also in pip's build environment.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import os, sys; print(';'.join(p for p in sys.path if os.path.isdir(p)))"
  OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
set(toolkits ${site_packages})
list(TRANSFORM toolkits APPEND /nvidia/cu13)

include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(ZIMAGE_RT_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATH_SUFFIXES bin)
  if(NOT ZIMAGE_RT_NVCC)
    list(TRANSFORM toolkits APPEND /bin OUTPUT_VARIABLE programs)
    find_program(ZIMAGE_RT_NVCC nvcc HINTS ${programs} /usr/local/cuda/bin)
  endif()
  if(ZIMAGE_RT_NVCC)
    set(CMAKE_CUDA_COMPILER ${ZIMAGE_RT_NVCC})
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  skip_cuda("no nvcc was found when it was built")
endif()
if(NOT CMAKE_CUDA_HOST_COMPILER)
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
set(CMAKE_CUDA_ARCHITECTURES ${ZIMAGE_RT_CUDA_ARCHITECTURES})
# The nvcc of NVIDIA's wheels looks for its libraries in lib64, and the wheels have them in lib; CMake looks for a
# libcudart.so, and they have libcudart.so.13 alone (findings/nvcc-wheels-link.sh).
get_filename_component(toolkit "${CMAKE_CUDA_COMPILER}/../.." ABSOLUTE)
if(EXISTS ${toolkit}/lib/libcudadevrt.a AND NOT EXISTS ${toolkit}/lib64)
  string(APPEND CMAKE_CUDA_FLAGS " -L${toolkit}/lib")
  file(GLOB cudart ${toolkit}/lib/libcudart.so*)
  list(GET cudart 0 cudart)
  set(CUDA_CUDART ${cudart} CACHE FILEPATH "The CUDA runtime's shared library")
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  skip_cuda("nvcc did not compile when it was built")
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
find_package(CUDAToolkit REQUIRED)

list(TRANSFORM toolkits APPEND /include OUTPUT_VARIABLE toolkit_includes)
list(TRANSFORM site_packages APPEND /nvidia/cudnn/include OUTPUT_VARIABLE cudnn_includes)
list(TRANSFORM site_packages APPEND /include OUTPUT_VARIABLE frontend_includes)
set(hints ${CUDAToolkit_INCLUDE_DIRS} ${toolkit_includes} ${cudnn_includes} ${frontend_includes}
          ${ZIMAGE_RT_CUDA_HEADERS})
find_path(CUBLASLT_INCLUDE cublasLt.h HINTS ${hints})
find_path(NVRTC_INCLUDE nvrtc.h HINTS ${hints})
find_path(CUDNN_INCLUDE cudnn.h HINTS ${hints})
find_path(CUDNN_FRONTEND_INCLUDE cudnn_frontend.h HINTS ${hints})
foreach(header CUBLASLT NVRTC CUDNN CUDNN_FRONTEND)
  if(NOT ${header}_INCLUDE)
    list(APPEND missing ${header})
  endif()
endforeach()
if(missing)
  list(JOIN missing ", " missing)
  skip_cuda("the headers of ${missing} were missing when it was built")
endif()

file(GLOB kernels CONFIGURE_DEPENDS csrc/kernels/*.cu)
file(GLOB rooms CONFIGURE_DEPENDS
  csrc/device/*.cc csrc/weights/*.cc csrc/ops/*.cc csrc/models/*.cc csrc/runtime/*.cc)
add_library(zimage_cuda STATIC ${kernels} ${rooms})
target_include_directories(zimage_cuda PUBLIC csrc)
target_include_directories(zimage_cuda SYSTEM PUBLIC
  ${CUBLASLT_INCLUDE} ${NVRTC_INCLUDE} ${CUDNN_INCLUDE} ${CUDNN_FRONTEND_INCLUDE})
target_link_libraries(zimage_cuda PUBLIC zimage_cpu CUDA::cudart_static ${CMAKE_DL_LIBS})
list(JOIN ZIMAGE_RT_WARNINGS "," host_warnings)
target_compile_options(zimage_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr --extended-lambda -Xcompiler=${host_warnings}>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${ZIMAGE_RT_WERROR}>>:--Werror=all-warnings>
  $<$<COMPILE_LANGUAGE:CXX>:${ZIMAGE_RT_WARNINGS}>)

list(JOIN ZIMAGE_RT_CUDA_ARCHITECTURES "," architectures)  # a semicolon would end the compiler's command
add_python_module(_cuda LIBRARIES zimage_cuda
                  SOURCES csrc/bindings/cuda.cc csrc/bindings/module_config.cc csrc/bindings/sample_job.cc
                  DEFINITIONS "ZIMAGE_RT_CUDA_ARCHITECTURES=\"${architectures}\"")

# Single kernels, for tests in a working tree; no wheel has this module.
if(ZIMAGE_RT_TEST_MODULES)
  file(GLOB kernel_bindings CONFIGURE_DEPENDS csrc/bindings/kernels_*.cc)
  add_python_module(_cuda_kernels LIBRARIES zimage_cuda SOURCES csrc/bindings/cuda_kernels.cc ${kernel_bindings})
endif()
