// SPDX-License-Identifier: Apache-2.0
// The one place that knows threads.
//
// OpenMP by default: linked to libgomp.so.1 by its plain name, the module shares the pool of the
// torch that was loaded before it, so two pools never fight for the cores. A forked child cannot
// use that pool (GNU OpenMP hangs there), and ThreadSanitizer cannot see where it joins: there,
// where the caller wants it so, and where the compiler has no OpenMP, plain threads are made for
// each region (about 20 us each).
#pragma once
#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <exception>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pyupdate::cpu {

// One thread's view of a parallel region.
struct Team {
  int rank;
  int size;
};

inline std::atomic<bool>& in_forked_child() {
  static std::atomic<bool> forked{false};
  return forked;
}

// Called once when the module is loaded.
inline void watch_for_fork() {
  in_forked_child();
  pthread_atfork(nullptr, nullptr, [] { in_forked_child() = true; });
}

inline const char* threading() {
#ifdef _OPENMP
  return in_forked_child() ? "threads (forked child)" : "OpenMP";
#else
  return "threads";
#endif
}

// The floating-point mode of the numeric contract, whatever mode the threads of the process are in
// (torch.set_flush_denormal(True) changes the one that calls it): to nearest, subnormals kept.
class ContractMode {
 public:
  ContractMode() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~ContractMode() { std::fesetenv(&before_); }
  ContractMode(const ContractMode&) = delete;

 private:
  std::fenv_t before_;
};

// Runs body(team) on up to `size` threads, the caller being rank 0. `body` must not throw. `plain`:
// never on OpenMP's.
template <class Body>
void parallel(int size, const Body& work, [[maybe_unused]] bool plain = false) {
  const auto body = [&work](const Team& team) {
    const ContractMode mode;
    work(team);
  };
  if (size <= 1) {
    body(Team{0, 1});
    return;
  }
#ifdef _OPENMP
  if (!plain && !in_forked_child()) {
#pragma omp parallel num_threads(size)
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(size - 1));
  try {
    for (int rank = 1; rank < size; ++rank) {
      others.emplace_back([&body, rank, size] { body(Team{rank, size}); });
    }
  } catch (const std::exception&) {  // the system gives no more: those that are there do the work
  }
  body(Team{0, size});
  for (std::thread& other : others) other.join();
}

}  // namespace pyupdate::cpu
