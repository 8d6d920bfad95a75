// A CUDA device on the CPU, for tests: the kernels' own source, thread for thread.
//
// Each thread of a block is a fibre. It runs until __syncthreads or a warp-wide operation, and then another
// one runs: in an order that a schedule picks, so that a missing barrier shows as a result that depends on
// the schedule. Shared memory is poisoned before each block and watched for writes beyond its end.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef int cudaError_t;
enum {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

constexpr int kWarp = 32;
constexpr int kMessage = 8;  // words that a lane can give to its warp at once

struct Place {
  dim3 thread, block, block_size, grid;
};

const Place& place();
void barrier();
// Gives up to kMessage words to the warp and waits for all lanes; returns the words of lane 0, then lane 1,
// ...
const uint32_t (*exchange(const uint32_t* words, int count))[kMessage];
unsigned char* shared();
cudaError_t run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace emulation

#define threadIdx (emulation::place().thread)
#define blockIdx (emulation::place().block)
#define blockDim (emulation::place().block_size)
#define gridDim (emulation::place().grid)

inline void __syncthreads() { emulation::barrier(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  union {
    float f;
    uint32_t u;
  } word = {value};
  const int lane = static_cast<int>(threadIdx.x % emulation::kWarp);
  word.u = emulation::exchange(&word.u, 1)[lane ^ mask][0];
  return word.f;
}

inline unsigned char* shared_memory() { return emulation::shared(); }

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, void*, A... arguments) {
  return emulation::run(grid, threads, shared, [=] { kernel(arguments...); });
}
