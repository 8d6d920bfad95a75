// The C ABI: what the launchers take. kernels/cuda/binding.py mirrors these structures in ctypes.
#pragma once
#include <stdint.h>

enum AcsDtype { ACS_FLOAT32 = 0, ACS_BFLOAT16 = 1, ACS_FLOAT16 = 2 };
enum AcsActivation { ACS_RELU = 0, ACS_SILU = 1 };
enum AcsObjective { ACS_ADVERSARIAL = 0, ACS_NONSATURATING = 1, ACS_LEARNABILITY = 2, ACS_DENSITY_RATIO = 3 };

enum { ACS_MAX_DEPTH = 4, ACS_COLUMNS = 10 };

// guided_step; every tensor is contiguous and `out` may be x
typedef struct {
  const void* x;                // [batch, channels, pixels]
  void* out;                    // as x
  const void* denoised;         // [2 batch, denoised_channels, pixels], conditional half first
  const void* gradient;         // as x, or null
  const int64_t* class_labels;  // [batch]
  const int64_t* indices;       // [batch]
  const int64_t* seed;          // [1]
  const int64_t* step;          // [1]
  const float* table;           // [steps, ACS_COLUMNS]
  int32_t x_dtype, out_dtype, denoised_dtype, gradient_dtype;
  int32_t batch, channels, pixels, denoised_channels;
  int32_t cfg_channels, clip, learned_range;
  int32_t vector;  // every sample starts at a multiple of four elements, aligned to as many
} AcsGuidedStep;

// discriminator_guidance: `step` without a gradient; the network in one dtype
typedef struct {
  AcsGuidedStep step;
  const int64_t* targets;             // [batch]
  const void* weight[ACS_MAX_DEPTH];  // [networks, width, channels or width, 3, 3]
  const void* gamma[ACS_MAX_DEPTH];   // [networks, width]
  const void* beta[ACS_MAX_DEPTH];    // [networks, width]
  const void* head_weight;            // [networks, classes, width (size >> depth)^2]
  const void* head_bias;              // [networks, classes]
  int32_t networks, depth, width, size, classes;
  int32_t dtype, activation, objective;
  float omega, eps;
} AcsDiscriminatorGuidance;
