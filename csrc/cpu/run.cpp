// SPDX-License-Identifier: Apache-2.0
// The parallel region of a CPU step: reduce pass, one multiplier, apply stages.
#include "run.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>

#include "../reduce.h"
#include "../rounding.h"
#include "parallel.h"
#include "scratch.h"
#include "sweep.h"

namespace pyupdate::cpu {

namespace {

// Below this many elements another thread costs more than it brings: it has gone to sleep while the
// plan was refreshed, and waking it took 0.05 to 2 ms on a virtual machine, the time of 10^5 to
// 10^6 elements of AdamW.
constexpr int64_t kElementsPerThread = 1 << 18;

// What a thread needs beside its stack frames.
struct Workspace {
  alignas(64) char lanes[kMaxSums * kLanes * sizeof(double)];
  Scratch scratch;
};

}  // namespace

// ----- the region --------------------------------------------------------------------------------

class Region {
 public:
  Region(const Passes& passes, Tables& tables, std::vector<Member>& members)
      : passes_(passes), tables_(tables), request_(members[0].request), members_(members) {
    for (Member& member : members) {
      reduce_ = reduce_ || member.request.reduce;
      member.outcome.multiplier = member.request.multiplier;
    }
    for (const HyperRow& hyper : tables.hyper_rows) {
      stages_ = std::max(stages_, passes.rules[hyper.rule].stages);
      per_tensor_ = std::max(per_tensor_, passes.rules[hyper.rule].per_tensor);
    }
    if (reduce_ || per_tensor_ > 0) {
      const int width = std::max(1, per_tensor_);
      tables.chunk_sums_.resize(static_cast<size_t>(tables.chunks() * width));
      tables.row_sums_.assign(tables.rows.size() * static_cast<size_t>(width), 0.0);
    }
    const int64_t wanted = tables.elements() / kElementsPerThread;
    threads_ = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max(1, request_.threads)));
    const auto items = static_cast<int64_t>(tables.items_.size());
    if (stages_ > 1) waves_ = tables.waves_;
    if (waves_.empty()) waves_.push_back(0);
    waves_.push_back(items);
    sweeps_.emplace_back(0, items);
    for (size_t w = 0; request_.apply && w + 1 < waves_.size(); ++w) {
      for (int stage = 0; stage < stages_; ++stage) sweeps_.emplace_back(waves_[w], waves_[w + 1]);
    }
    set_shares();
    nonfinite_ = std::make_unique<std::atomic<bool>[]>(members.size());
  }

  void run() {
    if (tables_.rows.empty() && !reduce_) return;
    if (tables_.rows.empty()) finish_reduce();
    parallel(threads_, [this](const Team& team) { work(team); }, request_.plain_threads);
  }

  const std::vector<double>& row_sums() const { return tables_.row_sums_; }

  // The reduce pass alone; leaves the rows' sums in row_sums().
  void reduce() {
    const auto work = [this](const Team& team) {
      Workspace workspace;
      reduce_chunks(team, workspace);
    };
    parallel(threads_, work, request_.plain_threads);
    for (size_t r = 0; r < tables_.rows.size(); ++r) add_chunks(r, 0, 1, tree(request_));
    tables_.row_sums_.resize(tables_.rows.size());  // a rule of several sums had asked for more
    members_[0].outcome.nonfinite = nonfinite_[0];
  }

 private:
  void work(const Team& team) {
    Workspace workspace;
    if (reduce_ && !tables_.rows.empty()) {
      const int64_t items = reduce_chunks(team, workspace);
      hand_in(sweeps_[0], items, [this] { finish_reduce(); });
      sweeps_[0].wait();
    }
    if (!request_.apply || all_skipped_) return;
    if (team.rank == 0 && request_.before_writing) request_.before_writing(request_.context);
    const size_t waves = waves_.size() - 1;
    for (size_t turn = 0; turn < waves; ++turn) {
      // Backwards after a reduce pass: what it read last is still in the cache.
      const size_t wave = reduce_ ? waves - 1 - turn : turn;
      for (int stage = 0; stage < stages_; ++stage) {
        const int64_t items = apply_chunks(team, workspace, wave, stage);
        if (stage + 1 == stages_) break;
        Sweep& made = sweeps_[index_of(wave, stage)];
        hand_in(made, items, [this, wave, stage] { turn_rows(wave, stage); });
        made.wait();
      }
    }
  }

  // A thread has done some items of a sweep; behind the last ones comes `next`.
  template <class Next>
  static void hand_in(Sweep& sweep, int64_t items, const Next& next) {
    if (items == 0 || sweep.left.fetch_sub(items, std::memory_order_acq_rel) != items) return;
    next();
    sweep.done.store(1, std::memory_order_release);
    sweep.done.notify_all();
  }

  size_t index_of(size_t wave, int stage) const {
    return 1 + wave * static_cast<size_t>(stages_) + static_cast<size_t>(stage);
  }

  // The shares of threads that do not come are taken by those that do.
  void set_shares() {
    shares_ = std::make_unique<Share[]>(static_cast<size_t>(threads_) * sweeps_.size());
    Share* share = shares_.get();
    for (const Sweep& sweep : sweeps_) {
      const int64_t items = sweep.end - sweep.begin;
      for (int rank = 0; rank < threads_; ++rank, ++share) {
        share->next = share->begin = sweep.begin + items * rank / threads_;
        share->end = sweep.begin + items * (rank + 1) / threads_;
      }
    }
  }

  // How many items this thread has done.
  template <class Visit>
  int64_t sweep(const Team& team, size_t index, bool backwards, const Visit& visit) {
    const std::vector<int64_t>& items = tables_.items_;
    const auto last = static_cast<int64_t>(items.size()) - 1;
    int64_t count = 0;
    for (int turn = 0; turn < threads_; ++turn) {
      const auto rank = static_cast<size_t>((team.rank + turn) % threads_);
      Share& share = shares_[index * static_cast<size_t>(threads_) + rank];
      for (;;) {
        const int64_t taken = share.next.fetch_add(1, std::memory_order_relaxed);
        if (taken >= share.end) break;
        ++count;
        const int64_t item = backwards ? share.begin + share.end - 1 - taken : taken;
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
    return count;
  }

  // ----- reduce

  int64_t reduce_chunks(const Team& team, Workspace& workspace) {
    return sweep(team, 0, false, [&](size_t r, int64_t chunk) {
      const Row& row = tables_.rows[r];
      const HyperRow& hyper = tables_.hyper_rows[static_cast<size_t>(row.hyper)];
      const Request& request = members_[static_cast<size_t>(hyper.member)].request;
      if (!request.reduce) return;
      const StorageInfo& storage = passes_.storages[hyper.storage];
      const int64_t count = std::min(kChunk, row.size - chunk * kChunk);
      double* sum = &tables_.chunk_sums_[static_cast<size_t>(row.chunk + chunk)];
      const Kernel& kernel = request.inf_norm ? storage.magnitude : storage.squared;
      run_chunk(kernel, storage, r, chunk, request.unscale, workspace);
      *sum = (request.inf_norm ? storage.largest : storage.sum)(workspace.lanes, count);
      if (!std::isfinite(*sum)) {  // an inf or nan, or finite squares that overflowed
        run_chunk(storage.nonfinite, storage, r, chunk, request.unscale, workspace);
        if (storage.sum(workspace.lanes, count) != 0.0) {
          nonfinite_[static_cast<size_t>(hyper.member)].store(true, std::memory_order_relaxed);
        }
      }
    });
  }

  void finish_reduce() {
    size_t begin = 0;
    all_skipped_ = true;
    for (size_t m = 0; m < members_.size(); ++m) {
      if (members_[m].request.reduce) finish_reduce(m, begin);
      all_skipped_ = all_skipped_ && members_[m].outcome.skipped;
      begin = members_[m].rows_end;
    }
  }

  void finish_reduce(size_t m, size_t begin) {
    const auto& [request, end, ignored] = members_[m];
    Outcome& outcome = members_[m].outcome;
    for (size_t r = begin; r < end; ++r) add_chunks(r, 0, 1, tree(request));
    const double total =
        tree(request)(tables_.row_sums_.data() + begin, static_cast<int64_t>(end - begin));
    outcome.norm = request.inf_norm ? total : std::sqrt(total);
    outcome.nonfinite = nonfinite_[m];
    outcome.skipped = (request.skip_nonfinite && outcome.nonfinite) ||
                      (request.finite_norm && !std::isfinite(outcome.norm));
    outcome.multiplier = passes_.multiplier(outcome.norm, request.unscale, request.max_norm);
  }

  // How the reduce pass makes one number of several.
  Passes::Tree tree(const Request& request) const {
    return request.inf_norm ? passes_.largest : passes_.halving_tree;
  }

  // Joins the chunks of a row: the sum `index` of `stride` numbers that each row has.
  void add_chunks(size_t r, int index, int stride, Passes::Tree tree) {
    const Row& row = tables_.rows[r];
    double* chunks =
        &tables_.chunk_sums_[static_cast<size_t>(index * tables_.chunks() + row.chunk)];
    tables_.row_sums_[r * static_cast<size_t>(stride) + static_cast<size_t>(index)] =
        tree(chunks, chunks_of(row.size));
  }

  // ----- apply

  int64_t apply_chunks(const Team& team, Workspace& workspace, size_t wave, int stage) {
    // Each sweep back over what the one before read last, which is still in the cache.
    const bool backwards = (stage + (reduce_ ? 1 : 0)) % 2 == 1;
    return sweep(team, index_of(wave, stage), backwards, [&](size_t r, int64_t chunk) {
      const Row& row = tables_.rows[r];
      const HyperRow& hyper = tables_.hyper_rows[static_cast<size_t>(row.hyper)];
      const RuleInfo& rule = passes_.rules[hyper.rule];
      const Member& member = members_[static_cast<size_t>(hyper.member)];
      if (stage >= rule.stages || member.outcome.skipped) return;
      const StorageInfo& storage = passes_.storages[hyper.storage];
      const bool averages = has_average(r) && stage + 1 == rule.stages;
      const bool by_chance = member.request.stochastic && storage.fp32 >= 0;
      const Kernel& kernel = rule.kernels[stage][by_chance ? storage.fp32 : hyper.storage];
      uint64_t keys[kMaxRoles];
      for (int role = 0; by_chance && role < kMaxRoles; ++role) {
        keys[role] = key_of(member.request.seed, hyper.step, tables_.identities[r], stage, role);
      }
      run_chunk(kernel, storage, r, chunk, member.outcome.multiplier * hyper.sign, workspace,
                averages, by_chance ? keys : nullptr);
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
      const bool skipped = members_[static_cast<size_t>(hyper.member)].outcome.skipped;
      if (stage >= rule.stages || skipped) continue;
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
                 double multiplier, Workspace& workspace, bool averages = false,
                 const uint64_t* keys = nullptr) {
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
    block.clip_value = members_[static_cast<size_t>(hyper.member)].request.clip_value;
    block.hyper = &tables_.hypers[static_cast<size_t>(hyper.offset)];
    block.per_tensor = tables_.row_sums_.data() + r * static_cast<size_t>(per_tensor_);
    block.lanes = workspace.lanes;
    const int64_t lanes = std::min(block.count, kLanes);
    for (int k = 0; k < kernel.sums; ++k) {
      storage.clear(workspace.lanes + k * kLanes * storage.compute_size, lanes);
    }
    if (row.layout >= 0 || keys != nullptr) {
      const int64_t* layout =
          row.layout < 0 ? nullptr : &tables_.layouts[static_cast<size_t>(row.layout)];
      int64_t sizes[kMaxRoles];
      for (int64_t role = 0; role < tables_.width_; ++role) sizes[role] = itemsize(storage, role);
      const double* ema_weight =
          averages ? &members_[static_cast<size_t>(hyper.member)].request.ema_weight : nullptr;
      run_in_scratch(kernel, storage, block,
                     {tables_.width_, address, sizes, layout, keys, ema_weight}, workspace.scratch);
      return;
    }
    for (int64_t role = 0; role < tables_.width_; ++role) {
      block.role[role] = reinterpret_cast<void*>(address[role] + begin * itemsize(storage, role));
    }
    if (averages) {
      run_averaged(kernel, storage, block,
                   members_[static_cast<size_t>(hyper.member)].request.ema_weight);
    } else {
      kernel.run(block);
    }
  }

  bool has_average(size_t r) const {
    const auto width = static_cast<size_t>(tables_.width_);
    return tables_.averages_ && tables_.addresses[r * width + width - 1] != 0;
  }

  // The bytes of an element of a role.
  int64_t itemsize(const StorageInfo& storage, int64_t role) const {
    const bool average = tables_.averages_ && role + 1 == tables_.width_;
    return average ? storage.compute_size : storage.itemsize[role];
  }

  // A block piece by piece, each averaged while its parameters are in the cache: memory is passed
  // over once. A last stage leaves no sums, so the pieces are like any other blocks.
  void run_averaged(const Kernel& kernel, const StorageInfo& storage, Block block,
                    double ema_weight) {
    for (int64_t left = block.count; left > 0; left -= kLanes) {
      block.count = std::min(kLanes, left);
      kernel.run(block);
      storage.average(block.role[kParam], block.role[tables_.width_ - 1], block.count, ema_weight);
      block.element += kLanes;
      for (int64_t role = 0; role < tables_.width_; ++role) {
        block.role[role] = static_cast<char*>(block.role[role]) + kLanes * itemsize(storage, role);
      }
    }
  }

  const Passes& passes_;
  Tables& tables_;
  const Request& request_;
  std::vector<Member>& members_;
  std::unique_ptr<std::atomic<bool>[]> nonfinite_;  // a member each
  bool reduce_ = false;
  bool all_skipped_ = false;
  std::unique_ptr<Share[]> shares_;
  int threads_ = 1;
  std::vector<int64_t> waves_;  // the items where they begin, then where the last one ends
  std::deque<Sweep> sweeps_;    // the reduce pass, then the stages of each wave
  int stages_ = 0;
  int per_tensor_ = 0;  // numbers a row
};

Outcome run(const Passes& passes, Tables& tables, const Request& request) {
  std::vector<Member> alone{{request, tables.rows.size(), {}}};
  run(passes, tables, alone);
  return alone[0].outcome;
}

void run(const Passes& passes, Tables& tables, std::vector<Member>& members) {
  Region(passes, tables, members).run();
}

Outcome reduce_rows(const Passes& passes, Tables& tables, const Request& request,
                    std::vector<double>& sums) {
  std::vector<Member> alone{{request, tables.rows.size(), {}}};
  Region region(passes, tables, alone);
  region.reduce();
  sums = region.row_sums();
  return alone[0].outcome;
}

}  // namespace pyupdate::cpu
