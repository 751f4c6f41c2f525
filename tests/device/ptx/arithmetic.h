// SPDX-License-Identifier: Apache-2.0
// The arithmetic of PTX where C++ has no operator for it, after the PTX ISA of CUDA 13.
#pragma once
#include "machine.h"

namespace ptx {

// ----- bits and values

template <class T>
struct Word;
template <>
struct Word<f32> {
  using type = u32;
};
template <>
struct Word<f64> {
  using type = u64;
};

template <class T>
inline T as(u64 raw) {
  if constexpr (requires { typename Word<T>::type; }) {
    return __builtin_bit_cast(T, static_cast<typename Word<T>::type>(raw));
  } else {
    return static_cast<T>(raw);
  }
}

inline u32 bits(f32 value) { return __builtin_bit_cast(u32, value); }
inline u64 bits(f64 value) { return __builtin_bit_cast(u64, value); }
inline u64 pair(u32 low, u32 high) { return u64{high} << 32 | low; }
inline u32 pair16(u16 low, u16 high) { return u32{high} << 16 | low; }

// ----- the half formats: computed in fp32, which rounds twice harmlessly for + - * (PTX's own
// fma of halves would not be, and is refused)

constexpr u16 kHalfNan = 0x7fff;

inline f32 widen_bf16(u16 x) { return __builtin_bit_cast(f32, u32{x} << 16); }
inline f32 widen_f16(u16 x) { return static_cast<f32>(__builtin_bit_cast(_Float16, x)); }

inline u16 round_bf16(f32 value) {
  if (value != value) return kHalfNan;
  const u32 x = bits(value);
  return static_cast<u16>((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

inline u16 round_f16(f32 value) {
  if (value != value) return kHalfNan;
  return __builtin_bit_cast(u16, static_cast<_Float16>(value));
}

// ----- floating point

inline f32 root(f32 x) { return __builtin_sqrtf(x); }
inline f64 root(f64 x) { return __builtin_sqrt(x); }
inline f32 fused(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
inline f64 fused(f64 a, f64 b, f64 c) { return __builtin_fma(a, b, c); }
inline f32 nearest(f32 x) { return __builtin_nearbyintf(x); }
inline f64 nearest(f64 x) { return __builtin_nearbyint(x); }

// A number wins over a nan, and -0 is below +0; with `nan_wins` a nan wins.
template <class T>
inline T least(T a, T b, bool nan_wins) {
  if (a != a) return nan_wins ? a : b;
  if (b != b) return nan_wins ? b : a;
  if (a == b) return __builtin_signbit(a) ? a : b;
  return a < b ? a : b;
}

template <class T>
inline T greatest(T a, T b, bool nan_wins) {
  if (a != a) return nan_wins ? a : b;
  if (b != b) return nan_wins ? b : a;
  if (a == b) return __builtin_signbit(a) ? b : a;
  return a > b ? a : b;
}

// An integral value as an integer of To: out of range goes to the nearest end, nan to 0.
template <class To, class From>
inline To clamped(From value) {
  constexpr int kBits = sizeof(To) * 8;
  constexpr bool kSigned = To(-1) < To(0);
  constexpr To kMost = kSigned ? To(~(u64{1} << (kBits - 1)) & (~u64{0} >> (64 - kBits))) : To(-1);
  constexpr To kLeast = kSigned ? To(~kMost) : To(0);
  // 2^(bits of the magnitude): the first value that is too large, exact in any format.
  const From beyond = static_cast<From>(__builtin_ldexp(1.0, kSigned ? kBits - 1 : kBits));
  if (value != value) return 0;
  if (value >= beyond) return kMost;
  if (value <= (kSigned ? -beyond : From(0))) return kLeast;
  return static_cast<To>(value);
}

// ----- integers

template <class T>
inline T quotient(Thread& self, T a, T b, u32 line) {
  if (b == 0) {
    fault(self, kDivision, line);
    return T(-1);
  }
  return T(b) == T(-1) && T(-1) < T(0) ? static_cast<T>(u64{0} - static_cast<u64>(a)) : a / b;
}

template <class T>
inline T remainder(Thread& self, T a, T b, u32 line) {
  if (b == 0) {
    fault(self, kDivision, line);
    return T(-1);
  }
  return T(b) == T(-1) && T(-1) < T(0) ? T(0) : a % b;
}

// Shifts by the width or more give 0, or the sign; C++ says nothing of them.
template <class T>
inline T shifted_left(T a, u32 by) {
  return by >= sizeof(T) * 8 ? T(0) : static_cast<T>(static_cast<u64>(a) << by);
}

template <class T>
inline T shifted_right(T a, u32 by) {
  return by >= sizeof(T) * 8 ? (a < 0 ? T(-1) : T(0)) : static_cast<T>(a >> by);
}

// The upper (left) or lower word of high:low, shifted by 0 to 32.
inline u32 funnel_left(u32 low, u32 high, u32 by) {
  return static_cast<u32>((pair(low, high) << by) >> 32);
}
inline u32 funnel_right(u32 low, u32 high, u32 by) {
  return static_cast<u32>(by == 32 ? high : pair(low, high) >> by);
}

// Any function of three bits: `table` has its value for a = 1 in the upper half, and so on.
inline u32 logic3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 k = 0; k < 8; ++k) {
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return result;
}

// Each nibble of `selector` names a byte of b:a; its top bit spreads that byte's sign.
inline u32 permuted(u32 a, u32 b, u32 selector) {
  u32 result = 0;
  for (u32 k = 0; k < 4; ++k) {
    const u32 nibble = selector >> (4 * k) & 15;
    u32 byte = pair(a, b) >> (8 * (nibble & 7)) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * k);
  }
  return result;
}

inline u32 reversed(u32 x) {
  u32 result = 0;
  for (u32 k = 0; k < 32; ++k) result |= (x >> k & 1) << (31 - k);
  return result;
}

// `count` bits from `from`; a signed field repeats its top bit, which past the end is that of a.
template <class T>
inline T field(T a, u32 from, u32 count) {
  constexpr u32 kBits = sizeof(T) * 8;
  constexpr bool kSigned = T(-1) < T(0);
  from &= 0xff;
  count &= 0xff;
  if (count == 0) return 0;
  const u32 top = from + count - 1 < kBits - 1 ? from + count - 1 : kBits - 1;
  const u64 sign = kSigned ? static_cast<u64>(a) >> top & 1 : 0;
  u64 result = 0;
  for (u32 k = 0; k < kBits; ++k) {
    const u64 bit = k < count && from + k < kBits ? static_cast<u64>(a) >> (from + k) & 1 : sign;
    result |= bit << k;
  }
  return static_cast<T>(result);
}

// `into` with `count` bits from `from` on replaced by those of a.
template <class T>
inline T with_field(T a, T into, u32 from, u32 count) {
  constexpr u32 kBits = sizeof(T) * 8;
  from &= 0xff;
  count &= 0xff;
  u64 result = into;
  for (u32 k = 0; k < count && from + k < kBits; ++k) {
    const u64 at = u64{1} << (from + k);
    result = (static_cast<u64>(a) >> k & 1) ? result | at : result & ~at;
  }
  return static_cast<T>(result);
}

}  // namespace ptx
