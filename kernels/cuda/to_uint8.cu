// Float [B, C, P] in [-1, 1] to bytes [B, P, C], four pixels a thread.
#include "scalar.cuh"
#include "step.cuh"

namespace {

constexpr int kThreads = 256;

ACS_HD uint32_t to_byte(float x) { return static_cast<uint32_t>(rintf((clamp_one(x) + 1.0f) * 127.5f)); }

__global__ void __launch_bounds__(kThreads)
    to_uint8_kernel(uint8_t* out, const void* x, int dtype, int channels, int pixels, bool vector) {
  const int first = 4 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (first >= pixels) return;
  const int64_t sample = static_cast<int64_t>(blockIdx.y) * channels * pixels;
  const int count = pixels - first < 4 ? pixels - first : 4;
  uint8_t* to = out + sample + static_cast<int64_t>(first) * channels;
  float value[4];
  if (channels == 3 && vector) {  // an image: twelve bytes, so three words
    uint32_t words[3] = {0, 0, 0};
    ACS_UNROLL
    for (int c = 0; c < 3; ++c) {
      load_group(x, dtype, sample + static_cast<int64_t>(c) * pixels + first, 4, true, value);
      ACS_UNROLL
      for (int i = 0; i < 4; ++i) words[(3 * i + c) / 4] |= to_byte(value[i]) << (3 * i + c) % 4 * 8;
    }
    ACS_UNROLL
    for (int i = 0; i < 3; ++i) reinterpret_cast<uint32_t*>(to)[i] = words[i];
    return;
  }
  for (int c = 0; c < channels; ++c) {
    load_group(x, dtype, sample + static_cast<int64_t>(c) * pixels + first, count, vector, value);
    for (int i = 0; i < count; ++i) to[i * channels + c] = static_cast<uint8_t>(to_byte(value[i]));
  }
}

}  // namespace

// x is aligned to four elements, out to four bytes
ACS_EXPORT int acs_to_uint8(uint8_t* out, const void* x, int dtype, int batch, int channels, int pixels,
                            void* stream) {
  if (batch == 0 || channels * pixels == 0) return cudaSuccess;
  const dim3 grid(ceil_div(pixels, 4 * kThreads), batch);
  return launch(to_uint8_kernel, grid, kThreads, 0, stream, out, x, dtype, channels, pixels, pixels % 4 == 0);
}
