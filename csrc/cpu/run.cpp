// SPDX-License-Identifier: Apache-2.0
// The parallel region of a CPU step: reduce pass, one multiplier, apply stages.
#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "../reduce.h"
#include "parallel.h"

namespace pyupdate::cpu {

namespace {

// Below this many elements another thread costs more than it brings: it has gone to sleep while the
// plan was refreshed, and waking it took 0.05 to 2 ms on a virtual machine, the time of 10^5 to
// 10^6 elements of AdamW.
constexpr int64_t kElementsPerThread = 1 << 18;
constexpr int64_t kItemElements = kChunk;

// Elements of a wave, if its rows are no longer: p, m and v of 2^19 elements of fp32 are 6 MiB,
// which the last cache of any processor in use holds. Measured on 48 x 1024 x 1024 against AdamW's
// step in the same run: LAMB 1.67x without waves, 1.39x with them; LARS 1.28x and 0.92x.
constexpr int64_t kWaveElements = 1 << 19;

int64_t chunks_of(int64_t size) { return std::max<int64_t>(1, (size + kChunk - 1) / kChunk); }

// Hands the items out: each thread takes those of its own share first, so that a thread touches the
// same memory step after step, then what is left of the others'.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// What a thread needs beside its stack frames.
struct Workspace {
  alignas(64) char lanes[kMaxSums * kLanes * sizeof(double)];
  alignas(64) char scratch[kMaxRoles][kLanes * sizeof(double)];
};

}  // namespace

// ----- tables ------------------------------------------------------------------------------------

void Tables::clear_rows() {
  rows.clear();
  addresses.clear();
  scalars.clear();
  layouts.clear();
}

void Tables::add_row(const Row& row, const int64_t* row_addresses, const int64_t* row_scalars) {
  rows.push_back(row);
  rows.back().chunk = rows.size() == 1 ? 0 : rows.end()[-2].chunk + chunks_of(rows.end()[-2].size);
  addresses.insert(addresses.end(), row_addresses, row_addresses + width_);
  scalars.insert(scalars.end(), row_scalars, row_scalars + scalars_);
}

void Tables::append(const Tables& other) {
  const auto hyper_rows_before = static_cast<int64_t>(hyper_rows.size());
  const auto hypers_before = static_cast<int64_t>(hypers.size());
  const auto layouts_before = static_cast<int64_t>(layouts.size());
  for (size_t i = 0; i < other.rows.size(); ++i) {
    Row row = other.rows[i];
    row.hyper += static_cast<int32_t>(hyper_rows_before);
    if (row.layout >= 0) row.layout += static_cast<int32_t>(layouts_before);
    add_row(row, &other.addresses[i * static_cast<size_t>(width_)],
            other.scalars.data() + i * static_cast<size_t>(scalars_));
  }
  for (HyperRow hyper : other.hyper_rows) {
    hyper.offset += hypers_before;
    hyper_rows.push_back(hyper);
  }
  hypers.insert(hypers.end(), other.hypers.begin(), other.hypers.end());
  layouts.insert(layouts.end(), other.layouts.begin(), other.layouts.end());
}

void Tables::cut() {
  items_.clear();
  waves_.clear();
  int64_t filled = 0;
  int64_t wave = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (waves_.empty() || wave + rows[r].size > kWaveElements) {
      waves_.push_back(static_cast<int64_t>(items_.size()));
      filled = kItemElements;  // a new item
      wave = 0;
    }
    wave += rows[r].size;
    for (int64_t chunk = 0; chunk < chunks_of(rows[r].size); ++chunk) {
      const int64_t count = std::min(kChunk, rows[r].size - chunk * kChunk);
      if (items_.empty() || filled + count > kItemElements) {  // the first row may be empty
        items_.push_back(static_cast<int64_t>(r) << 32 | chunk);
        filled = 0;
      }
      filled += std::max<int64_t>(count, 64);  // a tiny row costs more than its elements
    }
  }
}

int64_t Tables::chunks() const {
  return rows.empty() ? 0 : rows.back().chunk + chunks_of(rows.back().size);
}

int64_t Tables::elements() const {
  int64_t total = 0;
  for (const Row& row : rows) total += row.size;
  return total;
}

int64_t Tables::bytes() const {
  const auto of = [](const auto& v) { return static_cast<int64_t>(v.capacity() * sizeof(v[0])); };
  return of(rows) + of(addresses) + of(scalars) + of(hyper_rows) + of(hypers) + of(layouts) +
         of(items_) + of(waves_) + of(chunk_sums_) + of(row_sums_);
}

// ----- the region --------------------------------------------------------------------------------

class Region {
 public:
  Region(const Passes& passes, Tables& tables, const Request& request)
      : passes_(passes), tables_(tables), request_(request) {
    for (const HyperRow& hyper : tables.hyper_rows) {
      stages_ = std::max(stages_, passes.rules[hyper.rule].stages);
      per_tensor_ = std::max(per_tensor_, passes.rules[hyper.rule].per_tensor);
    }
    if (request.reduce || per_tensor_ > 0) {
      const int width = std::max(1, per_tensor_);
      tables.chunk_sums_.resize(static_cast<size_t>(tables.chunks() * width));
      tables.row_sums_.assign(tables.rows.size() * static_cast<size_t>(width), 0.0);
    }
    const int64_t wanted = tables.elements() / kElementsPerThread;
    threads_ = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max(1, request.threads)));
    const auto items = static_cast<int64_t>(tables.items_.size());
    if (stages_ > 1) waves_ = tables.waves_;
    if (waves_.empty()) waves_.push_back(0);
    waves_.push_back(items);
    sweeps_.push_back({0, items});
    for (size_t w = 0; request.apply && w + 1 < waves_.size(); ++w) {
      for (int stage = 0; stage < stages_; ++stage) sweeps_.push_back({waves_[w], waves_[w + 1]});
    }
    shares_ = std::make_unique<Share[]>(static_cast<size_t>(threads_) * sweeps_.size());
    outcome_.multiplier = request.multiplier;
  }

  Outcome run() {
    if (tables_.rows.empty() && !request_.reduce) return outcome_;
    parallel(threads_, [this](const Team& team) { work(team); });
    return outcome_;
  }

  const std::vector<double>& row_sums() const { return tables_.row_sums_; }

  // The reduce pass alone; leaves the rows' sums in row_sums().
  Outcome reduce() {
    parallel(threads_, [this](const Team& team) {
      Workspace workspace;
      set_shares(team);
      team.barrier();
      reduce_chunks(team, workspace);
    });
    for (size_t r = 0; r < tables_.rows.size(); ++r) add_chunks(r, 0, 1, tree());
    tables_.row_sums_.resize(tables_.rows.size());  // a rule of several sums had asked for more
    outcome_.nonfinite = nonfinite_;
    return outcome_;
  }

 private:
  void work(const Team& team) {
    Workspace workspace;
    set_shares(team);
    team.barrier();
    if (request_.reduce) {
      reduce_chunks(team, workspace);
      team.barrier();
      if (team.rank == 0) finish_reduce();
      team.barrier();
    }
    if (!request_.apply || outcome_.skipped) return;
    if (team.rank == 0 && request_.before_writing) request_.before_writing(request_.context);
    const size_t waves = waves_.size() - 1;
    for (size_t turn = 0; turn < waves; ++turn) {
      // Backwards after a reduce pass: what it read last is still in the cache.
      const size_t wave = request_.reduce ? waves - 1 - turn : turn;
      for (int stage = 0; stage < stages_; ++stage) {
        apply_chunks(team, workspace, wave, stage);
        if (stage + 1 == stages_) break;
        team.barrier();
        if (team.rank == 0) turn_rows(wave, stage);
        team.barrier();
      }
    }
  }

  void set_shares(const Team& team) {
    for (size_t sweep = 0; sweep < sweeps_.size(); ++sweep) {
      const auto [begin, end] = sweeps_[sweep];
      // A smaller team than asked for: the last rank takes the shares that nobody has.
      const int last = team.rank + 1 == team.size ? threads_ : team.rank + 1;
      for (int rank = team.rank; rank < last; ++rank) {
        Share& share = shares_[sweep * static_cast<size_t>(threads_) + static_cast<size_t>(rank)];
        share.next = begin + (end - begin) * rank / threads_;
        share.end = begin + (end - begin) * (rank + 1) / threads_;
      }
    }
  }

  template <class Visit>
  void sweep(const Team& team, size_t index, bool backwards, const Visit& visit) {
    const std::vector<int64_t>& items = tables_.items_;
    const auto last = static_cast<int64_t>(items.size()) - 1;
    const int64_t mirror = sweeps_[index].begin + sweeps_[index].end - 1;
    for (int turn = 0; turn < threads_; ++turn) {
      const auto rank = static_cast<size_t>((team.rank + turn) % threads_);
      Share& share = shares_[index * static_cast<size_t>(threads_) + rank];
      for (;;) {
        const int64_t taken = share.next.fetch_add(1, std::memory_order_relaxed);
        if (taken >= share.end) break;
        const int64_t item = backwards ? mirror - taken : taken;
        int64_t row = items[static_cast<size_t>(item)] >> 32;
        int64_t chunk = items[static_cast<size_t>(item)] & 0xffffffff;
        const int64_t end = item == last ? static_cast<int64_t>(tables_.rows.size()) << 32
                                         : items[static_cast<size_t>(item) + 1];
        while ((row << 32 | chunk) < end) {
          visit(static_cast<size_t>(row), chunk);
          if (++chunk == chunks_of(tables_.rows[static_cast<size_t>(row)].size)) ++row, chunk = 0;
        }
      }
    }
  }

  // ----- reduce

  void reduce_chunks(const Team& team, Workspace& workspace) {
    bool nonfinite = false;
    sweep(team, 0, false, [&](size_t r, int64_t chunk) {
      const Row& row = tables_.rows[r];
      const HyperRow& hyper = tables_.hyper_rows[static_cast<size_t>(row.hyper)];
      const StorageInfo& storage = passes_.storages[hyper.storage];
      const int64_t count = std::min(kChunk, row.size - chunk * kChunk);
      double* sum = &tables_.chunk_sums_[static_cast<size_t>(row.chunk + chunk)];
      const Kernel& kernel = request_.inf_norm ? storage.magnitude : storage.squared;
      run_chunk(kernel, storage, r, chunk, request_.unscale, workspace);
      *sum = (request_.inf_norm ? storage.largest : storage.sum)(workspace.lanes, count);
      if (!std::isfinite(*sum)) {  // an inf or nan, or finite squares that overflowed
        run_chunk(storage.nonfinite, storage, r, chunk, request_.unscale, workspace);
        nonfinite = nonfinite || storage.sum(workspace.lanes, count) != 0.0;
      }
    });
    if (nonfinite) nonfinite_.store(true, std::memory_order_relaxed);
  }

  void finish_reduce() {
    for (size_t r = 0; r < tables_.rows.size(); ++r) add_chunks(r, 0, 1, tree());
    const auto rows = static_cast<int64_t>(tables_.rows.size());
    const double total = tree()(tables_.row_sums_.data(), rows);
    outcome_.norm = request_.inf_norm ? total : std::sqrt(total);
    outcome_.nonfinite = nonfinite_;
    outcome_.skipped = (request_.skip_nonfinite && outcome_.nonfinite) ||
                       (request_.finite_norm && !std::isfinite(outcome_.norm));
    outcome_.multiplier = passes_.multiplier(outcome_.norm, request_.unscale, request_.max_norm);
  }

  // How the reduce pass makes one number of several.
  Passes::Tree tree() const { return request_.inf_norm ? passes_.largest : passes_.halving_tree; }

  // Joins the chunks of a row: the sum `index` of `stride` numbers that each row has.
  void add_chunks(size_t r, int index, int stride, Passes::Tree tree) {
    const Row& row = tables_.rows[r];
    double* chunks =
        &tables_.chunk_sums_[static_cast<size_t>(index * tables_.chunks() + row.chunk)];
    tables_.row_sums_[r * static_cast<size_t>(stride) + static_cast<size_t>(index)] =
        tree(chunks, chunks_of(row.size));
  }

  // ----- apply

  void apply_chunks(const Team& team, Workspace& workspace, size_t wave, int stage) {
    const size_t index = 1 + wave * static_cast<size_t>(stages_) + static_cast<size_t>(stage);
    sweep(team, index, request_.reduce && stage == 0, [&](size_t r, int64_t chunk) {
      const Row& row = tables_.rows[r];
      const HyperRow& hyper = tables_.hyper_rows[static_cast<size_t>(row.hyper)];
      const RuleInfo& rule = passes_.rules[hyper.rule];
      if (stage >= rule.stages) return;
      const Kernel& kernel = rule.kernels[stage][hyper.storage];
      const StorageInfo& storage = passes_.storages[hyper.storage];
      const bool averages = tables_.averages_ && stage + 1 == rule.stages;
      run_chunk(kernel, storage, r, chunk, outcome_.multiplier * hyper.sign, workspace, averages);
      const int64_t count = std::min(kChunk, row.size - chunk * kChunk);
      for (int k = 0; k < kernel.sums; ++k) {
        const auto at = (kernel.first_sum + k) * tables_.chunks() + row.chunk + chunk;
        tables_.chunk_sums_[static_cast<size_t>(at)] =
            storage.sum(workspace.lanes + k * kLanes * storage.compute_size, count);
      }
      if (stage == 0 && chunk == 0) advance(r);
    });
  }

  // The step counter and the counted scalars of a row.
  void advance(size_t r) {
    const Row& row = tables_.rows[r];
    const HyperRow& hyper = tables_.hyper_rows[static_cast<size_t>(row.hyper)];
    if (row.step != 0) store_scalar(row.step, static_cast<double>(hyper.step));
    const RuleInfo& rule = passes_.rules[hyper.rule];
    for (int k = 0; k < rule.counted; ++k) {
      store_scalar(tables_.scalars[r * static_cast<size_t>(tables_.scalars_) + k],
                   tables_.hypers[static_cast<size_t>(hyper.offset + rule.hypers + k)]);
    }
  }

  // Between two stages: adds the chunks of every row and runs the rule's turn on the sums.
  void turn_rows(size_t wave, int stage) {
    const auto row_of = [this](int64_t item) {
      return item == static_cast<int64_t>(tables_.items_.size())
                 ? tables_.rows.size()
                 : static_cast<size_t>(tables_.items_[static_cast<size_t>(item)] >> 32);
    };
    for (size_t r = row_of(waves_[wave]); r < row_of(waves_[wave + 1]); ++r) {
      const Row& row = tables_.rows[r];
      const HyperRow& hyper = tables_.hyper_rows[static_cast<size_t>(row.hyper)];
      const RuleInfo& rule = passes_.rules[hyper.rule];
      if (stage >= rule.stages) continue;
      const Kernel& kernel = rule.kernels[stage][hyper.storage];
      for (int k = 0; k < kernel.sums; ++k)
        add_chunks(r, kernel.first_sum + k, per_tensor_, passes_.halving_tree);
      if (rule.turns[stage] == nullptr) continue;
      const int64_t* at = tables_.scalars.data() + r * static_cast<size_t>(tables_.scalars_);
      double scalars[kMaxScalars] = {};
      for (int k = rule.counted; k < rule.scalars; ++k) scalars[k] = load_scalar(at[k]);
      rule.turns[stage](&tables_.hypers[static_cast<size_t>(hyper.offset)],
                        static_cast<double>(row.size),
                        &tables_.row_sums_[r * static_cast<size_t>(per_tensor_)], scalars);
      for (int k = rule.counted; k < rule.scalars; ++k) store_scalar(at[k], scalars[k]);
    }
  }

  // ----- one chunk

  void run_chunk(const Kernel& kernel, const StorageInfo& storage, size_t r, int64_t chunk,
                 double multiplier, Workspace& workspace, bool averages = false) {
    const Row& row = tables_.rows[r];
    const HyperRow& hyper = tables_.hyper_rows[static_cast<size_t>(row.hyper)];
    const int64_t* address = &tables_.addresses[r * static_cast<size_t>(tables_.width_)];
    const int64_t begin = chunk * kChunk;
    Block block;
    block.count = std::min(kChunk, row.size - begin);
    block.element = begin;
    block.step = hyper.step;
    block.seed = 0;
    block.multiplier = multiplier;
    block.clip_value = request_.clip_value;
    block.hyper = &tables_.hypers[static_cast<size_t>(hyper.offset)];
    block.per_tensor = tables_.row_sums_.data() + r * static_cast<size_t>(per_tensor_);
    block.lanes = workspace.lanes;
    const int64_t lanes = std::min(block.count, kLanes);
    for (int k = 0; k < kernel.sums; ++k) {
      storage.clear(workspace.lanes + k * kLanes * storage.compute_size, lanes);
    }
    if (row.layout >= 0) {
      run_strided(kernel, storage, block, address,
                  &tables_.layouts[static_cast<size_t>(row.layout)], workspace, averages);
      return;
    }
    for (int64_t role = 0; role < tables_.width_; ++role) {
      block.role[role] = reinterpret_cast<void*>(address[role] + begin * itemsize(storage, role));
    }
    if (averages) {
      run_averaged(kernel, storage, block);
    } else {
      kernel.run(block);
    }
  }

  // The bytes of an element of a role.
  int64_t itemsize(const StorageInfo& storage, int64_t role) const {
    const bool average = tables_.averages_ && role + 1 == tables_.width_;
    return average ? storage.compute_size : storage.itemsize[role];
  }

  // A block piece by piece, each averaged while its parameters are in the cache: memory is passed
  // over once. A last stage leaves no sums, so the pieces are like any other blocks.
  void run_averaged(const Kernel& kernel, const StorageInfo& storage, Block block) {
    for (int64_t left = block.count; left > 0; left -= kLanes) {
      block.count = std::min(kLanes, left);
      kernel.run(block);
      average(storage, block);
      block.element += kLanes;
      for (int64_t role = 0; role < tables_.width_; ++role) {
        block.role[role] = static_cast<char*>(block.role[role]) + kLanes * itemsize(storage, role);
      }
    }
  }

  void average(const StorageInfo& storage, const Block& block) const {
    storage.average(block.role[kParam], block.role[tables_.width_ - 1], block.count,
                    request_.ema_weight);
  }

  // Gathers a strided row into flat scratch, runs the same kernel there, scatters what it wrote.
  void run_strided(const Kernel& kernel, const StorageInfo& storage, Block block,
                   const int64_t* address, const int64_t* layout, Workspace& workspace,
                   bool averages) {
    const int64_t end = block.element + block.count;
    const unsigned last = averages ? 1u << (tables_.width_ - 1) : 0u;
    const unsigned reads = kernel.reads | last | (averages ? 1u << kParam : 0u);
    const unsigned writes = kernel.writes | last;
    for (int64_t begin = block.element; begin < end; begin += kLanes) {
      block.element = begin;
      block.count = std::min(kLanes, end - begin);
      for (int64_t role = 0; role < tables_.width_; ++role) {
        block.role[role] = workspace.scratch[role];
        if (reads >> role & 1u) {
          copy_strided<true>(block, role, itemsize(storage, role), address[role], layout);
        }
      }
      kernel.run(block);
      if (averages) average(storage, block);
      for (int64_t role = 0; role < tables_.width_; ++role) {
        if (writes >> role & 1u) {
          copy_strided<false>(block, role, itemsize(storage, role), address[role], layout);
        }
      }
    }
  }

  // Walks `block`'s elements of one role in index order, the last dimension fastest.
  template <bool kGather>
  static void copy_strided(const Block& block, int64_t role, int64_t itemsize, int64_t address,
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

  const Passes& passes_;
  Tables& tables_;
  const Request& request_;
  Outcome outcome_;
  std::atomic<bool> nonfinite_{false};
  std::unique_ptr<Share[]> shares_;
  int threads_ = 1;
  struct Range {
    int64_t begin, end;  // items
  };
  std::vector<int64_t> waves_;  // the items where they begin, then where the last one ends
  std::vector<Range> sweeps_;   // the reduce pass, then the stages of each wave
  int stages_ = 0;
  int per_tensor_ = 0;  // numbers a row
};

double load_scalar(int64_t tagged) {
  return tagged & 1 ? *reinterpret_cast<const double*>(tagged - 1)
                    : static_cast<double>(*reinterpret_cast<const float*>(tagged));
}

void store_scalar(int64_t tagged, double value) {
  if (tagged & 1) {
    *reinterpret_cast<double*>(tagged - 1) = value;
  } else {
    *reinterpret_cast<float*>(tagged) = static_cast<float>(value);
  }
}

Outcome run(const Passes& passes, Tables& tables, const Request& request) {
  return Region(passes, tables, request).run();
}

Outcome reduce_rows(const Passes& passes, Tables& tables, const Request& request,
                    std::vector<double>& sums) {
  Region region(passes, tables, request);
  const Outcome outcome = region.reduce();
  sums = region.row_sums();
  return outcome;
}

}  // namespace pyupdate::cpu
