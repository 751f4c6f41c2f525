// SPDX-License-Identifier: Apache-2.0
// Which builds of passes.cpp this processor can run.
#include "passes.h"

namespace pyupdate {

#ifdef PYUPDATE_X86_LEVELS
namespace v2 {
extern const cpu::Passes passes;
}
namespace v3 {
extern const cpu::Passes passes;
}
namespace v4 {
extern const cpu::Passes passes;
}
#else
namespace plain {
extern const cpu::Passes passes;
}
#endif

namespace cpu {

// v2 is assumed, as every x86-64 wheel does. PYUPDATE_X86_LEVELS: CMake built all three.
Builds runnable_builds() {
#ifdef PYUPDATE_X86_LEVELS
  Builds builds{{&v2::passes, nullptr, nullptr}, 1};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
      __builtin_cpu_supports("movbe")) {
    builds.passes[builds.count++] = &v3::passes;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      builds.passes[builds.count++] = &v4::passes;
    }
  }
  return builds;
#else
  return {{&plain::passes, nullptr, nullptr}, 1};
#endif
}

}  // namespace cpu
}  // namespace pyupdate
