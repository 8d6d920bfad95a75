// A block's guided step of one sample, along a gradient that lies in device or shared memory.
#pragma once
#include "philox.cuh"
#include "scalar.cuh"
#include "step.cuh"
#include "warp.cuh"

constexpr float kTiny = 1.17549435e-38f;  // as torch.finfo(torch.float32).tiny

// The four or fewer elements of a sample that share a Philox counter.
struct Group {
  int64_t x, cond, null, variance;  // where they lie in x and in denoised
  int first, count;                 // element within the sample
};

// VECTOR, here and below: each group is whole and is read in one access; else `a.vector` says so.
template <bool VECTOR>
ACS_HD Group sample_group(const AcsGuidedStep& a, int sample, int block) {
  const int64_t numel = static_cast<int64_t>(a.channels) * a.pixels;
  const int64_t stride = static_cast<int64_t>(a.denoised_channels) * a.pixels;
  Group group;
  group.first = 4 * block;
  group.count = !VECTOR && numel - group.first < 4 ? static_cast<int>(numel - group.first) : 4;
  group.x = sample * numel + group.first;
  group.cond = sample * stride + group.first;
  group.null = group.cond + a.batch * stride;
  group.variance = group.cond + numel;
  return group;
}

ACS_HD int sample_groups(const AcsGuidedStep& a) { return ceil_div(a.channels * a.pixels, 4); }

template <bool VECTOR>
ACS_HD void load_eps(const AcsGuidedStep& a, const StepRow& row, const Group& group, float eps[4]) {
  const bool vector = VECTOR || a.vector;
  float null[4];
  load_group(a.denoised, a.denoised_dtype, group.cond, group.count, vector, eps);
  if (group.first >= a.cfg_channels * a.pixels) return;
  load_group(a.denoised, a.denoised_dtype, group.null, group.count, vector, null);
  ACS_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= group.count) break;
    eps[i] = guided_eps(row, eps[i], null[i], group.first + i < a.cfg_channels * a.pixels);
  }
}

// One group's step; `push` is what (4) adds to it.
template <bool VECTOR>
ACS_HD void step_group(const AcsGuidedStep& a, const StepRow& row, int sample, const Group& group,
                       const float eps[4], const float push[4]) {
  const bool vector = VECTOR || a.vector;
  float x[4], variance[4], z[4];
  load_group(a.x, a.x_dtype, group.x, group.count, vector, x);
  if (a.learned_range) {
    load_group(a.denoised, a.denoised_dtype, group.variance, group.count, vector, variance);
  }
  normals(group.first / 4, a.step[0], a.indices[sample], a.class_labels[sample], a.seed[0], z);
  ACS_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= group.count) break;
    const float deviation = a.learned_range ? learned_deviation(row, variance[i]) : row.noise;
    x[i] = step_value(row, xstart(row, x[i], eps[i], a.clip), x[i], deviation, z[i]) + push[i];
  }
  store_group(a.out, a.out_dtype, group.x, group.count, vector, x);
}

// The whole sample by a block. gradient(group, g) gives a group's gradient; its norm is taken over elements
// divided by the largest, so that squares do not underflow. scratch: as in block_reduce.
template <bool VECTOR, class Gradient>
__device__ void guided_update(const AcsGuidedStep& a, int sample, Gradient gradient, float* scratch) {
  const StepRow row = step_row(a.table, a.step[0]);
  const int groups = sample_groups(a), threads = static_cast<int>(blockDim.x);
  const int first = current_thread();
  float largest = 0.0f, squares = 0.0f, eps_squares = 0.0f;
  ACS_ROLLED
  for (int i = first; i < groups; i += threads) {
    const Group group = sample_group<VECTOR>(a, sample, i);
    float g[4];
    gradient(group, g);
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k >= group.count) break;
      largest = fabsf(g[k]) <= largest ? largest : fabsf(g[k]);  // a NaN stays
    }
  }
  largest = block_reduce(largest, true, scratch);
  const float inverse_largest = 1.0f / fmaxf(largest, kTiny);
  ACS_ROLLED
  for (int i = first; i < groups; i += threads) {
    const Group group = sample_group<VECTOR>(a, sample, i);
    float g[4], eps[4];
    gradient(group, g);
    load_eps<VECTOR>(a, row, group, eps);
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k >= group.count) break;
      const float unit = g[k] * inverse_largest;
      squares += unit * unit;
      eps_squares += eps[k] * eps[k];
    }
  }
  squares = block_reduce(squares, false, scratch);
  eps_squares = block_reduce(eps_squares, false, scratch);
  const float radius = row.push + row.push_per_eps * sqrtf(eps_squares);
  const float norm = sqrtf(squares);
  const float inverse_norm = 1.0f / (norm < kTiny ? kTiny : norm);  // a NaN stays; the radius last: 0 stays 0
  ACS_ROLLED
  for (int i = first; i < groups; i += threads) {
    const Group group = sample_group<VECTOR>(a, sample, i);
    float g[4], eps[4];
    gradient(group, g);
    load_eps<VECTOR>(a, row, group, eps);
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k < group.count) g[k] = g[k] * inverse_largest * inverse_norm * radius;
    }
    step_group<VECTOR>(a, row, sample, group, eps, g);
  }
}
