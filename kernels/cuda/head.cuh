// The linear classifier, the objective and its gradient, in a block.
#pragma once
#include "objective.cuh"
#include "warp.cuh"

// Logits of the features (flat, in shared memory) into `logits`; the block is in step afterwards.
template <class T>
__device__ void head_logits(const T* features, const T* weight, const T* bias, int classes, int count,
                            float* logits) {
  const int lane = current_thread() % kWarpSize, warp = current_thread() / kWarpSize;
  for (int k = warp; k < classes; k += static_cast<int>(blockDim.x) / kWarpSize) {
    const T* row = weight + static_cast<size_t>(k) * count;
    float sum = 0.0f;
#pragma unroll 4
    for (int f = 4 * lane; f < count; f += 4 * kWarpSize) {
      float w[4], x[4];
      load4(row + f, w);
      load4(features + f, x);
      sum += w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3];
    }
    sum = warp_sum(sum);
    if (lane == 0) logits[k] = sum + to_float(bias[k]);
  }
  __syncthreads();
}

// log sum_{k != y} exp(l_k) and its largest term, by each warp for itself
__device__ inline float others_logsumexp(const float* logits, int classes, int target) {
  const int lane = current_thread() % kWarpSize;
  float largest = -INFINITY, sum = 0.0f;
  for (int k = lane; k < classes; k += kWarpSize) {
    if (k != target) largest = fmaxf(largest, logits[k]);
  }
  largest = warp_max(largest);
  for (int k = lane; k < classes; k += kWarpSize) {
    if (k != target) sum += expf(logits[k] - largest);
  }
  return largest + logf(warp_sum(sum));
}

// d L / d features / scale over the features; `logits` becomes d L / d logits / scale. others: of the above.
template <class T>
__device__ void head_gradient(T* features, const T* weight, int classes, int count, int target, int objective,
                              float factor, float others, float* logits) {
  for (int k = current_thread(); k < classes; k += static_cast<int>(blockDim.x)) {
    logits[k] = logit_grad(objective, factor, k == target, expf(logits[k] - others));
  }
  __syncthreads();
  for (int f = 4 * current_thread(); f < count; f += 4 * static_cast<int>(blockDim.x)) {
    float grad[4] = {};
#pragma unroll 8
    for (int k = 0; k < classes; ++k) {
      float w[4];
      load4(weight + static_cast<size_t>(k) * count + f, w);
      ACS_UNROLL
      for (int i = 0; i < 4; ++i) grad[i] += logits[k] * w[i];
    }
    store4(features + f, grad);
  }
  __syncthreads();
}
