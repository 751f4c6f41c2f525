# SPDX-License-Identifier: Apache-2.0
"""The translator of PTX: right kernels against numpy, planted faults, refusals."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device.ptx import Module, Unsupported, translate

SAMPLES = Path(__file__).parent / "device" / "samples.cu"
# What differs: vote and redux, f32x2 and 3-input minima came with later ones.
ARCHITECTURES = ("sm_80", "sm_120")
N = 1000


@pytest.fixture(scope="module", params=ARCHITECTURES)
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The PTX of samples.cu."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH: the samples cannot be compiled to PTX")
    ptx = tmp_path_factory.mktemp("ptx") / "samples.ptx"
    arguments = ["-ptx", "-std=c++20", f"-arch={request.param}", "-fmad=false"]
    subprocess.run([nvcc, *arguments, str(SAMPLES), "-o", str(ptx)], check=True)
    return ptx.read_text()


@pytest.fixture(scope="module")
def module(text: str) -> Module:
    return translate(text)


def run(
    module: Module, kernel: str, *args: Any, grid: int = 4, block: int = 256, **options: Any
) -> list[str]:
    """Launch on arrays (read-only ones stay so) and numbers; the kinds of the faults."""
    arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
    memory = [(a.ctypes.data, a.nbytes, a.flags.writeable) for a in arrays]
    plain = [arg.ctypes.data if isinstance(arg, np.ndarray) else arg for arg in args]
    faults = module.launch(kernel, grid, block, plain, memory=memory, **options)
    return [fault.kind for fault in faults]


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


def numbers(dtype: Any, seed: int) -> np.ndarray[Any, Any]:
    """Numbers of every size, with all that is special."""
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        drawn = rng.integers(info.min, info.max, N, dtype=dtype, endpoint=True)
        special = [0, 1, 2, 7, info.max, info.min, info.max // 2]
        signed = [-1, -2] if info.min < 0 else []
        drawn[rng.permutation(N)[:300]] = rng.choice(np.array(special + signed, dtype), 300)
        return read_only(drawn)
    wide = np.uint32 if dtype == np.float32 else np.uint64
    drawn = rng.integers(0, np.iinfo(wide).max, N, dtype=wide).view(dtype).copy()
    special = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, np.finfo(dtype).smallest_subnormal]
    drawn[rng.permutation(N)[:400]] = rng.choice(np.array(special, dtype), 400)
    return read_only(drawn)


def assert_bits(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> None:
    """Equal bits; of a nan only that it is one."""
    assert found.dtype == truth.dtype
    if not np.issubdtype(found.dtype, np.floating):
        np.testing.assert_array_equal(found, truth)
        return
    nan = np.isnan(truth)
    np.testing.assert_array_equal(np.isnan(found), nan)
    word = np.uint32 if found.dtype == np.float32 else np.uint64
    np.testing.assert_array_equal(found[~nan].view(word), truth[~nan].view(word))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats(module: Module, dtype: Any) -> None:
    a, b = numbers(dtype, 1), numbers(dtype, 2)
    out = np.zeros((13, N), dtype)
    assert run(module, f"floats{np.dtype(dtype).itemsize * 8}", a, b, out, N) == []
    with np.errstate(all="ignore"):
        arithmetic = [a + b, a - b, a * b, a / b, np.sqrt(a), -a]
    both = ~np.isnan(a) & ~np.isnan(b)
    conditions = [a < b, a > b, a != b, a == b, a <= b, ~(a < b), both]
    truths = arithmetic + [np.where(c, a, b) for c in conditions]
    for found, truth in zip(out, truths, strict=True):
        assert_bits(found, truth)


def test_extremes_and_fused(module: Module) -> None:
    a, b = numbers(np.float32, 3), numbers(np.float32, 4)
    out = np.zeros((5, N), np.float32)
    assert run(module, "extremes", a, b, out, N) == []
    least, greatest = np.fmin(a, b), np.fmax(a, b)
    zeros = (a == 0) & (b == 0)
    least = np.where(zeros, np.where(np.signbit(a), a, b), least)
    greatest = np.where(zeros, np.where(np.signbit(a), b, a), greatest)
    with np.errstate(all="ignore"):
        wide = a.astype(np.float64) * b + a  # exact enough to see a product that was rounded
    for found, truth in zip(out, [least, greatest, np.abs(a)], strict=False):
        assert_bits(found, truth)
    normal = np.isfinite(wide) & (np.abs(wide) < 1e38) & (np.abs(wide) > 1e-30)
    error = np.abs(out[3][normal] - wide[normal]) / np.spacing(np.abs(out[3][normal]))
    assert normal.sum() > 50
    assert error.max() <= 0.5
    assert_bits(out[4], np.copysign(a, b))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_integers(module: Module, dtype: Any) -> None:
    a, b = numbers(dtype, 5), numbers(dtype, 6)
    out = np.zeros((16, N), dtype)
    assert run(module, f"integers_{np.dtype(dtype).name}_t", a, b, out, N) == []
    bits = np.dtype(dtype).itemsize * 8
    info = np.iinfo(dtype)

    def wrapped(value: int) -> int:
        value &= (1 << bits) - 1
        return value - (1 << bits) if value > info.max else value

    def truth(x: int, y: int) -> list[int]:
        z = y or 1
        quotient = abs(x) // abs(z) * (1 if (x < 0) == (z < 0) else -1)
        shift = y & (bits - 1)
        return [
            *(x + y, x - y, x * y, quotient, x - quotient * z, x & y, x | y, x ^ y, ~x),
            *(x << shift, x >> shift, x < y, x >= y, x if x == y else -y, min(x, y), max(x, y)),
        ]

    for i in range(N):
        assert [int(v) for v in out[:, i]] == [wrapped(v) for v in truth(int(a[i]), int(b[i]))]


def test_words(module: Module) -> None:
    a, b = numbers(np.uint32, 7), numbers(np.uint32, 8)
    out = np.zeros((11, N), np.uint32)
    assert run(module, "words", a, b, out, N) == []

    def signed(x: int) -> int:
        return x - (1 << 32) if x >> 31 else x

    def truth(x: int, y: int) -> list[int]:
        both, by = (y << 32) | x, y & 31
        pick = [both >> (8 * k) & 255 for k in (2, 4, 1, 6)]
        return [
            *(x.bit_count(), 32 - x.bit_length(), int(f"{x:032b}"[::-1], 2)),
            sum(byte << (8 * k) for k, byte in enumerate(pick)),
            *((both << by) >> 32, both >> by, x * y >> 32, signed(x) * signed(y) >> 32),
            *((x & y) | (~x & (y >> 7)), x >> 5 & 0x7FF, x * y >> 9),
        ]

    for i in range(N):
        expected = [v & 0xFFFFFFFF for v in truth(int(a[i]), int(b[i]))]
        assert [int(v) for v in out[:, i]] == expected


def test_conversions(module: Module) -> None:
    rng = np.random.default_rng(9)
    a = rng.standard_normal(N) * 10.0 ** rng.integers(-3, 22, N)
    a[:8] = [0.5, -0.5, 2.5, 1e300, -1e300, np.nan, -0.0, 3.9999999999]
    out = np.zeros((10, N))
    assert run(module, "conversions", read_only(a), out, N) == []
    with np.errstate(all="ignore"):
        narrow = a.astype(np.float32)
    wide = narrow.astype(np.float64)

    def integer(x: np.ndarray[Any, Any], low: int, high: int) -> list[int]:
        return [0 if np.isnan(v) else low if v <= low else high if v >= high else int(v) for v in x]

    most = 2**63 - 1
    longs = integer(a, -(2**63), most)
    truths = [
        wide,
        integer(a, -(2**31), 2**31 - 1),
        integer(wide, 0, 2**32 - 1),
        [float(v) for v in integer(wide, -(2**63), most)],
        np.array(longs).astype(np.float32),
        np.array(longs).astype(np.int8),
        *(np.rint(a), np.floor(wide), np.ceil(a), np.trunc(a)),
    ]
    for found, truth in zip(out, truths, strict=True):
        assert_bits(found, np.array(truth, np.float64))


def test_parameters_local_constant_and_global_memory(module: Module) -> None:
    x = numbers(np.float32, 10)
    offsets = [3, 0, 5, 6]
    head = np.array([x.ctypes.data], np.uint64).tobytes() + np.array([1.5]).tobytes()
    params = head + np.array(offsets, np.int32).tobytes()
    out = np.zeros(N)
    memory = [(x.ctypes.data, x.nbytes, False), (out.ctypes.data, out.nbytes, True)]
    assert module.launch("memory", 4, 256, [params, out.ctypes.data, N], memory=memory) == []
    truth = np.full(N, np.nan)
    for i in range(N):
        local = np.full(8, np.nan, np.float32)
        for k in range(8):
            local[(k + offsets[k & 3]) & 7] = x[(i + k) % N]
        with np.errstate(all="ignore"):
            truth[i] = 1.5 * np.float64(local[i & 7]) * np.float64(2 ** (i & 3))
    assert_bits(out, truth)
    counted = np.zeros(1, np.int32)
    assert run(module, "get_counted", counted, grid=1, block=1) == []
    assert counted[0] == N


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sum_over_blocks(module: Module, seed: int) -> None:
    x = read_only(np.arange(5000, dtype=np.int32))
    partial, out, ticket = np.zeros(7, np.int32), np.zeros(1, np.int32), np.zeros(1, np.uint32)
    assert run(module, "sum", x, partial, out, ticket, len(x), grid=7, order_seed=seed) == []
    assert (out[0], ticket[0]) == (x.sum(), 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_warps(module: Module, seed: int) -> None:
    x = read_only(np.random.default_rng(11).integers(0, 1000, 256).astype(np.uint32))
    out = np.zeros((10, 256), np.uint32)
    assert run(module, "warps", x, out, 256, grid=1, order_seed=seed) == []
    lanes = np.arange(32)
    warps = x.reshape(8, 32)
    up = np.where(lanes % 16 >= 3, lanes - 3, lanes)
    odd = (warps & 1).astype(np.uint64)
    ballot = (odd << lanes.astype(np.uint64)).sum(1)
    one = np.ones((1, 32), np.uint32)
    truths = [
        *(warps[:, lanes ^ 5], warps[:, up], warps[:, lanes // 16 * 16 + 9]),
        *(ballot[:, None] * one, warps.sum(1)[:, None] * one, warps.max(1)[:, None] * one),
        np.bitwise_xor.reduce(warps, 1)[:, None] * one,
        ((warps == 7).any(1) + 2)[:, None] * one,
        np.full((8, 32), (x & 1).sum()),
        np.full((8, 32), int((x == 7).any()) + 2),
    ]
    for found, truth in zip(out, truths, strict=True):
        np.testing.assert_array_equal(found, truth.astype(np.uint32).ravel())


def test_memory_of_the_launch(module: Module) -> None:
    out = np.zeros(64, np.float32)
    assert run(module, "dynamic", out, 64, grid=1, block=64, shared=256) == []
    np.testing.assert_array_equal(out, np.arange(64)[::-1])
    assert run(module, "dynamic", out, 64, grid=1, block=64, shared=252) == ["out of bounds"] * 2
    assert run(module, "dynamic", out, 60, grid=1, block=64, shared=256) == []
    assert np.isnan(out[:4]).all()  # what nobody wrote
    assert not np.isnan(out[4:]).any()


def test_a_vector(module: Module) -> None:
    whole = np.arange(4 * N + 4, dtype=np.float32)
    begin = -whole.ctypes.data % 16 // 4
    x, out = whole[begin : begin + 4 * N], np.zeros(4 * N + 4, np.float32)
    out = out[-out.ctypes.data % 16 // 4 :][: 4 * N]
    assert run(module, "vectors", x, out, N) == []
    np.testing.assert_array_equal(out.reshape(N, 4), x.reshape(N, 4)[:, ::-1])
    assert run(module, "vectors", x[1:], out, 10) == ["misaligned"] * 10


# ----- planted faults, each named


def test_one_element_too_far(module: Module) -> None:
    out = np.zeros(N + 1, np.float32)
    assert run(module, "one_too_far", out[:N], N) == ["out of bounds"]
    assert out[N] == 0


def test_a_shared_index_past_the_end(module: Module) -> None:
    x = read_only(np.ones(256, np.int32))
    rest = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.uint32)
    assert run(module, "sum_shared_past_the_end", x, *rest, 256, grid=1) == ["out of bounds"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_missing_barrier(module: Module, seed: int) -> None:
    x = read_only(np.ones(256, np.int32))
    partial, out, ticket = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.uint32)
    run(module, "sum_without_barrier", x, partial, out, ticket, 256, grid=1, order_seed=seed)
    assert out[0] != 256


def test_a_barrier_in_a_divergent_branch(module: Module) -> None:
    out = np.zeros(64, np.float32)
    faults = run(module, "barrier_in_a_branch", out, grid=1, block=64)
    assert set(faults) == {"divergent barrier"}


def test_an_index_of_32_bits(module: Module) -> None:
    out = np.zeros(4, np.int8)
    x = read_only(np.zeros(4, np.int8))
    faults = run(module, "index_of_32_bits", x, out, 2**32 + 8, grid=1, block=4)
    assert faults == ["out of bounds"] * 4


def test_a_store_to_read_only_memory(module: Module) -> None:
    out = read_only(np.zeros(N, np.float32))
    assert run(module, "one_too_far", out, N - 1, grid=1)[:1] == ["write to read-only memory"]
    assert not out.any()


def test_half_a_warp(module: Module) -> None:
    faults = run(module, "half_a_warp", np.zeros(32, np.int32), grid=1, block=32)
    assert set(faults) == {"lanes of a warp operation do not agree"}


def test_division_by_zero_and_a_trap(module: Module) -> None:
    out = np.ones(2, np.int32)
    assert run(module, "divide", out, 0, grid=1, block=2) == ["division by zero"] * 2
    assert run(module, "trap", out, grid=1, block=2) == ["trap"] * 2


# ----- refusals

REFUSED = {
    "unknown instruction": ("add.s32", "sad.s32"),
    "unknown modifier": ("add.s32", "add.sat.s32"),
    "rounding": ("div.rn.f32", "div.full.f32"),
    "flush to zero": ("mul.rn.f32", "mul.rn.ftz.f32"),
    "an operand more": ("mul.rn.f32 \t", "mul.rn.f32 \t%r1, "),
    "type": ("add.rn.f64", "add.rn.f80"),
    "a product that may be contracted": ("mul.rn.f32", "mul.f32"),
    "a sum that may be contracted": ("add.rn.f64", "add.f64"),
    "a store past a read-only cache": ("st.global.u32", "st.global.nc.u32"),
    "a store that acquires": ("st.global.u32", "st.acquire.gpu.global.u32"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_is_refused_with_its_line(text: str, what: str) -> None:
    known, unknown = REFUSED[what]
    line = text[: text.index(known)].count("\n") + 1
    with pytest.raises(Unsupported, match=f"PTX line {line}: "):
        translate(text.replace(known, unknown, 1))


def test_launches_that_hardware_would_refuse(module: Module) -> None:
    for options in ({"block": 2048}, {"grid": 0}, {"shared": 300_000}, {"shared": 4}):
        with pytest.raises(ValueError, match=r"launched|shared"):
            run(module, "divide", np.zeros(1, np.int32), 1, **options)
    with pytest.raises(ValueError, match="1 given, the kernel takes 2"):
        run(module, "divide", 1)
