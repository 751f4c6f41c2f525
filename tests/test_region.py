# SPDX-License-Identifier: Apache-2.0
"""The parallel region of a CPU step under ThreadSanitizer, whose threads wait for work alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import FLAGS, ROOT, compiler, run

MAIN = r"""
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>
#include "cpu/run.h"
namespace pyupdate {
namespace plain { extern const cpu::Passes passes; }
using namespace cpu;
const Passes& built = plain::passes;

// A step of a rule on rows of these sizes; all that was written.
std::vector<float> stepped(const std::string& name, int threads, bool reduce) {
  const std::vector<int64_t> sizes{700001, 5, 300000, 0, 20000, 90000};
  int64_t index = 0;
  while (name != built.rules[index].name) ++index;
  const RuleInfo& rule = built.rules[index];
  const int64_t width = kFirstState + rule.states;
  std::vector<std::vector<float>> memory;
  for (int64_t size : sizes) {
    for (int64_t role = 0; role < width; ++role) {
      memory.emplace_back(static_cast<size_t>(size));
      for (int64_t i = 0; i < size; ++i) {
        memory.back()[static_cast<size_t>(i)] = static_cast<float>((i * 7 + role * 3) % 11) - 4.0f;
      }
    }
  }
  Tables tables(width);
  double numbers[16] = {1.0, 0.01, 0.9, 0.99, 1e-3, 0.1};
  tables.hypers.resize(static_cast<size_t>(rule.hypers));
  rule.prepare(numbers, tables.hypers.data());
  tables.hyper_rows.push_back({index, 1, 0, 1, 1.0});
  for (size_t r = 0; r < sizes.size(); ++r) {
    std::vector<int64_t> addresses;
    for (int64_t role = 0; role < width; ++role) {
      float* first = memory[r * static_cast<size_t>(width) + static_cast<size_t>(role)].data();
      addresses.push_back(reinterpret_cast<int64_t>(first));
    }
    tables.add_row({sizes[r], 0, 0, 0, -1}, addresses.data(), nullptr);
  }
  tables.cut();
  Request request;
  request.threads = threads;
  request.reduce = reduce;
  request.max_norm = 1.0;
  int calls = 0;
  request.context = &calls;
  request.before_writing = [](void* context) { ++*static_cast<int*>(context); };
  const Outcome outcome = run(built, tables, request);
  if (calls != 1) std::printf("before_writing was called %d times\n", calls);
  std::vector<float> all{static_cast<float>(outcome.norm)};
  for (const std::vector<float>& one : memory) all.insert(all.end(), one.begin(), one.end());
  return all;
}
}  // namespace pyupdate

int main() {
  for (const char* name : {"adamw", "toy_two", "toy_three"}) {
    for (bool reduce : {false, true}) {
      const std::vector<float> alone = pyupdate::stepped(name, 1, reduce);
      for (int threads : {2, 4}) {
        const std::vector<float> found = pyupdate::stepped(name, threads, reduce);
        const bool same = std::memcmp(alone.data(), found.data(), alone.size() * 4) == 0;
        std::printf("%s %d threads, %s: %s\n", name, threads, reduce ? "norm" : "plain",
                    same ? "same" : "OTHER");
      }
    }
  }
}
"""
SOURCES = ("csrc/cpu/passes.cpp", "csrc/cpu/run.cpp", "csrc/cpu/tables.cpp")
SANITIZED = ("-fsanitize=thread", "-g1", "-O1", "-DPYUPDATE_ISA=plain", "-pthread")
FAULTS = {
    "nobody waits for the stage before": ("        made.wait();\n", ""),
    "the last items are handed in unseen": (
        "sweep.left.fetch_sub(items, std::memory_order_acq_rel)",
        "sweep.left.fetch_sub(items, std::memory_order_relaxed)",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The passes of the toy rules, compiled once, and the program."""
    made = tmp_path_factory.mktemp("region")
    rules = ("--rules", ROOT / "tests" / "toy_rules.py")
    header = made / "rules_generated.h"
    run(sys.executable, "-m", "pyupdate.kernels.emit_cpp", "--output", header, *rules)
    (made / "main.cpp").write_text(MAIN)
    for name in (ROOT / SOURCES[0], ROOT / SOURCES[2], made / "main.cpp"):
        compiled(name, made)
    return made


def compiled(source: Path, folder: Path) -> Path:
    made = folder / f"{source.stem}.o"
    flags = [flag for flag in FLAGS if flag != "-O3"]
    includes = (f"-I{ROOT / 'csrc'}", f"-I{folder}", f"-I{ROOT / 'csrc' / 'cpu'}")
    run(compiler(), *flags, *SANITIZED, *includes, "-c", source, "-o", made)
    return made


def tried(region: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    others = [folder / f"{name}.o" for name in ("passes", "tables", "main")]
    program = folder / "program"
    run(compiler(), *SANITIZED, compiled(region, folder), *others, "-o", program)
    options = "halt_on_error=1 exitcode=66"
    return subprocess.run(
        [str(program)],
        env={**os.environ, "TSAN_OPTIONS": options},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_every_number_of_threads_has_the_bits_of_one(folder: Path) -> None:
    done = tried(ROOT / SOURCES[1], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * 2 * 2
    assert all(line.endswith(": same") for line in lines), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, folder: Path) -> None:
    old, new = FAULTS[fault]
    text = (ROOT / SOURCES[1]).read_text()
    assert text.count(old) == 1
    text = text.replace(old, new).replace('#include "../', '#include "')
    edited = folder / "edited.cpp"
    edited.write_text(text)
    done = tried(edited, folder)
    assert done.returncode == 66, done.stdout
    assert "data race" in done.stderr
