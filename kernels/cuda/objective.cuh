// The objectives of METHOD.md in closed form, as in kernels/reference/discriminator.py.
#pragma once
#include "arguments.h"
#include "portable.cuh"

ACS_HD float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// d L = factor (q_k for k != y; -1 at y), or factor (0; 1) for density_ratio; m = log sum_{k != y} exp(l_k) -
// l_y
ACS_HD float objective_factor(int objective, int network, float m, float own, float omega) {
  if (objective == ACS_DENSITY_RATIO) return sigmoid(-own);
  if (objective == ACS_NONSATURATING) return sigmoid(-m);
  return objective == ACS_LEARNABILITY && network == 1 ? -omega * sigmoid(m) : sigmoid(m);
}

// d L / d l_k from the factor, which the caller has divided by the sample's scale; q = softmax over k != y
ACS_HD float logit_grad(int objective, float factor, bool own, float q) {
  if (objective == ACS_DENSITY_RATIO) return own ? factor : 0.0f;
  return own ? -factor : factor * q;
}

// u becomes act(u), a few at once so that one branch serves them all.
template <int COUNT>
ACS_HD void activate(int activation, float (&u)[COUNT]) {
  if (activation == ACS_RELU) {
    for (int i = 0; i < COUNT; ++i) u[i] = u[i] < 0.0f ? 0.0f : u[i];  // a NaN stays one
  } else {
    for (int i = 0; i < COUNT; ++i) u[i] = fast_divide(u[i], 1.0f + fast_exp(-u[i]));
  }
}

// u becomes act'(u).
template <int COUNT>
ACS_HD void activation_derivative(int activation, float (&u)[COUNT]) {
  if (activation == ACS_RELU) {
    for (int i = 0; i < COUNT; ++i) u[i] = u[i] > 0.0f ? 1.0f : 0.0f;
  } else {
    for (int i = 0; i < COUNT; ++i) {
      const float s = fast_divide(1.0f, 1.0f + fast_exp(-u[i]));
      u[i] = s * (1.0f + u[i] * (1.0f - s));
    }
  }
}
