// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda on a CPU: as much of CUDA C++ as they use, and no CUDA header.
//
// A CUDA thread is a fiber. Blocks run one after the other, the threads of a block in an order that
// `order` shuffles, each until it waits for others. What CUDA leaves undefined ends the launch with
// an error: a barrier that some threads pass elsewhere or never, a warp operation that a lane
// misses.
//
// ThreadSanitizer sees each CUDA thread as a thread of its own, ordered by what orders it on a GPU
// alone: barriers, and `fence; atomic` before `atomic; fence` on one address. For that, fibers are
// switched without synchronising, stacks and sync addresses are never used twice in a launch, and a
// block runs in a new OS thread, whose thread-local variables are its shared memory. The emulator's
// own variables are hidden. TSan holds some 8,000 threads, and a fiber's races are reported while
// it exists: so tiny grids.
#pragma once
#if !defined(__x86_64__)
#error "the switch of fibers is written for x86-64"
#endif
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define threadIdx (cuda_on_cpu::current->place)
#define blockIdx (cuda_on_cpu::block->place)
#define gridDim (cuda_on_cpu::block->grid)
// A barrier knows where it stands in the source: all threads must pass the same one.
#define __syncthreads()                         \
  cuda_on_cpu::meet_block([]() -> const void* { \
    static const char site = 0;                 \
    return &site;                               \
  }())

#if defined(__SANITIZE_THREAD__)
#define CUDA_ON_CPU_HIDDEN __attribute__((no_sanitize("thread"), noinline))
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#else
#define CUDA_ON_CPU_HIDDEN __attribute__((noinline))
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};

// ----- what ThreadSanitizer is told; nothing without it

inline constexpr unsigned kNoSync = 1;
#if defined(__SANITIZE_THREAD__)
inline void acquire(void* address) { __tsan_acquire(address); }
inline void release(void* address) { __tsan_release(address); }
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
inline void acquire(void*) {}
inline void release(void*) {}
struct Unseen {
  Unseen() {}
};
#endif

// ----- threads and blocks

enum class State { kNew, kReady, kWaiting, kDone };

struct Thread {
  Index place{};
  State state = State::kNew;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  const void* site = nullptr;  // of the block's barrier that it waits at
  bool in_warp = false;        // waits for its warp
  uint64_t value = 0;          // what it gives to a warp operation, then what it gets
  unsigned source = 0;         // the lane that it reads
  void* fake_stack = nullptr;  // ASan's
  void* fiber = nullptr;       // TSan's
  void* fence = nullptr;       // TSan: a fiber that knows what came before the last fence
  void* seen[8] = {};          // TSan: atomics that a fence to come will acquire
  unsigned seen_count = 0;
};

constexpr unsigned kLanesOfWarp = 32;
constexpr size_t kStackBytes = 512 << 10;

struct Block {
  Index place{}, grid{};
  std::vector<Thread> threads;
  std::vector<unsigned> order;
  unsigned live = 0, arrived = 0, generation = 0;
  const std::function<void()>* body = nullptr;
  void* scheduler = nullptr;  // its stack pointer
  void* scheduler_fiber = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::string error;
  char* sync = nullptr;  // addresses that TSan knows barriers by: two for the block, one a warp
};

inline thread_local Block* block = nullptr;
inline thread_local Thread* current = nullptr;
inline unsigned order = 0;  // 0: by index
inline char launch_begins, launch_ends;

// Saves the registers that a call must keep, and goes on where `to` was left.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

CUDA_ON_CPU_HIDDEN inline void to_scheduler([[maybe_unused]] bool for_good = false) {
  Thread* self = current;
  Block* home = block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, home->scheduler_stack,
                                 home->scheduler_stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(home->scheduler_fiber, kNoSync);
#endif
  switch_stacks(&self->stack_pointer, home->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &home->scheduler_stack,
                                  &home->scheduler_stack_bytes);
#endif
}

CUDA_ON_CPU_HIDDEN inline void to_thread(Thread* thread) {
  current = thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block->scheduler_fake_stack, thread->stack, kStackBytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(thread->fiber, kNoSync);
#endif
  switch_stacks(&block->scheduler, thread->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Ends the launch with an error; never comes back, and neither does any other thread of the block.
CUDA_ON_CPU_HIDDEN inline void fail(const std::string& what) {
  block->error = what + ", block " + std::to_string(block->place.x) + ", thread " +
                 std::to_string(current->place.x);
  current->state = State::kDone;
  to_scheduler(true);
}

CUDA_ON_CPU_HIDDEN inline void wait() {
  current->state = State::kWaiting;
  while (current->state == State::kWaiting) to_scheduler();
}

// Whether any lane of a warp waits for the others.
CUDA_ON_CPU_HIDDEN inline bool warp_waits(unsigned first) {
  for (unsigned k = first; k < first + kLanesOfWarp; ++k) {
    if (block->threads[k].in_warp) return true;
  }
  return false;
}

CUDA_ON_CPU_HIDDEN inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  acquire(&launch_begins);
  (*block->body)();
  release(&launch_ends);
  {
    Unseen unseen;  // ends here: a thread that ends unseen is a fault to ThreadSanitizer
    if (block->arrived != 0) fail("a thread ends while others wait at a barrier");
    if (warp_waits(current->place.x / kLanesOfWarp * kLanesOfWarp)) {
      fail("a lane ends while its warp waits for it");
    }
    --block->live;
    current->state = State::kDone;
  }
  to_scheduler(true);
}

CUDA_ON_CPU_HIDDEN inline void begin(Thread* thread) {
  thread->stack = static_cast<char*>(std::aligned_alloc(4096, kStackBytes));
  void** top = reinterpret_cast<void**>(thread->stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  thread->stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
  thread->fiber = __tsan_create_fiber(0);
#endif
}

CUDA_ON_CPU_HIDDEN inline void run_block(Block& home) {
  block = &home;
#if defined(__SANITIZE_THREAD__)
  home.scheduler_fiber = __tsan_get_current_fiber();
#endif
  while (home.live > 0 && home.error.empty()) {
    bool moved = false;
    for (unsigned k : home.order) {
      Thread& thread = home.threads[k];
      if (thread.state == State::kNew) begin(&thread);
      if (thread.state == State::kWaiting || thread.state == State::kDone) continue;
      thread.state = State::kReady;
      moved = true;
      to_thread(&thread);
      if (!home.error.empty()) return;
    }
    if (!moved) home.error = "threads wait for ever in block " + std::to_string(home.place.x);
  }
}

// ----- barriers

CUDA_ON_CPU_HIDDEN inline void meet_block(const void* site) {
  Unseen unseen;
  for (const Thread& other : block->threads) {
    if (other.site != nullptr && other.site != site) fail("threads meet at different barriers");
  }
  char* sync = block->sync + (block->generation & 1);
  release(sync);
  current->site = site;
  if (++block->arrived < block->live) {
    wait();
  } else {
    block->arrived = 0;
    ++block->generation;
    for (Thread& thread : block->threads) {
      if (thread.site != nullptr && &thread != current) thread.state = State::kReady;
      thread.site = nullptr;
    }
  }
  acquire(sync);
}

// All lanes of a warp give a value and get that of a lane; `orders` where it is a barrier too.
CUDA_ON_CPU_HIDDEN inline uint64_t meet_warp(uint64_t value, unsigned source, bool orders) {
  Unseen unseen;
  const unsigned first = current->place.x / kLanesOfWarp * kLanesOfWarp;
  char* sync = block->sync + 2 + first / kLanesOfWarp;
  if (orders) release(sync);
  current->value = value;
  current->source = source;
  current->in_warp = true;
  unsigned here = 0;
  for (unsigned k = first; k < first + kLanesOfWarp; ++k) {
    if (block->threads[k].state == State::kDone) fail("a warp waits for a lane that has ended");
    here += block->threads[k].in_warp ? 1u : 0u;
  }
  if (here < kLanesOfWarp) {
    wait();
  } else {
    uint64_t given[kLanesOfWarp];
    for (unsigned k = 0; k < kLanesOfWarp; ++k) given[k] = block->threads[first + k].value;
    for (unsigned k = first; k < first + kLanesOfWarp; ++k) {
      Thread& thread = block->threads[k];
      thread.value = given[thread.source];
      thread.in_warp = false;
      if (&thread != current) thread.state = State::kReady;
    }
  }
  if (orders) acquire(sync);
  return current->value;
}

// ----- launch

inline void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  release(&launch_begins);
  std::vector<Block> grid(blocks);
  std::vector<char> sync(blocks * 64);
  std::string error;
  {
    Unseen unseen;
    for (unsigned b = 0; b < blocks && error.empty(); ++b) {
      Block& home = grid[b];
      home.place = {b};
      home.grid = {blocks};
      home.body = &body;
      home.live = threads;
      home.sync = &sync[b * 64];
      home.threads.resize(threads);
      uint64_t random = order * 0x9e3779b97f4a7c15u + b;
      for (unsigned k = 0; k < threads; ++k) {
        home.threads[k].place = {k};
        home.order.push_back(k);
        random = random * 6364136223846793005u + 1442695040888963407u;
        if (order != 0) std::swap(home.order[k], home.order[(random >> 33) % (k + 1)]);
      }
      std::thread([&home] {
        Unseen hidden;
        run_block(home);
      }).join();
      error = home.error;
#if !defined(__SANITIZE_THREAD__)
      for (Thread& thread : home.threads) std::free(thread.stack);
#endif
    }
  }
#if defined(__SANITIZE_THREAD__)
  for (Block& home : grid) {
    for (Thread& thread : home.threads) {
      if (thread.fiber != nullptr) __tsan_destroy_fiber(thread.fiber);
      if (thread.fence != nullptr) __tsan_destroy_fiber(thread.fence);
      std::free(thread.stack);
    }
  }
#endif
  acquire(&launch_ends);
  if (!error.empty()) throw std::runtime_error(error);
}

// ----- atomics are relaxed; fences order them

// An atomic publishes what its thread did before its last fence, and nothing since. ThreadSanitizer
// knows that by a fiber that is made at the fence, and so knows what its maker knew then.
CUDA_ON_CPU_HIDDEN inline void note_atomic([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  Unseen unseen;
  if (current->fence != nullptr) {
    __tsan_switch_to_fiber(current->fence, kNoSync);
    release(address);
    __tsan_switch_to_fiber(current->fiber, kNoSync);
  }
  current->seen[current->seen_count++ % 8] = address;
#endif
}

CUDA_ON_CPU_HIDDEN inline void fence() {
#if defined(__SANITIZE_THREAD__)
  Unseen unseen;
  for (unsigned k = 0; k < current->seen_count && k < 8; ++k) acquire(current->seen[k]);
  current->seen_count = 0;
  if (current->fence != nullptr) __tsan_destroy_fiber(current->fence);
  current->fence = __tsan_create_fiber(0);
#endif
}

}  // namespace cuda_on_cpu

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  cuda_on_cpu::note_atomic(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicExch(unsigned* address, unsigned value) {
  cuda_on_cpu::note_atomic(address);
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __syncwarp() { cuda_on_cpu::meet_warp(0, cuda_on_cpu::current->place.x % 32, true); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_on_cpu::meet_warp(bits, static_cast<unsigned>(lane) % 32, false);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  const int lane = static_cast<int>(cuda_on_cpu::current->place.x % 32);
  return __shfl_sync(mask, value, lane + delta < 32 ? lane + delta : lane);
}

template <class T>
inline __attribute__((always_inline)) T __ldca(const T* from) {
  return *from;
}
template <class T>
inline __attribute__((always_inline)) void __stwb(T* to, T value) {
  *to = value;
}

// ----- the host's side

using cudaError_t = int;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace pyupdate::cuda {
template <class... Arguments>
cudaError_t start(void (*kernel)(Arguments...), unsigned blocks, unsigned threads, void*,
                  Arguments... arguments) {
  cuda_on_cpu::run_grid(blocks, threads, [&] { kernel(arguments...); });
  return 0;
}
}  // namespace pyupdate::cuda
