# SPDX-License-Identifier: Apache-2.0
"""Other libraries in benchmarks: each is what it is taken for, or is named and left out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyupdate
from pyupdate.bench.contestants import KINDS, SCALE, Contestant, Workload
from pyupdate.bench.truth import WrongError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import apart  # noqa: E402 - benchmarks are scripts, not a package
import matrix  # noqa: E402
import measured  # noqa: E402
import peers  # noqa: E402

SMALL = Workload("small", ((200, 100), (33,), (5, 5)))


def hooked(kind: str, rule: str) -> Contestant:
    return Contestant(peers.HOOKED, SMALL, kind, peers.makers(kind, rule)[peers.HOOKED])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "step"])
@pytest.mark.parametrize("rule", peers.FUSED)
def test_torchs_hook_makes_the_step(kind: str, rule: str) -> None:
    one = hooked(kind, rule)
    like = getattr(pyupdate.optim, rule)(one.params)
    assert 0.0 < peers.check(one, like) < 24.0
    one = hooked(kind, rule)
    right, one.run = one.run, lambda: (one.params[1].grad.neg_(), right())
    with pytest.raises(WrongError):
        peers.check(one, like)


@pytest.mark.parametrize("kind", ["scaler", "full"])
def test_torchs_hook_skips_what_is_not_finite(kind: str) -> None:
    one = hooked(kind, "AdamW")
    before = [param.detach().clone() for param in one.params]
    one.params[1].grad[3] = torch.inf
    one.run()
    assert one.scaler.get_scale() == SCALE / 2.0
    assert all(torch.equal(a, b) for a, b in zip(before, one.params, strict=True))
    assert not hasattr(one.optimizer, "grad_scale")


def test_who_does_not_import_is_absent_with_the_reason(monkeypatch) -> None:
    planted = peers.Peer("no_such_library", {"AdamW": "AdamW"}, {})
    monkeypatch.setattr(peers, "ROWS", {"planted": planted})
    reason = "does not import: ModuleNotFoundError: No module named 'no_such_library'"
    assert peers.absent()["planted"] == reason
    assert list(peers.makers("step", "AdamW")) == [peers.COMPILED]
    assert list(peers.makers("step", "LAMB")) == []


class Larger(torch.optim.AdamW):
    """Takes the larger of the denominator and eps, as heavyball."""

    @torch.no_grad()
    def step(self) -> None:
        self.made = getattr(self, "made", 0) + 1
        group = self.param_groups[0]
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        for param in group["params"]:
            state = self.state[param]
            m = state.setdefault("exp_avg", torch.zeros_like(param))
            v = state.setdefault("exp_avg_sq", torch.zeros_like(param))
            m.lerp_(param.grad, 1.0 - beta1)
            v.lerp_(param.grad.square(), 1.0 - beta2)
            denominator = (v / (1.0 - beta2**self.made)).sqrt().clamp(min=eps)
            param.mul_(1.0 - lr * group["weight_decay"])
            param.sub_(lr / (1.0 - beta1**self.made) * m / denominator)


@pytest.mark.parametrize(("numbers", "right"), [({"eps": peers.NO_EPS}, True), (None, False)])
def test_a_peer_is_held_to_its_own_numbers(monkeypatch, numbers, right: bool) -> None:
    monkeypatch.setattr(peers, "_import_error", lambda _: None)
    monkeypatch.setitem(sys.modules, "planted", SimpleNamespace(AdamW=Larger))
    planted = peers.Peer("planted", {"AdamW": "AdamW"}, {}, numbers=numbers)
    monkeypatch.setattr(peers, "ROWS", {"planted": planted})
    one = Contestant("planted", SMALL, "step", peers.makers("step", "AdamW")["planted"])
    # A gradient of 1e-7 feels an eps of 1e-8.
    one.fresh[0].mul_(1e-5)
    like = pyupdate.optim.AdamW(one.params)
    if right:
        assert peers.check(one, like) < 24.0
    else:
        with pytest.raises(WrongError):
            peers.check(one, like)


def test_many_tensors_are_not_compiled() -> None:
    many = Workload("many", ((1,),) * (peers.LARGEST + 1))
    with pytest.raises(ValueError, match="201 tensors: more than 200"):
        Contestant(peers.COMPILED, many, "step", peers.makers("step", "AdamW")[peers.COMPILED])


def test_who_takes_part() -> None:
    def names(*cell: str, with_peers: bool = True, **more) -> set[str]:
        return set(measured.makers(matrix.Cell(*cell, **more), with_peers=with_peers))

    torchs = {"torch loop", "torch foreach", "torch fused", "pyupdate"}
    # What compiles for minutes does not keep the others waiting.
    compiling = names("compiled", "GPT-2 124M")
    assert compiling >= {"torch fused", peers.COMPILED, "pyupdate"}
    assert all(peers.compiles(name) for name in compiling - {"torch fused", "pyupdate"})
    for section, dtype in (("kinds", "float32"), ("dtypes", "mixed")):
        found = names(section, "ResNet-50", "full", dtype=dtype)
        assert found >= torchs | {peers.HOOKED} and not any(map(peers.compiles, found))
    assert names("kinds", "ResNet-50", "full", with_peers=False) == torchs == names("host", "1000")
    assert names("tensors", "1000") == torchs
    assert names("tensors", "1000", threads=1) == {"torch fused", "pyupdate"}
    assert names("backends", "1,000 tiny") == {"torch fused", "pyupdate in Python", "pyupdate"}


def test_a_step_from_a_loss_is_proven_too() -> None:
    def built(params):
        return pyupdate.build(apart.Held(params), pyupdate.optim.AdamW, model_name="ours")

    def update(one) -> None:
        pyupdate.update_model(one.model, one.loss, retain_graph=False, scaler=one.scaler)
        one.scaler.update()

    one = apart.FromLoss("ours", SMALL, "scaler", built, update)
    like = pyupdate.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert 0.0 < peers.check(one, like) < 24.0
    one = apart.FromLoss("ours", SMALL, "scaler", built, update)
    one.given[0].mul_(-1.0)
    with pytest.raises(WrongError):
        peers.check(one, like)


def test_a_peer_apart_that_does_not_run_is_absent_with_the_reason(monkeypatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: no cv2\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert apart.in_a_process("keras", []) == "ImportError: no cv2"
    said = SimpleNamespace(returncode=0, stdout='a warning\n{"kind": "step"}\n', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    assert apart.in_a_process("keras", []) == {"kind": "step"}


def test_every_package_of_the_peers_is_pinned() -> None:
    def plain(name: str) -> str:
        return re.sub("[-_.]+", "-", name).lower()

    listed = (ROOT / "benchmarks" / "requirements.txt").read_text().splitlines()
    names = {plain(name) for line in listed if not line.startswith("#") for name in line.split()}
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {plain(line.split("==")[0]) for line in constraints if "==" in line}
    assert names and names <= pinned


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["step", "full"])
@pytest.mark.parametrize("name", [peers.COMPILED, *peers.ROWS])
def test_who_is_here_is_right(name: str, kind: str) -> None:
    """Needs the libraries of `make bench`; compiles for a minute."""
    if name in peers.absent():
        pytest.skip(f"{name}: {peers.absent()[name]}")
    rule = "Lion" if name == "pytorch-optimizer" else "AdamW"  # its AdamW is torch's
    one = Contestant(name, SMALL, kind, peers.makers(kind, rule)[name])
    assert peers.check(one, getattr(pyupdate.optim, rule)(one.params)) < 300.0
