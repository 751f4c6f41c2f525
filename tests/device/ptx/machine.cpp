// SPDX-License-Identifier: Apache-2.0
// Runs the blocks of a launch, one after the other, each thread a fiber of one OS thread.
//
// A fiber is made only when a thread waits, so elementwise kernels run as a plain loop. A barrier
// is passed when all live threads of the block have come, a warp operation when all lanes of its
// mask have. What hardware leaves undefined is a fault: it is written down, and the launch goes on.
#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

namespace ptx {
namespace {

constexpr size_t kStack = 256 << 10;  // bytes; a kernel's registers and its local memory

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Slot : Thread {  // a thread and where it stands
  Fiber* fiber;
  bool done, ready, at_barrier;
  u32 line;  // where it waits
  u32 mask;  // of the warp operation that it waits in, 0 for none
  u64 given;
  bool vote;
  u32 count;
};

struct Machine {
  const Launch* launch;
  Kernel kernel;
  u64 fault_count;
  Block block;
  std::vector<Slot> threads;
  std::vector<u32> order;
  size_t next;  // in `order`: the first thread that has not begun
  u32 live, arrived;
  u32 in_warps;  // threads that wait in a warp operation
  u32 barrier_line;
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  Fiber* running;
  std::vector<u8> shared, local;
};
Machine machine;

// Where each PTX line last found its range: lines mostly keep to one tensor.
Range recent[256];

Slot& slot_of(Thread& self) { return static_cast<Slot&>(self); }

u8* scrap() {
  alignas(64) static u8 bytes[64];
  memset(bytes, 0xff, sizeof bytes);
  return bytes;
}

const Range* range_of(const Range* ranges, u64 count, u64 address) {
  const Range* after = std::upper_bound(
      ranges, ranges + count, address, [](u64 at, const Range& range) { return at < range.begin; });
  return after == ranges ? nullptr : after - 1;
}

bool inside(const Range* range, u64 address, u32 bytes) {
  return range && address >= range->begin && address < range->end && bytes <= range->end - address;
}

// Suspends the running thread until something has made it ready.
void wait(Slot& slot) {
  slot.ready = false;
  slot.fiber = machine.running;
  swapcontext(&slot.fiber->context, &machine.scheduler);
}

void release_barrier() {
  u32 votes = 0;
  for (Slot& slot : machine.threads) votes += slot.at_barrier && slot.vote;
  for (Slot& slot : machine.threads) {
    if (!slot.at_barrier) continue;
    slot.count = votes;
    slot.at_barrier = false;
    slot.ready = true;
  }
  machine.arrived = 0;
}

Slot* warp_of(const Slot& slot) { return machine.threads.data() + slot.linear / 32 * 32; }

u32 lanes_of(const Slot& slot) {
  const size_t left = machine.threads.size() - slot.linear / 32 * 32;
  return left >= 32 ? ~u32{0} : (u32{1} << left) - 1;
}

void exit_thread(Slot& slot) {
  slot.done = true;
  --machine.live;
  Slot* warp = warp_of(slot);
  for (u32 k = 0; machine.in_warps > 0 && k < 32 && (lanes_of(slot) >> k & 1); ++k) {
    if (!warp[k].done && (warp[k].mask >> slot.lane & 1)) fault(slot, kWarp, warp[k].line);
  }
  if (machine.arrived == 0) return;
  fault(slot, kDivergentBarrier, machine.barrier_line);
  if (machine.arrived == machine.live) release_barrier();
}

void fiber_main() {
  for (;;) {
    while (machine.next < machine.order.size()) {
      Slot& slot = machine.threads[machine.order[machine.next++]];
      machine.kernel(slot, machine.launch->param);
      exit_thread(slot);
    }
    Fiber* self = machine.running;
    machine.idle.push_back(self);
    swapcontext(&self->context, &machine.scheduler);
  }
}

Fiber* idle_fiber() {
  if (!machine.idle.empty()) {
    Fiber* fiber = machine.idle.back();
    machine.idle.pop_back();
    return fiber;
  }
  Fiber* fiber = machine.fibers.emplace_back(new Fiber).get();
  getcontext(&fiber->context);
  fiber->context.uc_stack = {fiber->stack.get(), 0, kStack};
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
  return fiber;
}

void run(Fiber* fiber) {
  machine.running = fiber;
  swapcontext(&machine.scheduler, &fiber->context);
}

void run_threads() {
  while (machine.live > 0) {
    bool moved = machine.next < machine.order.size();
    if (moved) run(idle_fiber());
    for (u32 index : machine.order) {
      if (machine.next < machine.order.size()) break;  // all begin before any goes on
      Slot& slot = machine.threads[index];
      if (slot.done || !slot.ready) continue;
      run(slot.fiber);
      moved = true;
    }
    if (moved) continue;
    for (Slot& slot : machine.threads) {
      if (!slot.done) fault(slot, kStuck, slot.line);
    }
    // The stacks of threads that wait for ever are taken over: kernels own nothing that needs
    // freeing.
    machine.fibers.clear();
    machine.idle.clear();
    return;
  }
}

void shuffle_order(std::vector<u32>& order, u64 seed) {
  std::iota(order.begin(), order.end(), 0u);
  if (seed == 0) return;
  u64 state = seed * 0x9e3779b97f4a7c15u | 1;
  for (size_t k = order.size(); k > 1; --k) {  // xorshift64: any fixed order would do
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    std::swap(order[k - 1], order[state % k]);
  }
}

void run_block(u32 index) {
  const Launch& launch = *machine.launch;
  const u32* grid = launch.grid;
  const u32* size = launch.block;
  machine.block = {{index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]},
                   {size[0], size[1], size[2]},
                   {grid[0], grid[1], grid[2]},
                   machine.shared.data()};
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);  // NaN, whatever it is read as
  std::fill(machine.local.begin(), machine.local.end(), 0xff);
  machine.live = static_cast<u32>(machine.threads.size());
  machine.next = machine.arrived = machine.in_warps = 0;
  for (u32 k = 0; k < machine.live; ++k) {
    Slot& slot = machine.threads[k];
    slot.block = &machine.block;
    slot.tid[0] = k % size[0];
    slot.tid[1] = k / size[0] % size[1];
    slot.tid[2] = k / size[0] / size[1];
    slot.linear = k;
    slot.lane = k % 32;
    slot.local = machine.local.data() + k * launch.local_bytes;
    slot.done = slot.ready = slot.at_barrier = slot.vote = false;
    slot.line = slot.mask = 0;
  }
  shuffle_order(machine.order, launch.seed == 0 ? 0 : launch.seed + index);
  run_threads();
}

u8* checked(Thread& self, const Range* range, u8* base, u64 address, u32 bytes, bool write,
            u32 line) {
  if (!inside(range, address, bytes)) {
    fault(self, kOutOfBounds, line, address, bytes, write);
    return scrap();
  }
  if (write && !range->writable) {
    fault(self, kReadOnly, line, address, bytes, write);
    return scrap();
  }
  if (address % bytes != 0) {
    fault(self, kMisaligned, line, address, bytes, write);
    return scrap();
  }
  return base + address;
}

}  // namespace

void fault(Thread& self, Kind kind, u32 line, u64 address, u32 bytes, bool write) {
  const Launch& launch = *machine.launch;
  if (machine.fault_count < launch.fault_capacity) {
    const u32* block = self.block->ctaid;
    launch.faults[machine.fault_count] = {kind,
                                          line,
                                          {block[0], block[1], block[2]},
                                          {self.tid[0], self.tid[1], self.tid[2]},
                                          address,
                                          bytes,
                                          write};
  }
  ++machine.fault_count;
}

u8* global(Thread& self, u64 address, u32 bytes, bool write, u32 line) {
  Range& last = recent[line % 256];
  if (!inside(&last, address, bytes)) {
    const Range* found = range_of(machine.launch->ranges, machine.launch->range_count, address);
    if (!inside(found, address, bytes)) {
      fault(self, kOutOfBounds, line, address, bytes, write);
      return scrap();
    }
    last = *found;
  }
  return checked(self, &last, nullptr, address, bytes, write, line);
}

u8* shared(Thread& self, u64 address, u32 bytes, bool write, u32 line) {
  const Launch& launch = *machine.launch;
  return checked(self, range_of(launch.shared, launch.shared_count, address), self.block->shared,
                 address, bytes, write, line);
}

u8* local(Thread& self, u64 address, u32 bytes, bool write, u32 line) {
  const u64 begin = reinterpret_cast<u64>(self.local);
  const Range range = {begin, begin + machine.launch->local_bytes, 1};
  return checked(self, &range, nullptr, address, bytes, write, line);
}

u8* generic(Thread& self, u64 address, u32 bytes, bool write, u32 line) {
  const Launch& launch = *machine.launch;
  const u64 window = reinterpret_cast<u64>(self.block->shared);
  const u64 own = reinterpret_cast<u64>(self.local);
  const u64 given = reinterpret_cast<u64>(launch.param);
  if (address - window < launch.shared_bytes) {
    return shared(self, address - window, bytes, write, line);
  }
  if (address - own < launch.local_bytes) return local(self, address, bytes, write, line);
  if (address - given < launch.param_bytes) {
    const Range range = {0, launch.param_bytes, 0};
    u8* base = const_cast<u8*>(launch.param);
    return checked(self, &range, base, address - given, bytes, write, line);
  }
  return global(self, address, bytes, write, line);
}

const u8* param(Thread& self, u64 address, u32 bytes, u32 line) {
  const Range range = {0, machine.launch->param_bytes, 0};
  u8* base = const_cast<u8*>(machine.launch->param);
  return checked(self, &range, base, address, bytes, false, line);
}

void barrier(Thread& self, u32 line) { barrier_count(self, false, line); }

u32 barrier_count(Thread& self, bool vote, u32 line) {
  Slot& slot = slot_of(self);
  if (machine.arrived > 0 && machine.barrier_line != line) fault(self, kDivergentBarrier, line);
  machine.barrier_line = line;
  slot.at_barrier = true;
  slot.vote = vote;
  slot.line = line;
  if (++machine.arrived == machine.live) {
    release_barrier();
  } else {
    wait(slot);
  }
  return slot.count;
}

void exchange(Thread& self, u32 mask, u64 value, u32 line) {
  Slot& slot = slot_of(self);
  Slot* warp = warp_of(slot);
  if (!(mask >> slot.lane & 1)) {
    fault(self, kWarp, line);
    mask |= u32{1} << slot.lane;
  }
  const u32 group = mask & lanes_of(slot);
  slot.mask = group;
  slot.given = value;
  slot.line = line;
  u32 come = 0;
  for (u32 k = 0; k < 32; ++k) {
    if (!(group >> k & 1)) continue;
    if (warp[k].done) fault(self, kWarp, line);
    if (warp[k].done || warp[k].mask != 0) come |= u32{1} << k;
  }
  ++machine.in_warps;
  if (come != group) {
    wait(slot);
    return;
  }
  for (u32 k = 0; k < 32; ++k) {
    if (!(group >> k & 1) || warp[k].done) continue;
    if (warp[k].mask != group || warp[k].line != line) fault(warp[k], kWarp, line);
    for (u32 from = 0; from < 32; ++from)
      warp[k].seen[from] = group >> from & 1 ? warp[from].given : 0;
    warp[k].group = group;
  }
  for (u32 k = 0; k < 32; ++k) {
    if (!(group >> k & 1) || warp[k].mask == 0) continue;
    --machine.in_warps;
    warp[k].mask = 0;
    warp[k].ready = true;
  }
}

u64 launch(const Launch& launch, Kernel kernel) {
  machine.launch = &launch;
  machine.kernel = kernel;
  machine.fault_count = 0;
  memset(recent, 0, sizeof recent);
  const u32 count = launch.block[0] * launch.block[1] * launch.block[2];
  machine.threads.resize(count);
  machine.order.resize(count);
  machine.shared.resize(launch.shared_bytes);
  machine.local.resize(launch.local_bytes * count);
  std::vector<u32> blocks(launch.grid[0] * launch.grid[1] * launch.grid[2]);
  shuffle_order(blocks, launch.seed);
  for (u32 index : blocks) run_block(index);
  return machine.fault_count;
}

}  // namespace ptx
