// The sampler's step and the push along the gradient, equations (1), (2), (4) of METHOD.md, one element at a
// time.
#pragma once
#include "arguments.h"
#include "portable.cuh"

// A row of the step table, in the order of kernels/structures.py's Column
struct StepRow {
  float cfg_scale, inv_sqrt_alpha, eps_to_xstart, from_xstart, from_x, noise;
  float min_log_variance, max_log_variance, push, push_per_eps;
};

ACS_HD StepRow step_row(const float* table, int64_t step) {
  const float* r = table + step * ACS_COLUMNS;
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9]};
}

// (1): classifier-free guidance on the first channels, the conditional value on the others
ACS_HD float guided_eps(const StepRow& row, float cond, float null, bool guided) {
  return guided ? null + row.cfg_scale * (cond - null) : cond;
}

// To [-1, 1]; a NaN stays one.
ACS_HD float clamp_one(float x) { return x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x; }

// (2)
ACS_HD float xstart(const StepRow& row, float x, float eps, bool clip) {
  const float value = row.inv_sqrt_alpha * x - row.eps_to_xstart * eps;
  return clip ? clamp_one(value) : value;
}

// NOISE times the learned-range standard deviation (IDDPM (15)) of the variance channel
ACS_HD float learned_deviation(const StepRow& row, float variance) {
  const float v = (variance + 1.0f) / 2.0f;
  return row.noise * expf(0.5f * (row.min_log_variance + v * (row.max_log_variance - row.min_log_variance)));
}

ACS_HD float step_value(const StepRow& row, float pred_xstart, float x, float deviation, float noise) {
  return row.from_xstart * pred_xstart + row.from_x * x + deviation * noise;
}
