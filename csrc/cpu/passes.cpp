// SPDX-License-Identifier: Apache-2.0
// The CPU loops over element.h, for every rule and storage. CMake builds this file once for each
// instruction set, with PYUPDATE_ISA naming it; the compiler vectorises, so there are no intrinsics
// but those that convert fp16, which g++ 12 knows no vectors for.
#include "passes.h"

#include <algorithm>
#include <type_traits>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../element.h"
#include "../reduce.h"
#include "../rounding.h"
#include "rules_generated.h"

#define PYUPDATE_STRING_(x) #x
#define PYUPDATE_STRING(x) PYUPDATE_STRING_(x)

namespace pyupdate {
inline namespace PYUPDATE_ISA {
namespace {

using cpu::Block;
using cpu::Kernel;
using cpu::RuleInfo;
using cpu::StorageInfo;

static_assert(Storages::size == cpu::kStorages);

// Whether a lane takes what a stage leaves for it by something else than adding: the reduce pass of
// the inf norm keeps the largest.
template <class Stage>
constexpr bool kJoins = requires { Stage::template join<float>(0.0f, 0.0f); };

template <class Stage, class T>
PYUPDATE_HD T joined(T lane, T left) {
  if constexpr (kJoins<Stage>) {
    return Stage::template join<T>(lane, left);
  } else {
    return lane + left;
  }
}

// No two roles of a block overlap (the front end has seen to that), so iterations are independent.
template <class Stage, class Storage>
void run(const Block& block) {
  using T = typename Storage::Compute;
  const Roles<Storage> at = Roles<Storage>::of(block.role);
  const Taken<T> taken{static_cast<T>(block.multiplier), static_cast<T>(block.clip_value)};
  const Place place{block.seed, block.step, block.element};
  T hyper[Stage::kHypers + 1], per_tensor[Stage::kPerTensorRead + 1], sum_out[Stage::kSums + 1];
  for (int k = 0; k < Stage::kHypers; ++k) hyper[k] = static_cast<T>(block.hyper[k]);
  for (int k = 0; k < Stage::kPerTensorRead; ++k) {
    per_tensor[k] = static_cast<T>(block.per_tensor[k]);
  }
  if constexpr (Stage::kSums == 0) {
#pragma GCC ivdep
    for (int64_t i = 0; i < block.count; ++i) {
      element<Stage, Storage>(at, i, taken, hyper, per_tensor, sum_out, place);
    }
  } else {
    T* lanes = static_cast<T*>(block.lanes);
    constexpr unsigned roles = Stage::kReads | Stage::kWrites;
    constexpr bool kOneRole = (roles & (roles - 1)) == 0;
    int64_t start = 0;
    // All turns of a lane at once: eight streams instead of one, where a stage reads one role. With
    // several they are 8 KiB apart, so they evict each other from the first cache. Not where lanes
    // are joined: g++ 12 threads its way through eight comparisons in a row instead of using
    // vectors, five times slower.
    if (kOneRole && !kJoins<Stage> && block.count == kChunk) {
#pragma GCC ivdep
      for (int64_t i = 0; i < kLanes; ++i) {
        T total[Stage::kSums];
        each<Stage::kSums>([&](int k) { total[k] = lanes[k * kLanes + i]; });
#pragma GCC unroll 8
        for (int64_t turn = 0; turn < kChunk / kLanes; ++turn) {
          element<Stage, Storage>(at, turn * kLanes + i, taken, hyper, per_tensor, sum_out, place);
          each<Stage::kSums>([&](int k) { total[k] = joined<Stage>(total[k], sum_out[k]); });
        }
        each<Stage::kSums>([&](int k) { lanes[k * kLanes + i] = total[k]; });
      }
      start = kChunk;
    }
    for (; start < block.count; start += kLanes) {
      const int64_t n = block.count - start < kLanes ? block.count - start : kLanes;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        element<Stage, Storage>(at, start + i, taken, hyper, per_tensor, sum_out, place);
        each<Stage::kSums>([&](int k) {
          lanes[k * kLanes + i] = joined<Stage>(lanes[k * kLanes + i], sum_out[k]);
        });
      }
    }
  }
}

// ----- halves, a run of them at a time

template <class Half>
void widen(const Half* half, float* wide, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) wide[i] = load(half[i]);
}

#ifdef __F16C__
constexpr bool kConverts = true;
#ifdef __AVX512F__
// The forms without a mask warn in g++ 12's own header, of what it leaves undefined on purpose.
constexpr __mmask16 kAll = 0xffff;
#endif

void widen(const fp16* half, float* wide, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= n; i += 16) {
    const auto packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + i));
    _mm512_storeu_ps(wide + i, _mm512_maskz_cvtph_ps(kAll, packed));
  }
#else
  for (; i + 8 <= n; i += 8) {
    const auto packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
    _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(packed));
  }
#endif
  for (; i < n; ++i) wide[i] = load(half[i]);
}

void narrow(const float* wide, fp16* half, int64_t n) {
  constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= n; i += 16) {
    const auto packed = _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(wide + i), kToNearest);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i), packed);
  }
#else
  for (; i + 8 <= n; i += 8) {
    const auto packed = _mm256_cvtps_ph(_mm256_loadu_ps(wide + i), kToNearest);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), packed);
  }
#endif
  for (; i < n; ++i) store(wide[i], half + i);
}

// By integers, as types.h does it, fp16 costs more than the rest of AdamW twice over: so it is
// converted by the processor's instructions, in pieces that stay in the first cache, and stepped as
// fp32 there. The bits are the same.
template <class Stage, class Storage>
void run_converted(const Block& block) {
  constexpr int64_t kPiece = 512;
  static_assert(kLanes % kPiece == 0);
  constexpr bool kHalfState = std::is_same_v<typename Storage::State, fp16>;
  constexpr auto is_half = [](int role) { return role < kFirstState || kHalfState; };
  alignas(64) float wide[Stage::kElements][kPiece];
  Block piece = block;
  for (int64_t start = 0; start < block.count; start += kPiece) {
    piece.count = std::min(kPiece, block.count - start);
    piece.element = block.element + start;
    if constexpr (Stage::kSums > 0) piece.lanes = static_cast<float*>(block.lanes) + start % kLanes;
    each<Stage::kElements>([&](int role) {
      if (((Stage::kReads | Stage::kWrites) >> role & 1u) == 0) return;
      if (!is_half(role)) {
        piece.role[role] = static_cast<float*>(block.role[role]) + start;
        return;
      }
      piece.role[role] = wide[role];
      if ((Stage::kReads >> role & 1u) == 0) return;
      widen(static_cast<const fp16*>(block.role[role]) + start, wide[role], piece.count);
    });
    run<Stage, pyupdate::Storage<fp32, fp32, fp32, float>>(piece);
    each<Stage::kElements>([&](int role) {
      if ((Stage::kWrites >> role & 1u) == 0 || !is_half(role)) return;
      narrow(wide[role], static_cast<fp16*>(block.role[role]) + start, piece.count);
    });
  }
}
#else
constexpr bool kConverts = false;
template <class Stage, class Storage>
void run_converted(const Block& block);
#endif

template <class Stage, class Storage>
constexpr Kernel kernel() {
  constexpr bool converts = kConverts && std::is_same_v<typename Storage::Param, fp16>;
  void (*loop)(const Block&) = nullptr;
  if constexpr (converts) {
    loop = run_converted<Stage, Storage>;
  } else {
    loop = run<Stage, Storage>;
  }
  return {loop, Stage::kReads, Stage::kWrites, Stage::kSums, Stage::kFirstSum};
}

// ----- the tables: every rule x stage x storage, expanded here and nowhere else

template <class T>
void clear(void* lanes, int64_t n) {
  for (int64_t i = 0; i < n; ++i) static_cast<T*>(lanes)[i] = T(0);
}

template <class T>
double sum(const void* lanes, int64_t n) {
  return sum_of_lanes(static_cast<const T*>(lanes), n);
}

template <class T>
double largest(const void* lanes, int64_t n) {
  return join_lanes(static_cast<const T*>(lanes), n, text::larger<double>);
}

template <class Half>
void widen_any(const void* half, float* wide, int64_t n) {
  widen(static_cast<const Half*>(half), wide, n);
}

// The elements lie in one block of kLanes, so the upper half of their indices is the same.
template <class Half>
void round(const float* wide, void* half, int64_t n, uint64_t key, int64_t element) {
  Half* to = static_cast<Half*>(half);
  const auto low = static_cast<uint32_t>(element);
  const auto high = static_cast<uint32_t>(element >> 32);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    store(wide[i], to + i, draw(key, low + static_cast<uint32_t>(i), high));
  }
}

template <class... S>
constexpr int index_of_fp32(List<S...>) {
  constexpr bool is_fp32[] = {std::is_same_v<S, Storage<fp32, fp32, fp32, float>>...};
  int index = 0;
  while (!is_fp32[index]) ++index;
  return index;
}

constexpr const char* name_of(fp64) { return "float64"; }
constexpr const char* name_of(fp32) { return "float32"; }
constexpr const char* name_of(bf16) { return "bfloat16"; }
constexpr const char* name_of(fp16) { return "float16"; }

template <class S>
void average(const void* param, void* average, int64_t n, double weight) {
  using T = typename S::Compute;
  const auto* from = static_cast<const typename S::Param*>(param);
  auto* to = static_cast<T*>(average);
  const T narrowed = static_cast<T>(weight);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = text::averaged<T>(to[i], load(from[i]), narrowed);
}

template <class S>
constexpr StorageInfo storage_info() {
  using T = typename S::Compute;
  constexpr int64_t param = sizeof(typename S::Param), grad = sizeof(typename S::Grad);
  constexpr int64_t state = sizeof(typename S::State);
  using P = typename S::Param;
  StorageInfo info{name_of(P{}),
                   {param, grad, state, state, state, state, state},
                   int64_t{sizeof(T)},
                   clear<T>,
                   sum<T>,
                   largest<T>,
                   average<S>,
                   kernel<squared_stage, S>(),
                   kernel<magnitude_stage, S>(),
                   kernel<nonfinite_stage, S>(),
                   -1,
                   nullptr,
                   nullptr};
  if constexpr (sizeof(P) == 2) {
    info.fp32 = index_of_fp32(Storages{});
    info.widen = widen_any<P>;
    info.round = round<P>;
  }
  return info;
}

template <class... S>
struct StorageTable {
  static constexpr StorageInfo rows[] = {storage_info<S>()...};
};
template <class... S>
constexpr const StorageInfo* storage_table(List<S...>) {
  return StorageTable<S...>::rows;
}

template <class Stage, class... S>
constexpr void add_stage(RuleInfo& info, int stage, List<S...>) {
  int storage = 0;
  ((info.kernels[stage][storage++] = kernel<Stage, S>()), ...);
  info.turns[stage] = Stage::kTurns ? Stage::turn : nullptr;
}

template <class Rule, class... Stage>
constexpr RuleInfo rule_info(List<Stage...>) {
  static_assert(Rule::kStates <= kMaxStates && Rule::kScalars <= kMaxScalars);
  static_assert(sizeof...(Stage) <= kMaxStages && Rule::kPerTensor <= kMaxPerTensor);
  static_assert(((Stage::kSums <= kMaxSums) && ...));
  RuleInfo info{Rule::kName,
                Rule::kDigest,
                Rule::kStates,
                Rule::kScalars,
                Rule::kCounted,
                Rule::kNumbers,
                Rule::kHypers,
                Rule::kPerTensor,
                sizeof...(Stage),
                Rule::prepare,
                {},
                {}};
  int stage = 0;
  (add_stage<Stage>(info, stage++, Storages{}), ...);
  return info;
}

template <class... Rule>
struct RuleTable {
  static constexpr RuleInfo rows[] = {rule_info<Rule>(typename Rule::Stages{})...};
};
template <class... Rule>
constexpr const RuleInfo* rule_table(List<Rule...>) {
  return RuleTable<Rule...>::rows;
}

double tree(double* x, int64_t n) { return halving_tree(x, n); }

double largest_of(double* x, int64_t n) { return halve(x, n, text::larger<double>); }

double multiplier_of(double norm, double unscale, double max_norm) {
  return text::multiplier<double>(norm, unscale, max_norm);
}

}  // namespace

extern const cpu::Passes passes;
const cpu::Passes passes = {PYUPDATE_STRING(PYUPDATE_ISA),
                            Rules::size,
                            rule_table(Rules{}),
                            storage_table(Storages{}),
                            tree,
                            largest_of,
                            multiplier_of};

}  // namespace PYUPDATE_ISA
}  // namespace pyupdate
