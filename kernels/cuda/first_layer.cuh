// The discriminator's first layer. Its normalised output does not fit into shared memory beside the rest (256
// KB for 128 channels at 32x32 in half precision), so every pass convolves x0 anew: statistics, forward, the
// norm's backward means, and the input gradient.
#pragma once
#include "layout.cuh"
#include "objective.cuh"
#include "warp.cuh"

// A convolution's bias has no part in it: a norm with one group a channel takes it out again.
template <class T>
struct LayerParameters {
  const T* weight;  // [width, inputs, 3, 3]
  const T* gamma;   // [width]
  const T* beta;    // [width]
  int activation;
  float eps;
};

template <class T, int WIDTH>
struct FirstLayer {
  LayerParameters<T> p;
  const T* xstart;        // [size + 2][size + 2][padded], zeros around
  const uint4* operands;  // [WIDTH / 16][steps][lane]: weights as the product takes them
  uint2* columns;         // [WIDTH / 16][kColumnTiles][lane]
  const int* units;       // [4 steps]
  float* statistics;      // mean, rstd, mean of d, mean of d xhat
  int channels, padded, size, steps, lane, warp;

  static constexpr int kThreads = 2 * WIDTH, kWarps = kThreads / kWarpSize, kGroup = 4;

  __device__ float weight(int out, int channel, int tap) const {
    return tap < 9 && channel < channels ? to_float(p.weight[(out * channels + channel) * 9 + tap]) : 0.0f;
  }

  // Puts the weights into `operands`; the caller synchronises.
  __device__ void stage_operands() {
    uint4* to = const_cast<uint4*>(operands);
    for (int i = current_thread(); i < WIDTH / 16 * steps * kWarpSize; i += kThreads) {
      const int at = i % kWarpSize, unit = 4 * (i / kWarpSize % steps) + at % 4;
      const int out = i / kWarpSize / steps * 16 + at / 4 * 2;
      const int tap = unit < first_units(channels) ? unit % 9 : 9, first = unit / 9 * 4;
      uint32_t pairs[4];
      for (int j = 0; j < 2; ++j) {
        for (int h = 0; h < 2; ++h) {
          pairs[2 * j + h] =
              pack<T>(weight(out + j, first + 2 * h, tap), weight(out + j, first + 2 * h + 1, tap));
        }
      }
      to[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }

  // The transposed weights of four input channels; output channels in the order in which a lane holds them.
  __device__ void stage_columns(int first) {
    for (int i = current_thread(); i < WIDTH / 16 * kColumnTiles * kWarpSize; i += kThreads) {
      const int g = i % kWarpSize / 4, out = i / kWarpSize / kColumnTiles * 16 + i % 4 * 4;
      const int tap = i / kWarpSize % kColumnTiles * 2 + g / 4, channel = first + g % 4;
      columns[i] = make_uint2(pack<T>(weight(out, channel, tap), weight(out + 2, channel, tap)),
                              pack<T>(weight(out + 1, channel, tap), weight(out + 3, channel, tap)));
    }
  }

  // Tiles first to first + TILES - 1 of the output's channels 16 slab to 16 slab + 15.
  template <int TILES>
  __device__ void convolve(int slab, int first, float (&sums)[TILES][2][4]) const {
    int origin[TILES][2];
    ACS_UNROLL
    for (int i = 0; i < TILES; ++i) {
      ACS_UNROLL
      for (int lower = 0; lower < 2; ++lower) {
        const Pixel at = tile_pixel(size, first + i, lane / 4, lower);
        origin[i][lower] = (at.y * (size + 2) + at.x) * padded;
      }
      ACS_UNROLL
      for (int r = 0; r < 8; ++r) sums[i][r / 4][r % 4] = 0.0f;
    }
    for (int step = 0; step < steps; ++step) {
      const uint4 w = operands[(slab * steps + step) * kWarpSize + lane];
      const uint32_t b[2][2] = {{w.x, w.y}, {w.z, w.w}};
      const T* unit = xstart + units[4 * step + lane % 4];
      ACS_UNROLL
      for (int i = 0; i < TILES; ++i) {
        const uint2 upper = *reinterpret_cast<const uint2*>(unit + origin[i][0]);
        const uint2 lower = *reinterpret_cast<const uint2*>(unit + origin[i][1]);
        const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
        mma<T>(sums[i][0], a, b[0]);
        mma<T>(sums[i][1], a, b[1]);
      }
    }
  }

  // Mean and rstd of the warp's 16 channels, from moments about each lane's first value.
  __device__ void statistics_pass() const {
    const int tiles = tile_count(size);
    float shift[4], sum[4] = {}, squares[4] = {};
    for (int first = 0; first < tiles; first += kGroup) {
      float v[kGroup][2][4];
      convolve<kGroup>(warp, first, v);
      ACS_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (first == 0) shift[k] = lane_value(v[0], k, 0);
        ACS_UNROLL
        for (int i = 0; i < 2 * kGroup; ++i) {
          const float d = lane_value(v[i / 2], k, i % 2) - shift[k];
          sum[k] += d;
          squares[k] += d * d;
        }
      }
    }
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) {
      float count = static_cast<float>(2 * tiles), mean = shift[k] + sum[k] / count;
      float moment = squares[k] - sum[k] * (sum[k] / count);
      for (int mask = 4; mask <= 16; mask *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, mean, mask);
        moment += __shfl_xor_sync(kAllLanes, moment, mask) + (other - mean) * (other - mean) * (0.5f * count);
        mean = 0.5f * (mean + other);
        count *= 2.0f;
      }
      if (lane < 4) {
        statistics[channel(warp) + k] = mean;
        statistics[WIDTH + channel(warp) + k] = 1.0f / sqrtf(fmaxf(moment, 0.0f) / count + p.eps);
      }
    }
  }

  __device__ int channel(int slab) const { return 16 * slab + 4 * (lane % 4); }

  __device__ void statistic(int i, int slab, float value[4]) const {
    const float4 four = *reinterpret_cast<const float4*>(statistics + i * WIDTH + channel(slab));
    value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
  }

  __device__ int window_index(int tile, int slab) const {  // of the pool window in the output
    const Pixel at = tile_pixel(size, tile, lane / 4, 0);
    return activation_index(WIDTH, size / 2, at.x / 2, at.y / 2, channel(slab));
  }

  // output: [size / 2][size / 2] pooled activations, as activation_index has them; the warp's 16 channels
  __device__ void forward_pass(T* output) const {
    float mean[4], rstd[4], gamma[4], beta[4];
    statistic(0, warp, mean);
    statistic(1, warp, rstd);
    load4(p.gamma + channel(warp), gamma);
    load4(p.beta + channel(warp), beta);
    for (int first = 0; first < tile_count(size); first += kGroup) {
      float v[kGroup][2][4];
      convolve<kGroup>(warp, first, v);
      ACS_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        float u[8], pooled[4];
        ACS_UNROLL
        for (int r = 0; r < 8; ++r) {
          const int k = r / 2;
          u[r] = gamma[k] * ((lane_value(v[i], k, r % 2) - mean[k]) * rstd[k]) + beta[k];
        }
        activate(p.activation, u);
        ACS_UNROLL
        for (int k = 0; k < 4; ++k) {
          const float sum = u[2 * k] + u[2 * k + 1];
          pooled[k] = 0.25f * (sum + __shfl_xor_sync(kAllLanes, sum, 4));
        }
        if (lane / 4 % 2 == 0) store4(output + window_index(first + i, warp), pooled);
      }
    }
  }

  // Means of d = gamma act'(u) grad / 4 and of d xhat, for the warp's 16 channels. grad: as `output` above.
  __device__ void backward_means_pass(const T* grad) const {
    float mean[4], rstd[4], gamma[4], beta[4], sum[4] = {}, product[4] = {};
    statistic(0, warp, mean);
    statistic(1, warp, rstd);
    load4(p.gamma + channel(warp), gamma);
    load4(p.beta + channel(warp), beta);
    for (int first = 0; first < tile_count(size); first += kGroup) {
      float v[kGroup][2][4];
      convolve<kGroup>(warp, first, v);
      ACS_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        float g[4], xhat[8], slope[8];
        load4(grad + window_index(first + i, warp), g);
        ACS_UNROLL
        for (int r = 0; r < 8; ++r) {
          const int k = r / 2;
          xhat[r] = (lane_value(v[i], k, r % 2) - mean[k]) * rstd[k];
          slope[r] = gamma[k] * xhat[r] + beta[k];
        }
        activation_derivative(p.activation, slope);
        ACS_UNROLL
        for (int r = 0; r < 8; ++r) {
          const int k = r / 2;
          const float d = 0.25f * gamma[k] * g[k] * slope[r];
          sum[k] += d;
          product[k] += d * xhat[r];
        }
      }
    }
    const float pixels = static_cast<float>(size * size);
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) {
      const float s = column_sum(sum[k]), q = column_sum(product[k]);
      if (lane < 4) {
        statistics[2 * WIDTH + channel(warp) + k] = s / pixels;
        statistics[3 * WIDTH + channel(warp) + k] = q / pixels;
      }
    }
  }

  // v of one tile and slab becomes d conv = rstd (d - mean d - xhat mean(d xhat)), packed as an operand.
  __device__ void convolution_grad(int slab, int tile, const T* grad, float (&v)[2][4], uint32_t a[4]) const {
    float mean[4], rstd[4], d_mean[4], product_mean[4], gamma[4], beta[4], g[4];
    statistic(0, slab, mean);
    statistic(1, slab, rstd);
    statistic(2, slab, d_mean);
    statistic(3, slab, product_mean);
    load4(p.gamma + channel(slab), gamma);
    load4(p.beta + channel(slab), beta);
    load4(grad + window_index(tile, slab), g);
    float xhat[8], slope[8];
    ACS_UNROLL
    for (int r = 0; r < 8; ++r) {
      const int k = r / 2;
      xhat[r] = (lane_value(v, k, r % 2) - mean[k]) * rstd[k];
      slope[r] = gamma[k] * xhat[r] + beta[k];
    }
    activation_derivative(p.activation, slope);
    ACS_UNROLL
    for (int r = 0; r < 8; ++r) {
      const int k = r / 2;
      const float d = 0.25f * gamma[k] * g[k] * slope[r];
      lane_value(v, k, r % 2) = rstd[k] * (d - d_mean[k] - xhat[r] * product_mean[k]);
    }
    a[0] = pack<T>(v[0][0], v[0][1]);
    a[1] = pack<T>(v[0][2], v[0][3]);
    a[2] = pack<T>(v[1][0], v[1][1]);
    a[3] = pack<T>(v[1][2], v[1][3]);
  }

  // Adds d L / d x0 to `gradient` [size][size][padded] fp32, for the whole block: each warp multiplies its
  // pixels' d conv with the weights of all taps, and the taps are added one after the other, so in one order
  // always.
  __device__ void input_gradient_pass(const T* grad, float* gradient) {
    constexpr int kTiles = 2;
    const int rounds = ceil_div(tile_count(size), kTiles * kWarps), t = lane % 4;
    for (int first_channel = 0; first_channel < padded; first_channel += 4) {
      stage_columns(first_channel);
      __syncthreads();
      for (int round = 0; round < rounds; ++round) {
        const int tile = (round * kWarps + warp) * kTiles;
        const bool active = tile < tile_count(size);
        float z[kTiles][kColumnTiles][4] = {};
        for (int slab = 0; active && slab < WIDTH / 16; ++slab) {
          float v[kTiles][2][4];
          uint32_t a[kTiles][4];
          convolve<kTiles>(slab, tile, v);
          ACS_UNROLL
          for (int i = 0; i < kTiles; ++i) convolution_grad(slab, tile + i, grad, v[i], a[i]);
          ACS_UNROLL
          for (int n = 0; n < kColumnTiles; ++n) {
            const uint2 w = columns[(slab * kColumnTiles + n) * kWarpSize + lane];
            const uint32_t b[2] = {w.x, w.y};
            ACS_UNROLL
            for (int i = 0; i < kTiles; ++i) mma<T>(z[i][n], a[i], b);
          }
        }
        ACS_UNROLL
        for (int tap = 0; tap < 9; ++tap) {
          if (active && t / 2 == tap % 2) {
            ACS_UNROLL
            for (int i = 0; i < 2 * kTiles; ++i) {
              const Pixel at = tile_pixel(size, tile + i / 2, lane / 4, i % 2);
              const int x = at.x + tap % 3 - 1, y = at.y + tap / 3 - 1;
              if (x < 0 || x >= size || y < 0 || y >= size) continue;
              float* to = gradient + (y * size + x) * padded + first_channel + t % 2 * 2;
              to[0] += z[i / 2][tap / 2][i % 2 * 2];
              to[1] += z[i / 2][tap / 2][i % 2 * 2 + 1];
            }
          }
          __syncthreads();
        }
      }
    }
  }
};
