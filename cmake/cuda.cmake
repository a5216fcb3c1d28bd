# The CUDA backend, where nvcc is: src/cuda/*.cu. Without it tril is built as if there were none.
#   -DTRIL_CUDA=OFF                            leave it out
#   -DTRIL_CUDA_ARCHITECTURES="80-real"        GPUs to compile for (fewer compile faster)
# The toolkit is looked for on the PATH, in CUDAToolkit_ROOT and in /usr/local/cuda.
option(TRIL_CUDA "Build the CUDA backend where the toolkit is found" ON)
set(TRIL_CUDA_ARCHITECTURES "80-real;89-real;90a-real;100-real;100-virtual" CACHE STRING
  "GPUs that the CUDA backend is compiled for")
if(NOT TRIL_CUDA OR TRIL_SANITIZE OR TRIL_THREAD_SANITIZER OR TRIL_FUZZ)
  return()
endif()
find_program(TRIL_NVCC nvcc HINTS ENV CUDACXX PATHS ${CUDAToolkit_ROOT}/bin /usr/local/cuda/bin)
if(NOT TRIL_NVCC)
  message(STATUS "nvcc not found: built without CUDA")
  return()
endif()
execute_process(COMMAND ${TRIL_NVCC} --version OUTPUT_VARIABLE version ERROR_QUIET)
string(REGEX MATCH "release ([0-9.]+)" version "${version}")
set(version "${CMAKE_MATCH_1}")
if(NOT version OR version VERSION_LESS 12.4)
  message(STATUS "${TRIL_NVCC} is CUDA ${version}; 12.4 or newer is needed: built without CUDA")
  return()
endif()
set(CMAKE_CUDA_COMPILER ${TRIL_NVCC})
set(CMAKE_CUDA_ARCHITECTURES ${TRIL_CUDA_ARCHITECTURES})
if(version VERSION_LESS 12.8) # which knows no sm_100; newer GPUs compile the PTX of sm_90
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^100-virtual$" "90-virtual")
  list(FILTER CMAKE_CUDA_ARCHITECTURES EXCLUDE REGEX "^100")
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
if(CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
enable_language(CUDA)
set(CMAKE_CUDA_LINKER_PREFERENCE 0) # the C compiler links, faster
set(CMAKE_CUDA_LINKER_PREFERENCE_PROPAGATES 0)
find_package(CUDAToolkit 12.4 REQUIRED)
message(STATUS "CUDA ${version}: for ${CMAKE_CUDA_ARCHITECTURES}")

file(GLOB cuda_sources CONFIGURE_DEPENDS src/cuda/*.cu)
add_library(tril_cuda OBJECT ${cuda_sources})
target_link_libraries(tril_cuda PRIVATE tril_flags)
target_compile_options(tril_cuda PRIVATE -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers,-Wno-psabi -diag-suppress=20012
  --expt-relaxed-constexpr -lineinfo)
if(TRIL_WERROR)
  target_compile_options(tril_cuda PRIVATE -Werror=all-warnings)
endif()
list(APPEND TRIL_OBJECTS $<TARGET_OBJECTS:tril_cuda>)
target_compile_definitions(tril_api PRIVATE TRIL_CUDA)
# The runtime is linked in (without its headers: the emulated GPU has its own); cuBLASLt, large, is
# loaded when the GPU is first used (src/cuda/blas.cu).
target_link_libraries(tril_flags INTERFACE $<LINK_ONLY:CUDA::cudart_static> ${CMAKE_DL_LIBS} stdc++)
