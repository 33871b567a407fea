# _cuda: kernels, programs and their bindings. cuBLASLt and cuDNN are needed as headers alone: both are opened when
# a pipeline is made, so the module imports on a machine without them, and without a driver.

macro(skip_cuda reason)
  if(ZIMAGE_RT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ZIMAGE_RT_CUDA=ON, but ${reason}")
  endif()
  message(STATUS "_cuda is not built: ${reason}")
  return()
endmacro()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  skip_cuda("there is no nvcc")
endif()

# In the toolkit, or in NVIDIA's wheels beside the Python that builds.
execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
                OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
find_package(CUDAToolkit REQUIRED)
set(hints ${CUDAToolkit_INCLUDE_DIRS} ${site_packages}/nvidia/cu13/include ${site_packages}/nvidia/cudnn/include
          ${site_packages}/include ${ZIMAGE_RT_CUDA_HEADERS})
find_path(CUBLASLT_INCLUDE cublasLt.h HINTS ${hints})
find_path(NVRTC_INCLUDE nvrtc.h HINTS ${hints})
find_path(CUDNN_INCLUDE cudnn.h HINTS ${hints})
find_path(CUDNN_FRONTEND_INCLUDE cudnn_frontend.h HINTS ${hints})
foreach(header CUBLASLT NVRTC CUDNN CUDNN_FRONTEND)
  if(NOT ${header}_INCLUDE)
    skip_cuda("the headers of ${header} are missing: pip install nvidia-cublas nvidia-cuda-nvrtc nvidia-cudnn-cu13 nvidia-cudnn-frontend")
  endif()
endforeach()

set(CMAKE_CUDA_ARCHITECTURES ${ZIMAGE_RT_CUDA_ARCHITECTURES})
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)

file(GLOB kernels CONFIGURE_DEPENDS csrc/kernels/*.cu)
file(GLOB programs CONFIGURE_DEPENDS csrc/programs/*.cc)
add_library(zimage_cuda STATIC
  ${kernels}
  ${programs}
  csrc/runtime/attention.cc
  csrc/runtime/device.cc
  csrc/runtime/gemm.cc
  csrc/runtime/library.cc)
target_include_directories(zimage_cuda PUBLIC csrc csrc/include)
target_include_directories(zimage_cuda SYSTEM PRIVATE
  ${CUBLASLT_INCLUDE} ${NVRTC_INCLUDE} ${CUDNN_INCLUDE} ${CUDNN_FRONTEND_INCLUDE})
target_link_libraries(zimage_cuda PUBLIC zimage_runtime CUDA::cudart_static ${CMAKE_DL_LIBS})
target_compile_options(zimage_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr --extended-lambda>
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow>)

file(GLOB kernel_bindings CONFIGURE_DEPENDS csrc/bindings/kernels_*.cc)
pybind11_add_module(_cuda csrc/bindings/cuda.cc ${kernel_bindings})
target_link_libraries(_cuda PRIVATE zimage_cuda)
list(JOIN ZIMAGE_RT_CUDA_ARCHITECTURES "," architectures)  # a semicolon would end the compiler's command
target_compile_definitions(_cuda PRIVATE ZIMAGE_RT_CUDA_ARCHITECTURES="${architectures}")
if(ZIMAGE_RT_OUTPUT)
  set_target_properties(_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${ZIMAGE_RT_OUTPUT})
endif()
