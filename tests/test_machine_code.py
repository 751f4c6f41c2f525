# SPDX-License-Identifier: Apache-2.0
"""`make gpu-static` on planted kernels: each fault is named, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from device import machine_code
from device.sass import Instruction, Kernel

PLANTED = Path(__file__).parent / "device" / "planted.cu"
FAULTS = {
    "sound": [],
    "fused": ["fma.rn.f32 in the PTX", "1 FFMA/FFMA2/DFMA, 0 for its divisions and roots"],
    "approximate": ["div.approx.f32 in the PTX", "1 MUFU, 0 for its divisions and roots"],
    "local": ["256 bytes of stack, 0 of spills", "accesses of local memory"],
    "narrow": ["no loads of 16 bytes", "no stores of 16 bytes", "0 KiB of loads in flight"],
    "few_bytes": ["16 KiB of loads in flight"],
    "many_registers": ["registers"],
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, machine_code.Verdict]:
    if missing := machine_code.missing_tools():
        pytest.skip(f"no {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_code, "WRITING", {f"{kernel} 0" for kernel in FAULTS})
        found = machine_code.examine("planted", PLANTED, [], 89, folder)
    return {verdict.label.removesuffix(" 0"): verdict for verdict in found}


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_planted_fault_is_named(verdicts: dict[str, machine_code.Verdict], kernel: str) -> None:
    verdict = verdicts[kernel]
    assert verdict.storage == "fp32"
    assert len(verdict.faults) == len(FAULTS[kernel]), verdict.faults
    for found, expected in zip(verdict.faults, FAULTS[kernel], strict=True):
        assert expected in found


def test_what_a_sound_kernel_comes_to(verdicts: dict[str, machine_code.Verdict]) -> None:
    verdict = verdicts["sound"]
    # 4 blocks, of the 6 that sm_89 could hold, ask for three times 16 bytes each.
    assert (verdict.registers <= 40, verdict.in_flight) == (True, 1024 * 48)
    row = machine_code.table(89, [verdict]).split("\n")[4]
    assert row == f"| sound 0 |  | {verdict.registers} / 48 |  |  |  |  |"


def code(*lines: str) -> list[Instruction]:
    return [Instruction(16 * k, False, *line.split(" ", 1)) for k, line in enumerate(lines)]


def test_bytes_in_flight_end_at_the_first_use() -> None:
    load = "LDG.E.128 R{}, desc[UR4][R2.64]"
    loads = [load.format(4), load.format(8)]
    kernel = Kernel("", 32, 0, 0, 0, code(*loads, "FADD R0, R9, R0", load.format(12)))
    assert kernel.bytes_in_flight() == 32
    kernel.code = code(load.format(4), "FADD R0, R7, R0", load.format(8))
    assert kernel.bytes_in_flight() == 16
    # A loop's head: what was loaded before it may be loaded again only after its use.
    kernel.code = code(load.format(4), load.format(8), "BRA 0x10")
    assert kernel.bytes_in_flight() == 16


def test_an_address_that_is_not_of_64_bits_is_seen() -> None:
    wide = "LDG.E R4, desc[UR4][R2.64+0x10]"
    kernel = Kernel("", 32, 0, 0, 0, code(wide, "STG.E desc[UR4][R2.U32+UR8], R4"))
    assert kernel.narrow_addresses() == ["STG.E desc[UR4][R2.U32+UR8], R4"]


def test_resident_threads() -> None:
    assert machine_code.resident(Kernel("", 64, 0, 0, 0), 90) == 1024
    assert machine_code.resident(Kernel("", 65, 0, 0, 0), 90) == 768
    assert machine_code.resident(Kernel("", 32, 0, 0, 0), 90) == 1024  # of 2048
    assert machine_code.resident(Kernel("", 96, 0, 0, 0), 120) == 512
    assert machine_code.resident(Kernel("", 32, 33 << 10, 0, 0), 86) == 512


def test_no_more_blocks_are_counted_than_a_launch_has() -> None:
    source = (machine_code.ROOT / "csrc" / "cuda" / "sent.cpp").read_text()
    assert f"constexpr int kBlocks = {machine_code.STARTED};" in source


def test_a_known_fault_passes_and_must_still_be_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {("muon 0", "fp32", "stack"): ((90,), "why"), ("lion 0", "bf16", "flight"): ((90,), "")}
    monkeypatch.setattr(machine_code, "OPEN", known)
    faults = [
        machine_code.Verdict("muon 0", "fp32", 64, 0, ["32 bytes of stack"]),
        machine_code.Verdict("lion 0", "bf16", 56, 0, ["16 KiB of loads in flight"]),
    ]
    assert machine_code.report(90, faults)
    assert not machine_code.report(90, faults[:1])
    assert "lion 0 bf16: flight is gone" in capsys.readouterr().out
    assert not machine_code.report(80, faults)  # known on another architecture
    faults[1].faults.append("no loads of 16 bytes")
    assert not machine_code.report(90, faults)
    assert "no loads of 16 bytes (FAILED)" in capsys.readouterr().out


def test_what_is_known_names_kernels_and_storages_that_there_are() -> None:
    for (label, storage, _), (architectures, _) in machine_code.OPEN.items():
        assert label in machine_code.WRITING and storage in machine_code.STORAGES
        assert set(architectures) <= set(machine_code.ARCHITECTURES)
