// bfloat16 and float16 as bits, and tensors of a dtype that is known at run time.
#pragma once
#include <string.h>

#include "arguments.h"
#include "portable.cuh"

ACS_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

ACS_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

template <class T>
struct IsBf16 {
  static constexpr bool value = false;
};

template <>
struct IsBf16<Bf16> {
  static constexpr bool value = true;
};

ACS_HD float to_float(float x) { return x; }

ACS_HD float to_float(Bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

ACS_HD float to_float(Fp16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) {  // subnormal: magnitude 2^-24
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  return bits_float(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

// Rounded to nearest, ties to even.
template <class T>
ACS_HD T from_float(float x);

template <>
ACS_HD float from_float<float>(float x) {
  return x;
}

template <>
ACS_HD Bf16 from_float<Bf16>(float x) {
#if defined(__CUDA_ARCH__)
  Bf16 value;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
ACS_HD Fp16 from_float<Fp16>(float x) {
#if defined(__CUDA_ARCH__)
  Fp16 value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7fffu)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(rintf(bits_float(magnitude) * 16777216.0f)))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

// Two numbers in one register, the first in the low half.
template <class T>
ACS_HD uint32_t pack(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t value;
  if (IsBf16<T>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(value) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(value) : "f"(second), "f"(first));
  }
  return value;
#else
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
#endif
}

template <class T>
ACS_HD void unpack(uint32_t pair, float* first, float* second) {
  *first = to_float(T{static_cast<uint16_t>(pair & 0xffffu)});
  *second = to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// Four consecutive numbers; the address is a multiple of 8 bytes.
template <class T>
ACS_HD void load4(const T* at, float value[4]) {
  const uint2 pairs = *reinterpret_cast<const uint2*>(at);
  unpack<T>(pairs.x, value, value + 1);
  unpack<T>(pairs.y, value + 2, value + 3);
}

template <class T>
ACS_HD void store4(T* at, const float value[4]) {
  *reinterpret_cast<uint2*>(at) = make_uint2(pack<T>(value[0], value[1]), pack<T>(value[2], value[3]));
}

ACS_HD float load(const void* tensor, int dtype, int64_t i) {
  if (dtype == ACS_FLOAT32) return static_cast<const float*>(tensor)[i];
  return dtype == ACS_BFLOAT16 ? to_float(static_cast<const Bf16*>(tensor)[i])
                               : to_float(static_cast<const Fp16*>(tensor)[i]);
}

ACS_HD void store(void* tensor, int dtype, int64_t i, float value) {
  if (dtype == ACS_FLOAT32) {
    static_cast<float*>(tensor)[i] = value;
  } else if (dtype == ACS_BFLOAT16) {
    static_cast<Bf16*>(tensor)[i] = from_float<Bf16>(value);
  } else {
    static_cast<Fp16*>(tensor)[i] = from_float<Fp16>(value);
  }
}

// Up to four consecutive elements from i on; in one access where `vector` says that they are aligned to it.
ACS_HD void load_group(const void* tensor, int dtype, int64_t i, int count, bool vector, float value[4]) {
  if (!vector) {
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k < count) value[k] = load(tensor, dtype, i + k);
    }
  } else if (dtype == ACS_FLOAT32) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(tensor) + i);
    value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
  } else if (dtype == ACS_BFLOAT16) {
    load4(static_cast<const Bf16*>(tensor) + i, value);
  } else {
    load4(static_cast<const Fp16*>(tensor) + i, value);
  }
}

ACS_HD void store_group(void* tensor, int dtype, int64_t i, int count, bool vector, const float value[4]) {
  if (!vector) {
    ACS_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k < count) store(tensor, dtype, i + k, value[k]);
    }
  } else if (dtype == ACS_FLOAT32) {
    *reinterpret_cast<float4*>(static_cast<float*>(tensor) + i) =
        make_float4(value[0], value[1], value[2], value[3]);
  } else if (dtype == ACS_BFLOAT16) {
    store4(static_cast<Bf16*>(tensor) + i, value);
  } else {
    store4(static_cast<Fp16*>(tensor) + i, value);
  }
}
