// Warp-wide operations: the tensor-core product and reductions, in a fixed order.
#pragma once
#include "scalar.cuh"

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

// threadIdx.x, read anew: what follows from it is not kept in registers across a kernel's phases.
__device__ __forceinline__ int current_thread() {
#if defined(__CUDA_ARCH__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// d [16, 8] += a [16, 16] b [16, 8] in fp32. Lane 4 g + t holds d[g][2t, 2t + 1], d[g + 8][2t, 2t + 1];
// a[g][2t, 2t + 1], a[g + 8][2t, 2t + 1], a[g][2t + 8, 2t + 9], a[g + 8][2t + 8, 2t + 9];
// b[2t, 2t + 1][g], b[2t + 8, 2t + 9][g] (PTX ISA, mma.m16n8k16).
template <class T>
__device__ __forceinline__ void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#if defined(__CUDA_ARCH__)
  if (IsBf16<T>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif !defined(__CUDACC__)
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto all = emulation::exchange(words, 6);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize), g = lane / 4, t = lane % 4;
  for (int r = 0; r < 4; ++r) {
    const int lower = r / 2, column = 2 * t + r % 2;
    float sum = d[r];
    for (int k = 0; k < 16; k += 2) {
      float a0, a1, b0, b1;
      unpack<T>(all[4 * g + k % 8 / 2][lower + 2 * (k / 8)], &a0, &a1);
      unpack<T>(all[4 * column + k % 8 / 2][4 + k / 8], &b0, &b1);
      sum += a0 * b0 + a1 * b1;
    }
    d[r] = sum;
  }
#endif
}

// Two of the four 16-bit halves of (x, y): the upper one of x if `x_upper`, and so on.
ACS_HD uint32_t select_halves(uint32_t x, bool x_upper, uint32_t y, bool y_upper) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(x, y, (x_upper ? 0x0032u : 0x0010u) | (y_upper ? 0x7600u : 0x5400u));
#else
  return ((x_upper ? x >> 16 : x) & 0xffffu) | ((y_upper ? y >> 16 : y) << 16);
#endif
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}

// Over the eight lanes of one t: a column of an MMA tile.
__device__ __forceinline__ float column_sum(float value) {
  for (int mask = 16; mask >= 4; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

// Of a whole block, for every thread of it. scratch: a float per warp, free for use at the call and after it.
__device__ inline float block_reduce(float value, bool maximum, float* scratch) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  value = maximum ? warp_max(value) : warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) scratch[warp] = value;
  __syncthreads();
  value = scratch[0];
  for (int i = 1; i < warps; ++i) value = maximum ? fmaxf(value, scratch[i]) : value + scratch[i];
  __syncthreads();
  return value;
}
