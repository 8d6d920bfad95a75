// Counter-based normals, bit for bit those of kernels/reference/noise.py up to Box-Muller.
#pragma once
#include "portable.cuh"

struct Words {
  uint32_t w[4];
};

// Philox-4x32-10 (Salmon et al. 2011)
ACS_HD Words philox_4x32(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(counter.w[0]) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(counter.w[2]) * 0xCD9E8D57u;
    counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.w[1] ^ key0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ counter.w[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// (0, 1]: word 2^-32 + 2^-33
ACS_HD float uniform(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

// Elements 4 block to 4 block + 3 of an image's noise
ACS_HD void normals(int64_t block, int64_t step, int64_t index, int64_t label, int64_t seed, float z[4]) {
  const Words counter = {{static_cast<uint32_t>(block), static_cast<uint32_t>(step),
                          static_cast<uint32_t>(index), static_cast<uint32_t>(label)}};
  const uint64_t key = static_cast<uint64_t>(seed);
  const Words words = philox_4x32(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  for (int pair = 0; pair < 2; ++pair) {
    const float radius = sqrtf(-2.0f * logf(uniform(words.w[2 * pair])));
    float s, c;
    sincos_turns(uniform(words.w[2 * pair + 1]), &s, &c);
    z[2 * pair] = radius * c;
    z[2 * pair + 1] = radius * s;
  }
}
