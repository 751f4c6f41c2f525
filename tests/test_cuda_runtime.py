# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda/runtime.cpp over a runtime of ours, in which a device is a number.

What is shown: a step on one GPU leaves the others and the thread as they were, or says why not.
"""

from __future__ import annotations

import ctypes

import pytest
from compiling import ROOT, shared_library

SOURCE = """
#include "cuda/runtime.cpp"

using pyupdate::cuda::OnDevice;

extern "C" {
// A thread on torch's device, as its Python sets it; below 0: it was never set.
void begin(int device, bool has_driver) {
  for (bool& has : fake::has_context) has = false;
  fake::current = nullptr;
  fake::ours = fake::torchs = {};
  fake::has_driver = has_driver;
  if (device >= 0) fake::set_device(&fake::torchs, device);
}
// Torch makes a tensor there, under its own guard.
void allocate(int device) {
  int* const before = fake::current;
  fake::enter(device);
  fake::current = before;
}
// Where a step's kernel runs, and where torch's work that is asked for meanwhile.
int step_on(int device) {
  const OnDevice current(device);
  return 10 * fake::launch(fake::ours) + fake::launch(fake::torchs);
}
int step_within(int outer, int inner) {
  const OnDevice current(outer);
  const int found = step_on(inner);
  return 100 * found + fake::launch(fake::ours);
}
// Whether a step keeps to a context of its user's on this device, and leaves it current.
bool keeps_own_context(int device, int stepped) {
  int* const own = &fake::contexts[fake::kDevices + device];
  fake::current = own;
  bool kept;
  {
    const OnDevice current(stepped);
    kept = fake::current == own;
    fake::launch(fake::ours);
  }
  return kept && fake::current == own;
}
// What is said where the device cannot be had.
const char* step_with(int device, int error) {
  static std::string said;
  fake::error = error;
  try {
    step_on(device);
    said = "it was stepped";
  } catch (const std::runtime_error& failure) {
    said = failure.what();
  }
  fake::error = 0;
  return said.c_str();
}
int left_behind() { return cudaGetLastError(); }
int torchs_device() { return fake::device_of(fake::torchs); }
int contexts() {
  int found = 0;
  for (int k = 0; k < fake::kDevices; ++k) found |= fake::has_context[k] << k;
  return found;
}
}
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The shipped runtime.cpp and the scenes above."""
    folder = tmp_path_factory.mktemp("runtime")
    library = shared_library(SOURCE, folder, f"-I{ROOT / 'tests' / 'device' / 'runtime_fake'}")
    library.keeps_own_context.restype = ctypes.c_bool
    library.step_with.restype = ctypes.c_char_p
    return library


def test_a_step_on_one_gpu_makes_no_context_on_another(runtime):
    runtime.begin(-1, True)
    runtime.allocate(1)
    for _ in range(2):
        assert runtime.step_on(1) == 11
        assert runtime.contexts() == 0b10
        assert runtime.torchs_device() == 0  # a new tensor goes where it went before


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_device_of_the_thread_is_its_own_afterwards(runtime, at):
    runtime.begin(at, True)
    runtime.allocate(1)
    runtime.allocate(3)
    assert runtime.step_on(1) == 11
    assert runtime.step_on(3) == 33
    assert runtime.step_within(3, 1) == 1103
    assert runtime.torchs_device() == at
    assert runtime.contexts() == 1 << at | 0b1010


def test_threads_that_have_no_context_step_on_one_device_after_the_other(runtime):
    runtime.begin(-1, True)
    runtime.allocate(2)
    runtime.allocate(3)
    assert [runtime.step_on(k) for k in (3, 2, 2, 3)] == [33, 22, 22, 33]
    assert runtime.contexts() == 0b1100
    assert runtime.torchs_device() == 0


def test_a_context_that_its_user_made_is_the_one_that_is_stepped_in(runtime):
    runtime.begin(-1, True)
    runtime.allocate(2)
    assert runtime.keeps_own_context(2, 2)
    assert not runtime.keeps_own_context(1, 2)  # of another device
    assert runtime.contexts() == 0b100


def test_a_driver_without_the_functions_has_its_device_set_again(tmp_path):
    # Found once in a process: so in another library.
    alone = shared_library(SOURCE, tmp_path, f"-I{ROOT / 'tests' / 'device' / 'runtime_fake'}")
    alone.begin(2, False)
    alone.allocate(1)
    assert alone.step_on(1) == 11
    assert alone.torchs_device() == 2


@pytest.mark.parametrize("code", [101, 700])
def test_a_device_that_cannot_be_had_is_an_error_that_says_whose(runtime, code):
    runtime.begin(0, True)
    runtime.allocate(1)
    said = runtime.step_with(1, code).decode()
    begins = f"CUDA device 1 could not be made the current one: CUDA's own words (error {code})"
    assert said.startswith(begins)
    assert ("The fault is of work that was launched before" in said) == (code == 700)
    assert runtime.left_behind() == 0
    assert runtime.torchs_device() == 0
    assert runtime.step_on(1) == 11
