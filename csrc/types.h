// SPDX-License-Identifier: Apache-2.0
// Storage types and what is computed in: fp64 in fp64; fp32, bf16 and fp16 in fp32.
//
// A load is exact. A store rounds once, to nearest even, with subnormals kept. The half formats are
// converted by integer arithmetic: g++ 12 vectorises that, and does not vectorise _Float16 (where
// an x86 processor has instructions for fp16, cpu/passes.cpp uses them around the loop of fp32). A
// GPU has instructions that give the same bits: by integers AdamW of fp16 spilled 84 bytes (sm_80).
// A nan stays a nan; its sign and payload are not promised.
#pragma once
#include <stdint.h>

// Everything that is generic lives in an inline namespace of the instruction set it is built for:
// the linker must never take the AVX-512 copy of an inline function for all of them.
#ifndef PYUPDATE_ISA
#define PYUPDATE_ISA plain
#endif

#ifdef __CUDACC__
#define PYUPDATE_HD __host__ __device__ __forceinline__
#else
#define PYUPDATE_HD inline __attribute__((always_inline))
#endif

namespace pyupdate {
inline namespace PYUPDATE_ISA {

using fp64 = double;
using fp32 = float;
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class To, class From>
PYUPDATE_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, value);
}

// f(0), ..., f(N - 1) without a loop: g++ 12 gives up a loop that holds two loops, even of one turn
// each (LARS's first stage ran without vectors, at a third of its speed).
template <int N, int k = 0, class F>
PYUPDATE_HD void each(const F& f) {
  if constexpr (k < N) {
    f(k);
    each<N, k + 1>(f);
  }
}

// ----- the primitives of the rule language (kernels/language.py)

PYUPDATE_HD float divide(float a, float b) { return a / b; }
PYUPDATE_HD double divide(double a, double b) { return a / b; }
#ifdef __CUDA_ARCH__
PYUPDATE_HD float sqrt(float x) { return __fsqrt_rn(x); }
PYUPDATE_HD double sqrt(double x) { return __dsqrt_rn(x); }
#else
PYUPDATE_HD float sqrt(float x) { return __builtin_sqrtf(x); }
PYUPDATE_HD double sqrt(double x) { return __builtin_sqrt(x); }
#endif

// ----- load and store

PYUPDATE_HD double load(fp64 stored) { return stored; }
PYUPDATE_HD float load(fp32 stored) { return stored; }
PYUPDATE_HD float load(bf16 stored) { return bit_cast<float>(uint32_t{stored.bits} << 16); }

// fp16 has 5 exponent bits biased by 15, fp32 8 biased by 127. Shifted into place the value is
// 2^-112 of what is meant, subnormals included, and the multiplication by 2^112 is exact.
PYUPDATE_HD float load(fp16 stored) {
#ifdef __CUDA_ARCH__
  float exact;
  asm("cvt.f32.f16 %0, %1;" : "=f"(exact) : "h"(stored.bits));
  return exact;
#else
  const auto extended = static_cast<uint32_t>(int32_t{static_cast<int16_t>(stored.bits)});
  const uint32_t placed = (extended << 13) & 0x8fffe000u;
  const float finite = bit_cast<float>(placed) * 0x1p112f;
  const float special = bit_cast<float>(placed | 0x7f800000u);
  return (placed & 0x7fffffffu) >= 0x0f800000u ? special : finite;
#endif
}

PYUPDATE_HD void store(double value, fp64* place) { *place = value; }
PYUPDATE_HD void store(float value, fp32* place) { *place = value; }

// Half of the last kept bit, less one where that bit is 0: the carry rounds to nearest even.
PYUPDATE_HD void store(float value, bf16* place) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(place->bits) : "f"(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  place->bits = uint16_t((value != value ? 0x7fc00000u : rounded) >> 16);
#endif
}

// Normal results round as bf16's do, 13 bits lower. Results below 2^-14 are rounded by adding 0.5,
// whose last place is worth 2^-24, fp16's smallest subnormal. From 65520 on the result is infinite.
PYUPDATE_HD void store(float value, fp16* place) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(place->bits) : "f"(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  place->bits = uint16_t(sign | (magnitude >= 0x477ff000u ? special : finite));
#endif
}

// ----- which storage each role of a rule has

template <class Param_, class Grad_, class State_, class Compute_>
struct Storage {
  using Param = Param_;
  using Grad = Grad_;
  using State = State_;
  using Compute = Compute_;
};

template <class... Types>
struct List {
  static constexpr int size = sizeof...(Types);
};

// The one list of storages that are built; plan.h's storage indices count along it. The halves may
// keep their state in fp32.
using Storages = List<Storage<fp64, fp64, fp64, double>, Storage<fp32, fp32, fp32, float>,
                      Storage<bf16, bf16, bf16, float>, Storage<fp16, fp16, fp16, float>,
                      Storage<bf16, bf16, fp32, float>, Storage<fp16, fp16, fp32, float>>;

}  // namespace PYUPDATE_ISA
}  // namespace pyupdate
