// One guided step: CFG, x0, the sampler's step, its noise and the push, one block per sample.
#include "guided_update.cuh"

namespace {

constexpr int kThreads = 256;

struct StoredGradient {
  const AcsGuidedStep& a;

  __device__ void operator()(const Group& group, float g[4]) const {
    load_group(a.gradient, a.gradient_dtype, group.x, group.count, a.vector, g);
  }
};

__global__ void __launch_bounds__(kThreads) guided_step_kernel(const AcsGuidedStep a) {
  const int sample = static_cast<int>(blockIdx.x);
  guided_update<false>(a, sample, StoredGradient{a}, reinterpret_cast<float*>(shared_memory()));
}

// Without a gradient nothing spans a sample: a thread per Philox counter.
__global__ void __launch_bounds__(kThreads) plain_step_kernel(const AcsGuidedStep a) {
  const int sample = static_cast<int>(blockIdx.y);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= sample_groups(a)) return;
  const StepRow row = step_row(a.table, a.step[0]);
  const Group group = sample_group<false>(a, sample, i);
  const float nothing[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  float eps[4];
  load_eps<false>(a, row, group, eps);
  step_group<false>(a, row, sample, group, eps, nothing);
}

}  // namespace

ACS_EXPORT int acs_guided_step(const AcsGuidedStep* arguments, void* stream) {
  const AcsGuidedStep& a = *arguments;
  if (a.batch == 0) return cudaSuccess;
  if (a.gradient) {
    const size_t scratch = kThreads / kWarpSize * sizeof(float);
    return launch(guided_step_kernel, dim3(a.batch), kThreads, scratch, stream, a);
  }
  return launch(plain_step_kernel, dim3(ceil_div(sample_groups(a), kThreads), a.batch), kThreads, 0, stream,
                a);
}
