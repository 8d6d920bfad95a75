// The discriminator's layers after the first: a warp owns 16 channels of all pixels, so that the norm's sums
// stay in it. The convolution is an implicit product of pixels by (tap, channel); weights come from device
// memory (L2) in their own order, a lane's share of all nine taps at once, and are sorted by tap in
// registers.
#pragma once
#include "first_layer.cuh"

template <class T, int WIDTH, int SIZE>
struct InnerLayer {
  LayerParameters<T> p;
  float* rstd;     // [WIDTH]
  const T* zeros;  // 8 bytes
  int lane, warp;

  static constexpr int kTiles = tile_count(SIZE), kHalf = SIZE / 2;
  using Sums = float[kTiles][2][4];

  __device__ int channel() const { return 16 * warp + 4 * (lane % 4); }

  // Whether row g of a tile is a pixel at all
  __device__ bool is_pixel() const { return SIZE > 2 || lane / 4 < 2; }

  // The lane's weights of 16 reduction channels from k on: 36 registers, [2 outputs][4 inputs][9 taps], or
  // transposed, [4 outputs][2 inputs][9 taps], two halves a register.
  template <bool TRANSPOSED>
  __device__ void load_weights(int k, uint32_t (&raw)[36]) const {
    const int g = lane / 4, t = lane % 4, n = 16 * warp + 2 * g;
    if (TRANSPOSED) {
      ACS_UNROLL
      for (int c = 0; c < 4; ++c) {
        const T* from = p.weight + static_cast<size_t>((k + 4 * t + c) * WIDTH + n) * 9;
        ACS_UNROLL
        for (int i = 0; i < 9; ++i) raw[9 * c + i] = reinterpret_cast<const uint32_t*>(from)[i];
      }
    } else {
      ACS_UNROLL
      for (int j = 0; j < 2; ++j) {
        const T* from = p.weight + static_cast<size_t>((n + j) * WIDTH + k + 4 * t) * 9;
        ACS_UNROLL
        for (int i = 0; i < 9; ++i) {
          const uint2 pairs = reinterpret_cast<const uint2*>(from)[i];
          raw[18 * j + 2 * i] = pairs.x;
          raw[18 * j + 2 * i + 1] = pairs.y;
        }
      }
    }
  }

  // The operand of one tap: reduction channels 4 t + 2 h, 4 t + 2 h + 1 of output column j.
  template <bool TRANSPOSED>
  __device__ static uint32_t weight_pair(const uint32_t (&raw)[36], int tap, int j, int h) {
    if (TRANSPOSED) {
      const int e = 9 * j + tap;
      return select_halves(raw[18 * h + e / 2], e % 2, raw[18 * h + 9 + e / 2], e % 2);
    }
    const int e = 18 * h + tap;
    return select_halves(raw[18 * j + e / 2], e % 2, raw[18 * j + (e + 9) / 2], (e + 9) % 2);
  }

  // The lane's four channels, from k on, at column dx beside its own in tile column `block`, row y; zeros
  // beyond the image. Of a size of 8 and more, `column` is where that lies for row 0 of block 0, so that the
  // rest of the address is a constant; what lies beside the image is read and dropped, which needs no branch.
  // Smaller images have a row y of their own in each half of a tile.
  __device__ uint2 load_pixel(const T* input, const T* column, int block, int y, int dx, int k) const {
    const int g = lane / 4;
    if constexpr (SIZE >= 8) {
      if (y < 0 || y >= SIZE) return make_uint2(0, 0);
      uint2 four = *reinterpret_cast<const uint2*>(column + (y * SIZE + 8 * block) * WIDTH);
      const bool first = block == 0 && dx < 0, last = block == SIZE / 8 - 1 && dx > 0;
      if ((first && g == 0) || (last && g == 7)) four = make_uint2(0, 0);
      return four;
    } else {
      const int x = g % SIZE + dx, row = y + 2 * (g / SIZE);
      const bool inside = is_pixel() && x >= 0 && x < SIZE && row >= 0 && row < SIZE;
      const T* from = input + activation_index(WIDTH, SIZE, x, row, k + 4 * (lane % 4));
      return *reinterpret_cast<const uint2*>(inside ? from : zeros);
    }
  }

  // input: [SIZE][SIZE] of WIDTH channels as activation_index has them. A column of tiles goes down the image
  // with the four rows that it and its neighbours above and below need, so that each pixel is loaded once for
  // three taps.
  template <bool TRANSPOSED>
  __device__ void convolve(const T* input, Sums& sums) const {
    constexpr int kBlocks = SIZE >= 8 ? SIZE / 8 : 1;
    ACS_UNROLL
    for (int i = 0; i < 8 * kTiles; ++i) sums[i / 8][i / 4 % 2][i % 4] = 0.0f;
    ACS_ROLLED
    for (int k = 0; k < WIDTH; k += 16) {
      uint32_t raw[36];
      load_weights<TRANSPOSED>(k, raw);
      ACS_UNROLL
      for (int dx = -1; dx <= 1; ++dx) {
        const int x = lane / 4 + dx;
        const T* column = input + x * WIDTH + ((k / 8) ^ (2 * (x & 3))) * 8 + 4 * (lane % 4);
        ACS_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
          uint2 rows[4];  // y - 1 to y + 2 of the tile's upper row y
          rows[2] = load_pixel(input, column, block, -1, dx, k);
          rows[3] = load_pixel(input, column, block, 0, dx, k);
          ACS_UNROLL
          for (int i = block; i < kTiles; i += kBlocks) {
            const int y = 2 * (i / kBlocks);
            rows[0] = rows[2], rows[1] = rows[3];
            rows[2] = load_pixel(input, column, block, y + 1, dx, k);
            rows[3] = load_pixel(input, column, block, y + 2, dx, k);
            ACS_UNROLL
            for (int dy = -1; dy <= 1; ++dy) {
              const int tap = TRANSPOSED ? 4 - 3 * dy - dx : 4 + 3 * dy + dx;
              const uint2 upper = rows[1 + dy], lower = rows[2 + dy];
              const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
              ACS_UNROLL
              for (int j = 0; j < 2; ++j) {
                const uint32_t b[2] = {weight_pair<TRANSPOSED>(raw, tap, j, 0),
                                       weight_pair<TRANSPOSED>(raw, tap, j, 1)};
                mma<T>(sums[i][j], a, b);
              }
            }
          }
        }
      }
    }
  }

  __device__ int pixel_index(int tile, int lower) const {
    const Pixel at = tile_pixel(SIZE, tile, lane / 4, lower);
    return activation_index(WIDTH, SIZE, at.x, at.y, channel());
  }

  // Where channel k of a tile's pool window lies in the output: as activation_index has it, or of the last
  // layer in the flat order of the head, [channel][pixel].
  __device__ int window_index(int tile, int k, bool last) const {
    const Pixel at = tile_pixel(SIZE, tile, lane / 4, 0);
    const int x = at.x / 2, y = at.y / 2;
    return last ? (channel() + k) * kHalf * kHalf + y * kHalf + x
                : activation_index(WIDTH, kHalf, x, y, channel() + k);
  }

  __device__ void store_sums(Sums& sums, T* to) const {
    if (!is_pixel()) return;
    ACS_UNROLL
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float four[4] = {lane_value(sums[i / 2], 0, i % 2), lane_value(sums[i / 2], 1, i % 2),
                             lane_value(sums[i / 2], 2, i % 2), lane_value(sums[i / 2], 3, i % 2)};
      store4(to + pixel_index(i / 2, i % 2), four);
    }
  }

  // Replaces the convolution's sums by xhat, in place; keeps rstd.
  __device__ void normalise(Sums& sums) const {
    constexpr float kPixels = SIZE * SIZE;
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) {
      float sum = 0.0f, squares = 0.0f;
      ACS_UNROLL
      for (int i = 0; i < 2 * kTiles; ++i) sum += lane_value(sums[i / 2], k, i % 2);
      const float mean = column_sum(sum) / kPixels;  // rows that are no pixel hold zeros
      ACS_UNROLL
      for (int i = 0; i < 2 * kTiles; ++i) {
        const float d = is_pixel() ? lane_value(sums[i / 2], k, i % 2) - mean : 0.0f;
        squares += d * d;
      }
      const float scale = 1.0f / sqrtf(column_sum(squares) / kPixels + p.eps);
      ACS_UNROLL
      for (int i = 0; i < 2 * kTiles; ++i) {
        float& value = lane_value(sums[i / 2], k, i % 2);
        value = (value - mean) * scale;
      }
      if (lane < 4) rstd[channel() + k] = scale;
    }
  }

  // xhat: kept for the backward; what is pooled is made from it as it is stored.
  __device__ void forward(const T* input, T* xhat, T* output, bool last) const {
    Sums sums;
    convolve<false>(input, sums);
    normalise(sums);
    __syncthreads();  // `output` may take the place of `input`
    store_sums(sums, xhat);
    float gamma[4], beta[4];
    load4(p.gamma + channel(), gamma);
    load4(p.beta + channel(), beta);
    ACS_ROLLED
    for (int i = 0; i < kTiles; ++i) {
      float u[8] = {}, pooled[4];
      if (is_pixel()) {
        load4(xhat + pixel_index(i, 0), u);
        load4(xhat + pixel_index(i, 1), u + 4);
      }
      ACS_UNROLL
      for (int r = 0; r < 8; ++r) u[r] = gamma[r % 4] * u[r] + beta[r % 4];
      activate(p.activation, u);
      ACS_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float sum = u[k] + u[k + 4];
        pooled[k] = 0.25f * (sum + __shfl_xor_sync(kAllLanes, sum, 4));
      }
      if (lane / 4 % 2 != 0 || !is_pixel()) continue;
      if (last) {
        ACS_UNROLL
        for (int k = 0; k < 4; ++k) output[window_index(i, k, true)] = from_float<T>(pooled[k]);
      } else {
        store4(output + window_index(i, 0, false), pooled);
      }
    }
    __syncthreads();
  }

  // d = gamma act'(u) grad / 4 and xhat of the lane's four channels at a pixel
  __device__ void norm_grad(const T* xhat, const T* grad, bool last, int tile, int lower,
                            const float gamma[4], const float beta[4], float x[4], float d[4]) const {
    load4(xhat + pixel_index(tile, lower), x);
    if (last) {
      ACS_UNROLL
      for (int k = 0; k < 4; ++k) d[k] = to_float(grad[window_index(tile, k, true)]);
    } else {
      load4(grad + window_index(tile, 0, false), d);
    }
    float slope[4];
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) slope[k] = gamma[k] * x[k] + beta[k];
    activation_derivative(p.activation, slope);
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) d[k] *= 0.25f * gamma[k] * slope[k];
  }

  // grad: d L / d output. Replaces xhat by d conv, then writes d L / d input to `input_grad`.
  __device__ void backward(T* xhat, const T* grad, T* input_grad, bool last) const {
    constexpr float kPixels = SIZE * SIZE;
    float gamma[4], beta[4], sum[4] = {}, product[4] = {};
    load4(p.gamma + channel(), gamma);
    load4(p.beta + channel(), beta);
    ACS_ROLLED
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (!is_pixel()) break;
      float x[4], d[4];
      norm_grad(xhat, grad, last, i / 2, i % 2, gamma, beta, x, d);
      ACS_UNROLL
      for (int k = 0; k < 4; ++k) {
        sum[k] += d[k];
        product[k] += d[k] * x[k];
      }
    }
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) {
      sum[k] = column_sum(sum[k]) / kPixels;
      product[k] = column_sum(product[k]) / kPixels;
    }
    ACS_ROLLED
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (!is_pixel()) break;
      float x[4], d[4];
      norm_grad(xhat, grad, last, i / 2, i % 2, gamma, beta, x, d);
      ACS_UNROLL
      for (int k = 0; k < 4; ++k) d[k] = rstd[channel() + k] * (d[k] - sum[k] - x[k] * product[k]);
      store4(xhat + pixel_index(i / 2, i % 2), d);
    }
    __syncthreads();
    Sums sums;
    convolve<true>(xhat, sums);
    store_sums(sums, input_grad);
    __syncthreads();
  }
};
