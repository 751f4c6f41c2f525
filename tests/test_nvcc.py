# SPDX-License-Identifier: Apache-2.0
"""Whether an install builds the CUDA module: by the environment, by nvcc, by the GPUs there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyupdate import build_info, nvcc


@pytest.fixture
def tools(tmp_path: Path):
    """Puts programs into a folder that is all of PATH."""

    def put(*, nvcc_is_there: bool = True, gpus: str | None = None) -> dict[str, str]:
        texts = {"nvcc": "exit 0"} if nvcc_is_there else {}
        if gpus is not None:
            texts["nvidia-smi"] = f"printf '{gpus}'" if gpus else "exit 9"
        for name, text in texts.items():
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        return {"PATH": str(tmp_path)}

    return put


def test_auto_builds_for_the_gpus_that_are_there(tools):
    found = nvcc.wanted(tools(gpus="9.0\\n9.0\\n8.6\\n"))
    assert found.architectures == "86-real;90-real"
    assert found.nvcc is not None and found.nvcc.endswith("/nvcc")
    assert not found.required


def test_auto_builds_for_those_that_are_named_where_a_gpu_is(tools):
    named = {"PYUPDATE_CUDA_ARCHS": "90"}
    assert nvcc.wanted({**tools(gpus="8.6\\n"), **named}).architectures == "90"
    assert "no GPU" in str(nvcc.wanted({**tools(gpus=""), **named}).reason)


@pytest.mark.parametrize("gpus", [None, ""], ids=["no driver", "it fails"])
def test_auto_builds_nothing_without_a_gpu(tools, gpus):
    found = nvcc.wanted(tools(gpus=gpus))
    assert found.nvcc is None
    assert (
        found.reason is not None and "no GPU" in found.reason and "PYUPDATE_CUDA=1" in found.reason
    )


def test_nothing_is_built_without_nvcc(tools):
    for choice in ("auto", "1"):
        found = nvcc.wanted({**tools(nvcc_is_there=False, gpus="9.0\\n"), "PYUPDATE_CUDA": choice})
        assert found == nvcc.Wanted(
            None, reason="no nvcc on PATH or in CUDA_HOME", required=choice == "1"
        )


def test_whoever_asks_gets_all_or_those_that_were_named(tools):
    asked = {**tools(), "PYUPDATE_CUDA": "1"}
    assert nvcc.wanted(asked).architectures == nvcc.ALL
    assert nvcc.wanted(asked).required
    named = {**asked, "PYUPDATE_CUDA_ARCHS": "80-real;90"}
    assert nvcc.wanted(named).architectures == "80-real;90"


def test_nvcc_is_found_in_cuda_home(tools, tmp_path):
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    tools()
    (tmp_path / "nvcc").rename(home / "bin" / "nvcc")
    assert nvcc.compiler({"PATH": "", "CUDA_HOME": str(home)}) == str(home / "bin" / "nvcc")


def test_zero_leaves_it_out_and_another_word_is_refused(tools):
    found = nvcc.wanted({**tools(gpus="9.0\\n"), "PYUPDATE_CUDA": "0"})
    assert found.nvcc is None and found.reason is not None and "PYUPDATE_CUDA=0" in found.reason
    with pytest.raises(ValueError, match="PYUPDATE_CUDA must be 0, 1 or auto, but is 'yes'"):
        nvcc.wanted({"PYUPDATE_CUDA": "yes"})


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"PYUPDATE_PURE_PYTHON": "1"}, "PYUPDATE_PURE_PYTHON=1 was set"),
        ({"CXX": "/bin/false"}, "compiler"),
    ],
    ids=["pure Python", "no compiler"],
)
def test_an_install_that_asks_for_it_fails_without_the_other_module(tmp_path, setting, reason):
    root = Path(__file__).parents[1]
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    unset = ("PYUPDATE_REQUIRE_COMPILED", "PYUPDATE_PURE_PYTHON")
    base = {key: value for key, value in os.environ.items() if key not in unset}
    codes = []
    for choice in ("1", "0"):
        environment = {**base, **setting, "PYUPDATE_CUDA": choice}
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        codes.append(done.returncode)
        assert reason in done.stderr
        assert ("pyupdate: PYUPDATE_CUDA=1, but" in done.stderr) == (choice == "1")
    assert codes == [1, 0]


def test_the_doctor_has_the_reason(tmp_path, monkeypatch):
    record = tmp_path / "_build_info.json"
    monkeypatch.setattr(build_info, "_FILE", record)
    record.write_text('{"compiled": true, "cuda": {"built": false, "reason": "no nvcc"}}')
    assert build_info.reason_no_cuda() == "not built: no nvcc"
    record.write_text('{"compiled": true, "cuda": {"built": true, "reason": null}}')
    assert build_info.reason_no_cuda() is None
