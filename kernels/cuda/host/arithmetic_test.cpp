// The arithmetic that the kernels share, on the CPU: known answers and finite differences.
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "../layout.cuh"
#include "../objective.cuh"
#include "../philox.cuh"
#include "../scalar.cuh"
#include "../step.cuh"

namespace {

int failures = 0;

void expect(bool held, const char* what) {
  if (held) return;
  printf("FAILED: %s\n", what);
  ++failures;
}

bool near(double a, double b, double tolerance) { return fabs(a - b) <= tolerance; }

void test_philox() {  // known answers of Random123 (kat_vectors, philox4x32 10)
  const uint32_t f = 0xffffffffu;
  struct {
    Words counter;
    uint32_t key[2];
    Words answer;
  } const known[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{f, f, f, f}}, {f, f}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {0xa4093822, 0x299f31d0},
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const auto& k : known) {
    const Words words = philox_4x32(k.counter, k.key[0], k.key[1]);
    for (int i = 0; i < 4; ++i) expect(words.w[i] == k.answer.w[i], "Philox-4x32-10");
  }
  expect(uniform(0) > 0.0f && uniform(0xffffffffu) <= 1.0f, "uniform lies in (0, 1]");
  double sum = 0.0, squares = 0.0;
  const int blocks = 25000;
  for (int i = 0; i < blocks; ++i) {
    float z[4];
    normals(i, 3, 5, 7, 11, z);
    for (float value : z) sum += value, squares += static_cast<double>(value) * value;
  }
  expect(near(sum / (4 * blocks), 0.0, 0.015) && near(squares / (4 * blocks), 1.0, 0.02),
         "moments of the normals");
}

template <class T>
void test_rounding() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const float x = to_float(T{static_cast<uint16_t>(bits)});
    if (x != x) continue;
    expect(from_float<T>(x).bits == bits, "half precision to float and back");
    const float above = to_float(T{static_cast<uint16_t>(bits + 1)});
    if ((bits & 0x7fffu) == 0x7fffu || isinf(x) || isinf(above) || above != above) continue;
    const float middle = 0.5f * x + 0.5f * above;  // a tie: to the even neighbour
    expect(from_float<T>(middle).bits == (bits % 2 ? bits + 1 : bits), "ties round to even");
  }
  float first, second;
  unpack<T>(pack<T>(1.5f, -2.0f), &first, &second);
  expect(first == 1.5f && second == -2.0f, "the first number of a pair lies in the low half");
}

void test_step() {  // the pieces against DDPM's own formulae, at numbers of no meaning
  const double a = 0.6, a_prev = 0.8, beta = 1.0 - a / a_prev, x = 0.7, cond = 0.4, null = -0.3, cfg = 1.5;
  float table[2 * ACS_COLUMNS] = {};
  float* row = table + ACS_COLUMNS;
  const double low = log(beta * (1 - a_prev) / (1 - a)), high = log(beta);
  const double values[ACS_COLUMNS] = {cfg,
                                      1 / sqrt(a),
                                      sqrt(1 - a) / sqrt(a),
                                      beta * sqrt(a_prev) / (1 - a),
                                      (1 - a_prev) * sqrt(1 - beta) / (1 - a),
                                      1.0,
                                      low,
                                      high,
                                      0.25,
                                      0.5};
  for (int i = 0; i < ACS_COLUMNS; ++i) row[i] = static_cast<float>(values[i]);
  const StepRow step = step_row(table, 1);
  const double eps = null + cfg * (cond - null), x0 = (x - sqrt(1 - a) * eps) / sqrt(a);
  expect(near(guided_eps(step, 0.4f, -0.3f, true), eps, 1e-6), "guided eps");
  expect(guided_eps(step, 0.4f, -0.3f, false) == 0.4f, "eps of the other channels is the conditional one");
  expect(near(xstart(step, 0.7f, static_cast<float>(eps), false), x0, 1e-6), "x0");
  expect(xstart(step, 9.0f, 0.0f, true) == 1.0f && xstart(step, -9.0f, 0.0f, true) == -1.0f, "clamped x0");
  const float nan = from_float<float>(NAN);
  expect(xstart(step, nan, 0.0f, true) != xstart(step, nan, 0.0f, true), "a NaN is not clamped away");
  const double v = (0.2 + 1) / 2, deviation = exp(0.5 * (v * high + (1 - v) * low));
  expect(near(learned_deviation(step, 0.2f), deviation, 1e-6), "learned-range deviation");
  const double mean = sqrt(a_prev) * beta / (1 - a) * x0 + sqrt(1 - beta) * (1 - a_prev) / (1 - a) * x;
  expect(near(step_value(step, static_cast<float>(x0), 0.7f, static_cast<float>(deviation), -0.9f),
              mean - 0.9 * deviation, 1e-6),
         "posterior");
  expect(step.push == 0.25f && step.push_per_eps == 0.5f, "the push's columns");
}

double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

double others_of(const std::vector<double>& logits, int y) {
  double sum = 0.0;
  for (size_t k = 0; k < logits.size(); ++k) sum += static_cast<int>(k) == y ? 0.0 : exp(logits[k]);
  return log(sum);
}

double objective_part(int objective, int network, const std::vector<double>& logits, int y, double omega) {
  const double m = others_of(logits, y) - logits[y];
  if (objective == ACS_DENSITY_RATIO) return -softplus(-logits[y]);
  if (objective == ACS_NONSATURATING) return -softplus(-m);
  return objective == ACS_LEARNABILITY && network == 1 ? -omega * softplus(m) : softplus(m);
}

void test_objectives() {
  const std::vector<double> logits = {0.3, -1.2, 2.0, 0.7};
  const double omega = 0.4, h = 1e-5;
  for (int objective = 0; objective < 4; ++objective) {
    for (int network = 0; network < (objective == ACS_LEARNABILITY ? 2 : 1); ++network) {
      for (int y = 0; y < 4; ++y) {
        const double others = others_of(logits, y);
        const float factor = objective_factor(objective, network, static_cast<float>(others - logits[y]),
                                              static_cast<float>(logits[y]), static_cast<float>(omega));
        for (int k = 0; k < 4; ++k) {
          std::vector<double> up = logits, down = logits;
          up[k] += h, down[k] -= h;
          const double slope = (objective_part(objective, network, up, y, omega) -
                                objective_part(objective, network, down, y, omega)) /
                               (2 * h);
          const float grad =
              logit_grad(objective, factor, k == y, static_cast<float>(exp(logits[k] - others)));
          expect(near(grad, slope, 1e-5), "objective gradient against finite differences");
        }
      }
    }
  }
}

void test_activations() {
  for (int activation = 0; activation < 2; ++activation) {
    for (float u = -4.05f; u < 4.0f; u += 0.1f) {
      const float h = 1e-3f;
      float around[2] = {u + h, u - h}, slope[1] = {u};
      activate(activation, around);
      activation_derivative(activation, slope);
      expect(near(slope[0], (around[0] - around[1]) / (2 * h), 2e-3), "slope of the activation");
    }
  }
}

void test_layout() {
  for (int size = 2; size <= 32; size *= 2) {  // every pixel in one tile, a pool window in lanes g, g ^ 1
    std::vector<int> seen(size * size, 0);
    for (int tile = 0; tile < tile_count(size); ++tile) {
      for (int g = 0; g < 8; ++g) {
        for (int lower = 0; lower < 2; ++lower) {
          const Pixel at = tile_pixel(size, tile, g, lower),
                      beside = tile_pixel(size, tile, g ^ 1, 1 - lower);
          if (at.y >= size) continue;
          ++seen[at.y * size + at.x];
          expect(at.x / 2 == beside.x / 2 && at.y / 2 == beside.y / 2, "a tile keeps pool windows together");
        }
      }
    }
    for (int count : seen) expect(count == 1, "tiles cover the image once");
    for (int width = 64; width <= 128; width *= 2) {
      std::vector<int> used(width * size * size, 0);
      for (int i = 0; i < width * size * size; ++i) {
        ++used[activation_index(width, size, i / width % size, i / width / size, i % width)];
      }
      for (int count : used) expect(count == 1, "activations have a place each");
    }
  }
  for (int size = 8; size <= 32; size *= 2) {
    for (int width = 64; width <= 128; width *= 2) {
      const int third = width * (size / 4) * (size / 4);
      expect(xhat_offset(width, size, 2) == third && output_offset(width, size, 2) == 2 * third &&
                 xhat_offset(width, size, 3) == output_offset(width, size, 2) + third / 4 &&
                 output_offset(width, size, 3) == xhat_offset(width, size, 3) + third / 4 &&
                 output_offset(width, size, 3) + third / 16 <= 4 * third,
             "the later layers lie one after the other in the first layer's output");
      for (int channels = 1; channels <= 32; ++channels) {
        const int last = first_units(channels) - 1;
        expect(unit_offset(size, padded_channels(channels), last) + 4 +
                       ((size - 1) * (size + 2) + size - 1) * padded_channels(channels) ==
                   (size + 2) * (size + 2) * padded_channels(channels),
               "the last unit of the last pixel ends x0");
      }
    }
  }
  expect(make_layout(128, 32, 4, 1, 1000).bytes <= 163 * 1024, "the production shape fits on sm_80");
  expect(make_layout(128, 32, 4, 2, 1000).bytes <= 227 * 1024, "two networks fit on sm_90");
}

}  // namespace

int main() {
  test_philox();
  test_rounding<Bf16>();
  test_rounding<Fp16>();
  test_step();
  test_objectives();
  test_activations();
  test_layout();
  printf(failures ? "%d checks failed\n" : "all checks held\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
