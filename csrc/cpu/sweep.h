// SPDX-License-Identifier: Apache-2.0
// One pass of several threads over a range of items: who takes which, and when it is over.
#pragma once
#include <stdint.h>

#include <atomic>

namespace pyupdate::cpu {

// Hands the items out: each thread takes those of its own share first, so that a thread touches the
// same memory step after step, then what is left of the others'.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t begin = 0;
  int64_t end = 0;
};

// One pass over a range of items. Who hands in the last of them does what follows once, and then
// says so: nobody waits for a thread, only for work. A thread that has lost its processor to
// another process, as to one that loads data, would hold a barrier up for a time slice, and LAMB
// has two for each large tensor: 24 of 1024 x 1024 took 200 ms beside a busy process, and 22
// without one.
struct Sweep {
  int64_t begin, end;
  std::atomic<int64_t> left;
  std::atomic<int> done{0};

  Sweep(int64_t from, int64_t to) : begin(from), end(to), left(to - from) {}

  // As long as another thread may take over an item; then asleep, for it may need our processor.
  void wait() const {
    for (int turn = 0; turn < kTurns; ++turn) {
      if (done.load(std::memory_order_acquire) != 0) return;
      relax();
    }
    done.wait(0, std::memory_order_acquire);
  }

 private:
  static constexpr int kTurns = 4096;  // about 0.1 ms
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
};

}  // namespace pyupdate::cpu
