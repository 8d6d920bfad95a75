// Counter-based normals keyed by (seed, class, index, step).
#include "philox.cuh"
#include "scalar.cuh"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(void* out, int dtype, const int64_t* class_labels, const int64_t* indices,
                         const int64_t* seed, const int64_t* step, int64_t numel) {
  const int sample = static_cast<int>(blockIdx.y);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, first = 4 * block;
  if (first >= numel) return;
  float z[4];
  normals(block, step[0], indices[sample], class_labels[sample], seed[0], z);
  const int count = numel - first < 4 ? static_cast<int>(numel - first) : 4;
  store_group(out, dtype, sample * numel + first, count, numel % 4 == 0, z);
}

}  // namespace

// out: [batch, numel], aligned to four elements
ACS_EXPORT int acs_philox_normal(void* out, int dtype, const int64_t* class_labels, const int64_t* indices,
                                 const int64_t* seed, const int64_t* step, int batch, int64_t numel,
                                 void* stream) {
  if (batch == 0 || numel == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((numel + 4 * kThreads - 1) / (4 * kThreads)), batch);
  return launch(philox_normal_kernel, grid, kThreads, 0, stream, out, dtype, class_labels, indices, seed,
                step, numel);
}
