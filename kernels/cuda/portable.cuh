// One source for nvcc and, without CUDA, for g++: there host/emulation.h stands for the device.
#pragma once
#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define ACS_HD __host__ __device__ __forceinline__
#define ACS_UNROLL _Pragma("unroll")
#define ACS_ROLLED _Pragma("unroll 1")

extern __shared__ __align__(16) unsigned char acs_shared[];

__device__ __forceinline__ unsigned char* shared_memory() { return acs_shared; }

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, void* stream,
                   A... arguments) {
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}
#else
#include "host/emulation.h"
#define ACS_HD inline
#define ACS_UNROLL
#define ACS_ROLLED
#endif

#define ACS_EXPORT extern "C" __attribute__((visibility("default")))

ACS_HD float fast_exp(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return expf(x);
#endif
}

// 0 where b overflows, as for a sigmoid far from 0
ACS_HD float fast_divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// sin and cos of 2 pi u
ACS_HD void sincos_turns(float u, float* s, float* c) {
#if defined(__CUDA_ARCH__)
  sincospif(2.0f * u, s, c);
#else
  const double angle = 6.283185307179586476925 * static_cast<double>(u);
  *s = static_cast<float>(sin(angle));
  *c = static_cast<float>(cos(angle));
#endif
}

ACS_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }
