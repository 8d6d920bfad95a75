// Where discriminator_guidance keeps what: pixels of tensor-core tiles, channels in registers, shared memory.
#pragma once
#include "portable.cuh"

// --- a tile of 16 pixels by 16 channels in the registers of a warp
// ------------------------------------------ Lane 4 g + t. Rows g and g + 8 of a tile are the upper and the
// lower pixel of column g, so that a 2x2 pool window lies in the lanes g, g ^ 1 of one tile. A lane's two
// accumulators of 4 hold the channels 4 t to 4 t + 3: column 2 t + i of accumulator j is channel 4 t + 2 i +
// j, so that weight column g of accumulator j is channel 2 g + j.

struct Pixel {
  int x, y;
};

// size: 2, 4 or a multiple of 8
ACS_HD Pixel tile_pixel(int size, int tile, int g, int lower) {
  if (size >= 8) {
    const int per_row = size / 8;
    return {8 * (tile % per_row) + g, 2 * (tile / per_row) + lower};
  }
  return {g % size, 2 * (g / size) + lower};  // one tile; y beyond the image for size 2 and g > 1
}

ACS_HD constexpr int tile_count(int size) { return size >= 4 ? size * size / 16 : 1; }

// Channel k of the four in a lane, of the upper or lower pixel.
ACS_HD float& lane_value(float accumulators[2][4], int k, int lower) {
  return accumulators[k % 2][2 * lower + k / 2];
}

// --- activations in shared memory: [y][x][channel]
// ---------------------------------------------------------- Chunks of 8 channels are exchanged by the
// pixel's column, so that the 4 lanes t and 4 neighbouring pixels of half a warp's 8-byte access fall into
// different banks.
ACS_HD int activation_index(int width, int size, int x, int y, int channel) {
  return (y * size + x) * width + ((channel / 8) ^ (2 * (x & 3))) * 8 + channel % 8;
}

// --- the first layer's operands
// ----------------------------------------------------------------------------- Its reduction runs over units
// of four channels at a tap, unit = 9 (channel / 4) + tap, four units a step.
ACS_HD int padded_channels(int channels) { return ceil_div(channels, 4) * 4; }
ACS_HD int first_units(int channels) { return 9 * ceil_div(channels, 4); }
ACS_HD int first_steps(int channels) { return ceil_div(first_units(channels), 4); }

// Offset of a unit's four channels from those of a pixel's upper left neighbour, in x0 [size + 2][size +
// 2][padded]
ACS_HD int unit_offset(int size, int padded, int unit) {
  const int tap = unit % 9;
  return (tap / 3 * (size + 2) + tap % 3) * padded + unit / 9 * 4;
}

constexpr int kColumnTiles = 5;  // of 8 columns: 4 channels at 9 taps, and 4 columns of zeros

// --- shared memory
// ------------------------------------------------------------------------------------------ `ping` holds the
// first layer's output, then everything of layers 2 and up but the second's xhat, then the gradient at the
// first layer's output. `pong` holds the second layer's xhat and gradient; before and after them, the first
// layer's weights and, for one network, the gradient at x0.
struct Layout {
  int ping, pong, gradient, first_weights, column_weights, xstart, statistics, units, logits, scratch, zeros;
  int bytes;
};

constexpr int kStatistics =
    7;  // of width floats: the first layer's mean, rstd, two means; rstd of three layers

ACS_HD Layout make_layout(int width, int size, int channels, int networks, int classes) {
  const int second = width * (size / 2) * (size / 2) * 2;  // bytes of the second layer's input
  const int padded = padded_channels(channels);
  const int gradient = size * size * padded * 4;
  const int first_weights = width * first_steps(channels) * 16 * 2;
  const int column_weights = width * kColumnTiles * 8 * 2;
  const int kept = networks == 1 ? gradient : 0;
  Layout at;
  at.xstart = 0;  // before `ping`, as a convolution reads a pixel's width before its input
  at.ping = ceil_div((size + 2) * (size + 2) * padded * 2, 16) * 16;
  at.pong = at.ping + second;
  at.first_weights = at.pong + kept;
  at.column_weights = at.first_weights + first_weights;
  const int used = kept + first_weights + column_weights;
  int end = at.pong + (used > second ? used : second);
  at.gradient = networks == 1 ? at.pong : end;
  end += gradient - kept;
  at.statistics = end;
  end += kStatistics * width * 4;
  at.units = end;
  end += first_steps(channels) * 16;
  at.logits = end;
  end += ceil_div(classes, 4) * 16;
  at.scratch = end;
  at.zeros = end + 64;
  at.bytes = at.zeros + 16;
  return at;
}

// Within `ping`, in elements: the output of layer i (0 to 3) and the normalised convolution of layer i (2 or
// 3).
ACS_HD int output_offset(int width, int size, int i) {
  const int third = width * (size / 4) * (size / 4);
  return i < 2 ? 0 : i == 2 ? 2 * third : 2 * third + third / 2;
}

ACS_HD int xhat_offset(int width, int size, int i) {
  const int third = width * (size / 4) * (size / 4);
  return i == 2 ? third : 2 * third + third / 4;
}
