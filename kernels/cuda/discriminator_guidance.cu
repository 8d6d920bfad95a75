// A whole guided step in one launch: x0, the discriminator forward and backward, the norm and the update.
// One block per sample holds the sample's activations in shared memory from the first layer to the last and
// back.
#include "guided_update.cuh"
#include "head.cuh"
#include "inner_layer.cuh"

namespace {

// [pixel][padded] fp32; an image has a multiple of 8 pixels a row, so four lie in one
struct SharedGradient {
  const float* gradient;
  int pixels, padded;

  __device__ void operator()(const Group& group, float g[4]) const {
    const float* from = gradient + group.first % pixels * padded + group.first / pixels;
    ACS_UNROLL
    for (int i = 0; i < 4; ++i) g[i] = from[i * padded];
  }
};

template <class T, int WIDTH>
struct Discriminator {
  const AcsDiscriminatorGuidance& a;
  Layout layout;
  unsigned char* memory;

  template <class P>
  __device__ P* at(int offset) const {
    return reinterpret_cast<P*>(memory + offset);
  }

  __device__ LayerParameters<T> parameters(int i, int network) const {
    const int inputs = i == 0 ? a.step.channels : WIDTH;
    return {static_cast<const T*>(a.weight[i]) + static_cast<size_t>(network) * WIDTH * inputs * 9,
            static_cast<const T*>(a.gamma[i]) + network * WIDTH,
            static_cast<const T*>(a.beta[i]) + network * WIDTH, a.activation, a.eps};
  }

  __device__ FirstLayer<T, WIDTH> first_layer(int network) const {
    const int channels = a.step.channels, thread = current_thread();
    return {parameters(0, network),
            at<T>(layout.xstart),
            at<uint4>(layout.first_weights),
            at<uint2>(layout.column_weights),
            at<int>(layout.units),
            at<float>(layout.statistics),
            channels,
            padded_channels(channels),
            a.size,
            first_steps(channels),
            thread % kWarpSize,
            thread / kWarpSize};
  }

  __device__ T* output(int i) const { return at<T>(layout.ping) + output_offset(WIDTH, a.size, i); }

  __device__ T* xhat(int i) const {
    return i == 1 ? at<T>(layout.pong) : at<T>(layout.ping) + xhat_offset(WIDTH, a.size, i);
  }

  template <int SIZE>
  __device__ void run_inner(int i, int network, bool forward) const {
    const int thread = current_thread();
    const InnerLayer<T, WIDTH, SIZE> layer{parameters(i, network),
                                           at<float>(layout.statistics) + (3 + i) * WIDTH,
                                           at<T>(layout.zeros), thread % kWarpSize, thread / kWarpSize};
    const bool last = i == a.depth - 1;
    if (forward) {
      layer.forward(output(i - 1), xhat(i), output(i), last);
    } else {
      layer.backward(xhat(i), output(i), output(i - 1), last);
    }
  }

  __device__ void inner(int i, int network, bool forward) const {
    const int size = a.size >> i;
    if (size == 16) run_inner<16>(i, network, forward);
    if (size == 8) run_inner<8>(i, network, forward);
    if (size == 4) run_inner<4>(i, network, forward);
    if (size == 2) run_inner<2>(i, network, forward);
  }

  // The units' offsets, and zeros around x0 and in the channels that fill it up
  __device__ void prepare() const {
    const int padded = padded_channels(a.step.channels), size = a.size;
    for (int i = current_thread(); i < 4 * first_steps(a.step.channels); i += 2 * WIDTH) {
      at<int>(layout.units)[i] = i < first_units(a.step.channels) ? unit_offset(size, padded, i) : 0;
    }
    for (int i = current_thread(); i < (size + 2) * (size + 2) * padded; i += 2 * WIDTH) {
      at<T>(layout.xstart)[i] = from_float<T>(0.0f);
    }
    if (threadIdx.x < 8) at<T>(layout.zeros)[threadIdx.x] = from_float<T>(0.0f);
    __syncthreads();
  }

  // `forward` synchronises before it is read.
  __device__ void store_xstart(int sample) const {
    const AcsGuidedStep& s = a.step;
    const StepRow row = step_row(s.table, s.step[0]);
    const int padded = padded_channels(s.channels);
    ACS_ROLLED
    for (int i = current_thread(); i < sample_groups(s); i += 2 * WIDTH) {
      const Group group = sample_group<true>(s, sample, i);
      float x[4], eps[4];
      load_group(s.x, s.x_dtype, group.x, 4, true, x);
      load_eps<true>(s, row, group, eps);
      const int pixel = group.first % s.pixels, channel = group.first / s.pixels;
      T* to = at<T>(layout.xstart) + ((pixel / a.size + 1) * (a.size + 2) + pixel % a.size + 1) * padded +
              channel;
      ACS_UNROLL
      for (int k = 0; k < 4; ++k) to[k * padded] = from_float<T>(xstart(row, x[k], eps[k], s.clip));
    }
  }

  __device__ void forward(int network) const {
    FirstLayer<T, WIDTH> first = first_layer(network);
    first.stage_operands();
    __syncthreads();
    first.statistics_pass();
    __syncthreads();
    first.forward_pass(output(0));
    __syncthreads();
    for (int i = 1; i < a.depth; ++i) inner(i, network, true);
  }

  // The head, forward and backward. `scale` is the largest |factor| so far; returns what the gradients of the
  // networks before have to be multiplied with to share it.
  __device__ float head(int network, int target, float* scale) const {
    T* features = output(a.depth - 1);
    const int side = a.size >> a.depth, count = WIDTH * side * side;
    const T* weight = static_cast<const T*>(a.head_weight) + static_cast<size_t>(network) * a.classes * count;
    float* logits = at<float>(layout.logits);
    head_logits(features, weight, static_cast<const T*>(a.head_bias) + network * a.classes, a.classes, count,
                logits);
    const float others = others_logsumexp(logits, a.classes, target), own = logits[target];
    const float factor = objective_factor(a.objective, network, others - own, own, a.omega);
    const float larger = fmaxf(*scale, fabsf(factor)), rescale = *scale / larger;
    *scale = larger;
    __syncthreads();  // `logits` is written next
    head_gradient(features, weight, a.classes, count, target, a.objective, factor / larger, others, logits);
    return rescale;
  }

  __device__ void backward(int network, float rescale) const {
    for (int i = a.depth - 1; i > 0; --i) inner(i, network, false);
    FirstLayer<T, WIDTH> first = first_layer(network);
    float* gradient = at<float>(layout.gradient);
    for (int i = current_thread(); i < a.size * a.size * first.padded; i += 2 * WIDTH) {
      gradient[i] = network == 0 ? 0.0f : rescale * gradient[i];
    }
    first.stage_operands();
    __syncthreads();
    first.backward_means_pass(output(0));
    first.input_gradient_pass(output(0), gradient);  // synchronises before it reads the means
  }

  __device__ void guide(int sample) const {
    float scale = kTiny;
    const int target = static_cast<int>(a.targets[sample]);
    store_xstart(sample);
    for (int network = 0; network < a.networks; ++network) {
      forward(network);
      const float rescale = head(network, target, &scale);
      backward(network, rescale);
    }
    const SharedGradient gradient{at<float>(layout.gradient), a.step.pixels,
                                  padded_channels(a.step.channels)};
    guided_update<true>(a.step, sample, gradient, at<float>(layout.scratch));
    // No barrier: the next sample writes x0 and weights, then synchronises, before it writes what was read here.
  }
};

template <class T, int WIDTH>
__global__ void __launch_bounds__(2 * WIDTH)
    discriminator_guidance_kernel(const AcsDiscriminatorGuidance a, const Layout layout) {
  const Discriminator<T, WIDTH> network{a, layout, shared_memory()};
  network.prepare();
  for (int sample = static_cast<int>(blockIdx.x); sample < a.step.batch;
       sample += static_cast<int>(gridDim.x)) {
    network.guide(sample);
  }
}

Layout layout_of(const AcsDiscriminatorGuidance& a) {
  return make_layout(a.width, a.size, a.step.channels, a.networks, a.classes);
}

// Shared memory that a block may have, and multiprocessors, of the current device.
#if defined(__CUDACC__)
cudaError_t device_limits(int* shared, int* multiprocessors) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  return error;
}

template <class K>
cudaError_t allow_shared(K* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
#else
cudaError_t device_limits(int* shared, int* multiprocessors) {
  *shared = 227 * 1024;
  *multiprocessors = 1;
  return cudaSuccess;
}

template <class K>
cudaError_t allow_shared(K*, int) {
  return cudaSuccess;
}
#endif

template <class T, int WIDTH>
cudaError_t launch_guidance(const AcsDiscriminatorGuidance& a, void* stream) {
  const Layout layout = layout_of(a);
  int shared = 0, multiprocessors = 0;
  cudaError_t error = device_limits(&shared, &multiprocessors);
  if (error != cudaSuccess) return error;
  if (layout.bytes > shared) return cudaErrorInvalidValue;
  auto* kernel = discriminator_guidance_kernel<T, WIDTH>;
  error = allow_shared(kernel, shared);  // the device's maximum: no other call lowers it before the launch
  if (error != cudaSuccess) return error;
  const int resident = multiprocessors * (shared / layout.bytes);
  return launch(kernel, dim3(a.step.batch < resident ? a.step.batch : resident), 2 * WIDTH, layout.bytes,
                stream, a, layout);
}

}  // namespace

// What a block needs for these shapes and what the current device gives it.
ACS_EXPORT int acs_discriminator_guidance_memory(const AcsDiscriminatorGuidance* a, int* needed, int* given) {
  int multiprocessors = 0;
  *needed = layout_of(*a).bytes;
  return device_limits(given, &multiprocessors);
}

ACS_EXPORT int acs_discriminator_guidance(const AcsDiscriminatorGuidance* arguments, void* stream) {
  const AcsDiscriminatorGuidance& a = *arguments;
  if (a.step.batch == 0) return cudaSuccess;
  const bool fits = a.depth >= 2 && a.depth <= ACS_MAX_DEPTH && a.size >> a.depth > 0 &&
                    (a.size == 8 || a.size == 16 || a.size == 32);
  if (!a.step.vector || !fits || (a.dtype != ACS_BFLOAT16 && a.dtype != ACS_FLOAT16))
    return cudaErrorInvalidValue;
  const bool bf16 = a.dtype == ACS_BFLOAT16;
  if (a.width == 128)
    return bf16 ? launch_guidance<Bf16, 128>(a, stream) : launch_guidance<Fp16, 128>(a, stream);
  if (a.width == 64)
    return bf16 ? launch_guidance<Bf16, 64>(a, stream) : launch_guidance<Fp16, 64>(a, stream);
  return cudaErrorInvalidValue;
}
