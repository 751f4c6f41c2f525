// SPDX-License-Identifier: Apache-2.0
// What a translated kernel calls: the threads of a block, checked memory, barriers and warps.
//
// A register holds raw bits in an unsigned integer; values are taken out and put back by `as` and
// `bits`. Each CUDA thread is a fiber of one OS thread (machine.cpp), so nothing here is atomic.
#pragma once
#include <stdint.h>
#include <string.h>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

// Memory that a kernel may touch. Python lays this out too (build.py).
struct Range {
  u64 begin;
  u64 end;
  u64 writable;
};

enum Kind : u32 {
  kOutOfBounds,
  kMisaligned,
  kReadOnly,
  kDivergentBarrier,
  kWarp,
  kDivision,
  kTrap,
  kStuck,
};

struct Fault {
  u32 kind;
  u32 line;  // of the PTX text
  u32 block[3];
  u32 thread[3];
  u64 address;
  u32 bytes;
  u32 write;
};

// One launch, filled in by Python.
struct Launch {
  u32 grid[3];
  u32 block[3];
  const u8* param;
  u64 param_bytes;
  u64 shared_bytes;
  const Range* shared;  // the variables, as offsets; what lies between them is nobody's
  u64 shared_count;
  u64 local_bytes;  // a thread's
  const Range* ranges;
  u64 range_count;
  u64 seed;  // 0: threads and blocks in order
  Fault* faults;
  u64 fault_capacity;
};

struct Block {
  u32 ctaid[3];
  u32 ntid[3];
  u32 nctaid[3];
  u8* shared;
};

struct Thread {
  Block* block;
  u32 tid[3];
  u32 lane;
  u32 linear;
  u8* local;
  u64 seen[32];  // what the lanes of the last warp operation gave
  u32 group;     // which lanes took part in it
};

using Kernel = void (*)(Thread& self, const u8* param);

// The number of faults; the first `fault_capacity` of them are described.
u64 launch(const Launch& launch, Kernel kernel);

// ----- memory: the address of `bytes` bytes, or of a scrap of NaN where the access is refused

u8* global(Thread& self, u64 address, u32 bytes, bool write, u32 line);
u8* shared(Thread& self, u64 address, u32 bytes, bool write, u32 line);
u8* local(Thread& self, u64 address, u32 bytes, bool write, u32 line);
u8* generic(Thread& self, u64 address, u32 bytes, bool write, u32 line);
const u8* param(Thread& self, u64 address, u32 bytes, u32 line);

template <class T>
inline T get(const u8* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void put(u8* to, T value) {
  memcpy(to, &value, sizeof value);
}

// ----- threads that wait for each other

void barrier(Thread& self, u32 line);
u32 barrier_count(Thread& self, bool vote, u32 line);  // how many threads voted true

// All lanes of `mask` meet at `line`; then self.seen and self.group say what they gave.
void exchange(Thread& self, u32 mask, u64 value, u32 line);

void fault(Thread& self, Kind kind, u32 line, u64 address = 0, u32 bytes = 0, bool write = false);

enum Shuffle { kUp, kDown, kButterfly, kIndex };

// PTX ISA, shfl.sync: the lane that is read, and whether it is inside the segment that `c` names.
inline u32 shuffle(Thread& self, Shuffle mode, u32 value, u32 b, u32 c, u32 mask, u32 line,
                   bool* inside) {
  exchange(self, mask, value, line);
  const s32 lane = static_cast<s32>(self.lane), segment = c >> 8 & 31, clamp = c & 31;
  const s32 last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  const s32 step = b & 31;
  const s32 from = mode == kUp          ? lane - step
                   : mode == kDown      ? lane + step
                   : mode == kButterfly ? lane ^ step
                                        : first | (step & ~segment);
  *inside = mode == kUp ? from >= last : from <= last;
  const u32 source = *inside ? from : lane;
  if (!(self.group >> source & 1)) {
    fault(self, kWarp, line);
    return ~u32{0};
  }
  return static_cast<u32>(self.seen[source]);
}

// Bit k is set where lane k of the mask voted true.
inline u32 ballot(Thread& self, bool vote, u32 mask, u32 line) {
  exchange(self, mask, vote, line);
  u32 votes = 0;
  for (u32 k = 0; k < 32; ++k) votes |= (self.group >> k & 1 & self.seen[k]) << k;
  return votes;
}

// The values of the lanes of the mask, joined in the order of the lanes.
template <class Join>
inline u32 reduce(Thread& self, u32 value, u32 mask, u32 line, Join join) {
  exchange(self, mask, value, line);
  bool any = false;
  u32 joined = 0;
  for (u32 k = 0; k < 32; ++k) {
    if (!(self.group >> k & 1)) continue;
    const u32 next = static_cast<u32>(self.seen[k]);
    joined = any ? join(joined, next) : next;
    any = true;
  }
  return joined;
}

}  // namespace ptx
