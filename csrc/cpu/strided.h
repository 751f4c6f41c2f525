// SPDX-License-Identifier: Apache-2.0
// Strided memory to flat scratch and back: how a row of any layout goes through the one kernel.
#pragma once
#include <cstring>

#include "../plan.h"
#include "passes.h"

namespace pyupdate::cpu {

// Walks `block`'s elements of one role in index order, the last dimension fastest.
template <bool kGather>
inline void copy_strided(const Block& block, int64_t role, int64_t itemsize, int64_t address,
                         const int64_t* layout) {
  const int64_t dims = layout[Layout::kDims];
  const int64_t* sizes = layout + Layout::kSizes;
  const int64_t* strides = sizes + dims * (1 + role);
  int64_t index[64];
  int64_t rest = block.element;
  for (int64_t d = dims - 1; d >= 0; --d) {
    index[d] = rest % sizes[d];
    rest /= sizes[d];
    address += index[d] * strides[d];
  }
  char* flat = static_cast<char*>(block.role[role]);
  for (int64_t i = 0; i < block.count; ++i, flat += itemsize) {
    char* place = reinterpret_cast<char*>(address);
    std::memcpy(kGather ? flat : place, kGather ? place : flat, static_cast<size_t>(itemsize));
    for (int64_t d = dims - 1; d >= 0; --d) {
      address += strides[d];
      if (++index[d] < sizes[d]) break;
      address -= sizes[d] * strides[d];
      index[d] = 0;
    }
  }
}

}  // namespace pyupdate::cpu
