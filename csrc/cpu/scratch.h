// SPDX-License-Identifier: Apache-2.0
// Blocks that no kernel can take where they are: strided, or halves that are rounded by chance.
// They are gathered and widened into scratch, run there by a kernel, rounded and scattered back.
#pragma once
#include <algorithm>
#include <cstring>

#include "../reduce.h"
#include "passes.h"

namespace pyupdate::cpu {

// kLanes elements of each role: the widest type, or fp32 and a half behind it.
struct Scratch {
  static constexpr int64_t kBehind = kLanes * sizeof(float);
  alignas(64) char role[kMaxRoles][kLanes * sizeof(double)];
};

// Where one row's roles are, and what is done beside the kernel.
struct RowPlace {
  int64_t width;             // roles
  const int64_t* address;    // of each, at the first element of the row
  const int64_t* itemsize;   // of each
  const int64_t* layout;     // of plan.h, null for a flat row
  const uint64_t* keys;      // of each if halves are rounded by chance, else null
  const double* ema_weight;  // null where no average is moved; else the last role is one
};

// Walks `block`'s elements of one role in index order, the last dimension fastest.
template <bool kGather>
void copy_strided(const Block& block, const RowPlace& place, int64_t role, int64_t itemsize,
                  char* flat) {
  const int64_t dims = place.layout[Layout::kDims];
  const int64_t* sizes = place.layout + Layout::kSizes;
  const int64_t* strides = sizes + dims * (1 + role);
  int64_t address = place.address[role];
  int64_t index[64];
  int64_t rest = block.element;
  for (int64_t d = dims - 1; d >= 0; --d) {
    index[d] = rest % sizes[d];
    rest /= sizes[d];
    address += index[d] * strides[d];
  }
  for (int64_t i = 0; i < block.count; ++i, flat += itemsize) {
    char* at = reinterpret_cast<char*>(address);
    std::memcpy(kGather ? flat : at, kGather ? at : flat, static_cast<size_t>(itemsize));
    for (int64_t d = dims - 1; d >= 0; --d) {
      address += strides[d];
      if (++index[d] < sizes[d]) break;
      address -= sizes[d] * strides[d];
      index[d] = 0;
    }
  }
}

// With keys, `kernel` is that of the fp32 storage; `storage` is the row's in any case.
inline void run_in_scratch(const Kernel& kernel, const StorageInfo& storage, Block block,
                           const RowPlace& place, Scratch& scratch) {
  const int64_t end = block.element + block.count;
  const bool averages = place.ema_weight != nullptr;
  const int64_t last = place.width - 1;
  const unsigned average = averages ? 1u << last : 0u;
  const unsigned reads = kernel.reads | average | (averages ? 1u << kParam : 0u);
  const unsigned writes = kernel.writes | average;
  char* stored[kMaxRoles];
  const auto is_half = [&](int64_t role) {
    return place.keys != nullptr && place.itemsize[role] == 2;
  };
  for (int64_t begin = block.element; begin < end; begin += kLanes) {
    block.element = begin;
    block.count = std::min(kLanes, end - begin);
    for (int64_t role = 0; role < place.width; ++role) {
      const int64_t itemsize = place.itemsize[role];
      char* flat = scratch.role[role];
      stored[role] = place.layout == nullptr
                         ? reinterpret_cast<char*>(place.address[role] + begin * itemsize)
                         : flat + (is_half(role) ? Scratch::kBehind : 0);
      if ((reads >> role & 1u) != 0 && place.layout != nullptr) {
        copy_strided<true>(block, place, role, itemsize, stored[role]);
      }
      if ((kernel.reads >> role & 1u) != 0 && is_half(role)) {
        storage.widen(stored[role], reinterpret_cast<float*>(flat), block.count);
      }
      block.role[role] = is_half(role) ? flat : stored[role];
    }
    kernel.run(block);
    for (int64_t role = 0; role < place.width; ++role) {
      if ((kernel.writes >> role & 1u) == 0 || !is_half(role)) continue;
      storage.round(reinterpret_cast<const float*>(scratch.role[role]), stored[role], block.count,
                    place.keys[role], begin);
    }
    if (averages) storage.average(stored[kParam], stored[last], block.count, *place.ema_weight);
    for (int64_t role = 0; role < place.width && place.layout != nullptr; ++role) {
      if ((writes >> role & 1u) == 0) continue;
      copy_strided<false>(block, place, role, place.itemsize[role], stored[role]);
    }
  }
}

}  // namespace pyupdate::cpu
