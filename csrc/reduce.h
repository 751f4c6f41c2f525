// SPDX-License-Identifier: Apache-2.0
// The one order in which anything is added up. Host and device.
//
//   element i of a chunk goes to lane i mod kLanes, by index, never by address
//   a lane adds its elements in the compute type, in order
//   lanes, then chunks of a row, then rows are added in fp64 by a halving tree
//
// The inf norm keeps the largest where the 2-norm adds: nothing is rounded, and a nan wins.
//
// So a sum does not depend on threads, instruction set, alignment or device. It does depend on how
// the parameters are split and ordered.
#pragma once
#include "plan.h"
#include "types.h"

namespace pyupdate {
inline namespace PYUPDATE_ISA {

constexpr int64_t kLanes = 2048;  // 256 threads x 8 elements of 16 bytes
static_assert(kChunk % kLanes == 0);

// The smallest power of two that is not below n (n >= 1).
PYUPDATE_HD int64_t tree_width(int64_t n) {
  int64_t width = 1;
  while (width < n) width *= 2;
  return width;
}

// Joins x[0..n) by a halving tree over the next power of two, absent values being +0; n >= 0.
// Overwrites x and returns what is left.
template <class T, class Join>
PYUPDATE_HD T halve(T* x, int64_t n, Join join) {
  if (n == 0) return T(0);
  for (int64_t half = tree_width(n) / 2; half > 0; half /= 2) {
#pragma GCC ivdep
    for (int64_t i = 0; i + half < n; ++i) x[i] = join(x[i], x[i + half]);
    n = half < n ? half : n;
  }
  return x[0];
}

// The sum of x[0..n), by the tree.
PYUPDATE_HD double halving_tree(double* x, int64_t n) {
  return halve(x, n, [](double a, double b) { return a + b; });
}

// The lanes of a chunk of `count` elements in one; lanes from `count` on were never touched.
template <class T, class Join>
PYUPDATE_HD double join_lanes(const T* lanes, int64_t count, Join join) {
  double tree[kLanes];
  const int64_t n = count < kLanes ? count : kLanes;
  for (int64_t i = 0; i < n; ++i) tree[i] = static_cast<double>(lanes[i]);
  return halve(tree, n, join);
}

template <class T>
PYUPDATE_HD double sum_of_lanes(const T* lanes, int64_t count) {
  return join_lanes(lanes, count, [](double a, double b) { return a + b; });
}

}  // namespace PYUPDATE_ISA
}  // namespace pyupdate
