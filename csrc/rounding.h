// SPDX-License-Identifier: Apache-2.0
// Stochastic rounding of fp32 to bf16 and fp16; kernels/rounding.py is the same on arrays and says
// why it is so. Host and device; all integers are unsigned, so nothing overflows that may not.
#pragma once
#include "types.h"

namespace pyupdate {
inline namespace PYUPDATE_ISA {

// ----- what decides: a hash of (seed, step, parameter, stage, role), then of the element

PYUPDATE_HD uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

PYUPDATE_HD uint64_t key_of(int64_t seed, int64_t step, int64_t parameter, int stage, int role) {
  uint64_t key = mixed(static_cast<uint64_t>(seed));
  key = mixed(key ^ static_cast<uint64_t>(step));
  key = mixed(key ^ static_cast<uint64_t>(parameter));
  return mixed(key ^ static_cast<uint64_t>(stage << 8 | role));
}

PYUPDATE_HD uint32_t scrambled(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// `low` and `high` are those of the element's index in the order of the parameter's memory.
PYUPDATE_HD uint32_t draw(uint64_t key, uint32_t low, uint32_t high) {
  const uint32_t first = scrambled(low ^ static_cast<uint32_t>(key));
  return scrambled((first + high * 0x9e3779b9u) ^ static_cast<uint32_t>(key >> 32));
}

// ----- store

PYUPDATE_HD void store(float value, bf16* place, uint32_t drawn) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t nearest = 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t rounded = (bits + (magnitude > 0x7f7f0000u ? nearest : drawn >> 16)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  place->bits = uint16_t(magnitude > 0x7f800000u ? nan : rounded);
}

PYUPDATE_HD void store(float value, fp16* place, uint32_t drawn) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Between the largest finite value and the middle above it, to nearest is down.
  const uint32_t moved = magnitude + (drawn >> 19);
  const uint32_t normal = ((moved < 0x477fffffu ? moved : 0x477fffffu) - 0x38000000u) >> 13;
  // 0.5 has its last place at 2^-24, fp16's smallest subnormal: the nearest multiple of that, then
  // the one below, and what is left over of it in 2^-31. All of it is exact. (By a conversion to
  // integers and back, g++ 12 does not vectorise.)
  const float small = bit_cast<float>(magnitude < 0x387fffffu ? magnitude : 0x387fffffu);
  const float nearest = small + 0.5f;
  const float beyond = small - (nearest - 0.5f);
  const uint32_t is_above = beyond < 0.0f ? 1u : 0u;
  const float left = (beyond < 0.0f ? beyond + 0x1p-24f : beyond) * 0x1p55f;
  const uint32_t is_up = static_cast<int32_t>(drawn >> 1) < static_cast<int32_t>(left) ? 1u : 0u;
  const uint32_t subnormal = bit_cast<uint32_t>(nearest) - 0x3f000000u - is_above + is_up;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  place->bits = uint16_t(sign | (magnitude >= 0x477ff000u ? special : finite));
}

}  // namespace PYUPDATE_ISA
}  // namespace pyupdate
