# SPDX-License-Identifier: Apache-2.0
"""The Triton back end, whole: optimizers step CPU tensors by the PTX that a GPU would run.

The truth is the compiled CPU back end, bit for bit, and that is the numpy oracle's
(test_bitwise.py). A kernel that touches what is not its own fails (tests/device/ptx).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits, random_values
from cases import DTYPES, FULL, FULL_OTHERS, name_of

import pyupdate
from pyupdate.language import sqrt
from pyupdate.pytorch.step import last_step

pytest.importorskip("triton", reason="triton is not installed (make check-device installs it)")

from device.triton_backend import triton_backend
from ways import held, plan_of

SIZES = (0, 1, 5, 70, 1025, 16_383, 16_384, 16_385)
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    **{case.name: (case.torch_class.__name__, case.options) for case in (*FULL, *FULL_OTHERS)},
    "schedulefree_adamw": ("ScheduleFreeAdamW", {"lr": 0.003}),
    "adafactor": ("Adafactor", {"lr": 0.01}),
    "lars": ("LARS", {"lr": 0.1}),
    "lars_momentum": ("LARS", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "lamb": ("LAMB", {"lr": 0.01, "weight_decay": 0.1}),
    "novograd": ("NovoGrad", {"lr": 0.01}),
    "stable_adamw": ("StableAdamW", {"lr": 0.01, "weight_decay": 0.1}),
}
OTHER_CAPABILITIES = (80, 100, 120)

Made = tuple[list[torch.Tensor], list[dict[str, Any]], list[Any]]


readers = pytest.mark.parametrize("by_compiled", [True, False], ids=["by C++", "by Python"])
"""Who reads the tensors anew at every step."""


def gradients(
    sizes: Sequence[int], dtypes: Sequence[torch.dtype], steps: int
) -> list[list[torch.Tensor]]:
    rng = np.random.default_rng(7)
    return [[random_values(rng, n, kind) for kind in dtypes for n in sizes] for _ in range(steps)]


def trained(
    rule: str,
    dtypes: Sequence[torch.dtype],
    grads: Sequence[Sequence[torch.Tensor | None]],
    sizes: Sequence[int] = SIZES,
    **options: Any,
) -> Made:
    """Parameters, state and what was said of each step."""
    rng = np.random.default_rng(3)
    params = [torch.nn.Parameter(random_values(rng, n, kind)) for kind in dtypes for n in sizes]
    kind, own = RULES[rule]
    optimizer = getattr(pyupdate.optim, kind)(params, **{**own, **options})
    said = []
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
        last = last_step(optimizer)
        assert last is not None
        said.append((last.norm, last.skipped, last.multiplier))
    return [p.detach() for p in params], [optimizer.state[p] for p in params], said


def assert_alike(found: Made, expected: Made, what: str) -> None:
    assert found[2] == expected[2], what
    for i, (x, y) in enumerate(zip(found[0], expected[0], strict=True)):
        assert_same_bits(x, y, f"{what}, parameter {i}")
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert set(mine) == set(theirs), what
        for key, value in theirs.items():
            assert_same_bits(torch.as_tensor(mine[key]), torch.as_tensor(value), f"{what}, {key}")


def check(
    rule: str, dtypes: Sequence[torch.dtype], *, capability: int = 90, order: int = 0, **more: Any
) -> None:
    grads = gradients(more.get("sizes", SIZES), dtypes, 3)
    with triton_backend(capability) as machine:
        machine.order_seed = order
        found = trained(rule, dtypes, grads, **more)
    assert machine.launches
    with pyupdate.use_backend("cpu"):
        expected = trained(rule, dtypes, grads, **more)
    assert_alike(found, expected, f"{rule}, sm_{capability}")


# ----- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_has_the_bits_of_the_cpu(rule, compiled):
    # Another storage in turn; all of them are crossed with all rules below.
    others = (torch.bfloat16, torch.float64, torch.float16)
    dtypes = (torch.float32, others[list(RULES).index(rule) % 3])
    check(rule, dtypes, sizes=(0, 1, 70, 1025, 16_385))


def test_every_rule_is_here():
    from pyupdate.kernels.rules import RULES as ALL

    assert set(RULES) == set(ALL) - {"muon"}  # which is a matrix's: below


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_halves_with_state_in_float32(rule, dtype, compiled):
    check(rule, [dtype], state_dtype=torch.float32, sizes=(1, 70, 1025, 16_385))


@pytest.mark.parametrize("capability", OTHER_CAPABILITIES)
@pytest.mark.parametrize("rule", ["adamw", "sgd_momentum", "lamb"])
def test_other_architectures(rule, capability, compiled):
    norm = {"max_norm": 1.0} if rule == "adamw" else {}
    check(rule, [torch.bfloat16], capability=capability, sizes=(70, 16_385), **norm)


@pytest.mark.slow
@pytest.mark.parametrize("capability", (90, *OTHER_CAPABILITIES))
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_every_architecture(rule, capability, compiled):
    check(rule, DTYPES, capability=capability, order=11, max_norm=1.0)


def test_muon(compiled):
    def trained_on(name: str) -> torch.Tensor:
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(24, 40))
        optimizer = pyupdate.optim.Muon([param], lr=0.01)
        for _ in range(2):
            param.grad = torch.randn(24, 40)
            optimizer.step()
        assert plan_of(optimizer).backends == (name,)
        return param.detach()

    with triton_backend():
        found = trained_on("triton")
    with pyupdate.use_backend("cpu"):
        assert_same_bits(found, trained_on("cpu"), "muon")


@pyupdate.rule(state={"square_avg": 0.0}, defaults={"alpha": 0.75})
def own_rmsprop(param, grad, square_avg, lr, alpha, eps):
    square_avg = square_avg * alpha + grad * grad * (1.0 - alpha)
    param = param - lr * grad * sqrt(square_avg + eps)
    return param, square_avg


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_rule_of_the_user(dtype):
    def trained_on() -> torch.Tensor:
        rng = np.random.default_rng(1)
        param = torch.nn.Parameter(random_values(rng, 3000, dtype))
        optimizer = pyupdate.optim.from_rule(own_rmsprop)([param], lr=0.01, eps=0.1)
        for _ in range(3):
            param.grad = random_values(rng, 3000, dtype)
            optimizer.step()
        return param.detach()

    with triton_backend() as machine:
        found = trained_on()
    assert machine.launches
    with pyupdate.use_backend("reference"):
        assert_same_bits(found, trained_on(), "own rule")


# ----- options ------------------------------------------------------------------------------------

ALL_OPTIONS = {"max_norm": 1.0, "clip_value": 0.01, "ema_decay": 0.75, "stochastic_rounding": True}
OPTIONS: dict[str, tuple[tuple[torch.dtype, ...], dict[str, Any]]] = {
    "max_norm": ((torch.float32, torch.float64), {"max_norm": 1.0}),
    "inf norm": ((torch.bfloat16,), {"max_norm": 0.5, "norm_type": math.inf}),
    "clip_value": ((torch.float32,), {"clip_value": 0.1}),
    "average": ((torch.bfloat16, torch.float64), {"ema_decay": 0.75}),
    "by chance": (
        (torch.bfloat16, torch.float16),
        {"stochastic_rounding": True, "seed": 2**62 + 5},
    ),
    "all": ((torch.float16,), ALL_OPTIONS | {"maximize": True}),
}


@pytest.mark.parametrize(("dtypes", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options(dtypes, options, compiled):
    check("adamw", dtypes, sizes=(1, 70, 2049, 16_385), **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [o for _, o in OPTIONS.values()], ids=OPTIONS)
def test_options_in_every_storage(options, compiled):
    check("adamw", DTYPES, sizes=(1, 70, 2049, 16_385), **options)


def test_options_of_a_rule_of_two_stages(compiled):
    check("novograd", [torch.bfloat16], sizes=(1, 2049, 40_000), **ALL_OPTIONS)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, math.inf), (torch.bfloat16, math.nan), (torch.float64, -math.inf)],
    ids=name_of,
)
def test_a_gradient_that_is_not_finite_skips_the_step_on_the_device(dtype, value, compiled):
    sizes = (3, 2049)
    grads = gradients(sizes, [dtype], 4)
    grads[1][1][2048] = value
    grads[2][0][0] = value
    with triton_backend() as machine:
        found = trained("nadam", [dtype], grads, sizes, skip_nonfinite=True)
    with pyupdate.use_backend("cpu"):
        expected = trained("nadam", [dtype], grads, sizes, skip_nonfinite=True)
    assert [skipped for _, skipped, _ in found[2]] == [False, True, True, False]
    found[2][:], expected[2][:] = map(str, found[2]), map(str, expected[2])  # nan is not nan
    assert_alike(found, expected, "skipped")
    assert found[1][0]["step"] == 2.0  # as after two steps: mu_product and step have rested, too
    assert machine.launches[-2].name == "reduce_pass"


def test_finite_squares_that_overflow_do_not_skip(compiled):
    big = torch.full((5,), 2.0**100)
    with triton_backend():
        *_, said = trained("adamw", [torch.float32], [[big]], (5,), max_norm=1.0)
        *_, skips = trained("adamw", [torch.float32], [[big]], (5,), skip_nonfinite=True)
    assert said == [(math.inf, False, 0.0)]
    assert skips == [(math.inf, False, 1.0)]


def test_an_error_is_raised_before_anything_is_written(compiled):
    with triton_backend():
        param = torch.nn.Parameter(torch.ones(70))
        optimizer = pyupdate.optim.AdamW([param], max_norm=1.0, error_if_nonfinite=True)
        param.grad = torch.ones(70)
        optimizer.step()
        before = param.detach().clone()
        param.grad = torch.full((70,), math.nan)
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.step()
    assert_same_bits(param.detach(), before, "refused")
    assert optimizer.state[param]["step"] == 1.0


# ----- a scaler, read on the device -------------------------------------------------------------


def scaled_training(steps: int = 6) -> tuple[Any, ...]:
    """`update_model` with a scaler whose scale overflows twice."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 70), torch.nn.ReLU(), torch.nn.Linear(70, 1))
    pyupdate.build(model, "adamw", max_norm=0.5)
    scaler = torch.amp.GradScaler(
        "cpu", 2.0**127, growth_factor=2.0**40, backoff_factor=2.0**-40, growth_interval=2
    )
    skips = []
    for step in range(steps):
        loss = (model(torch.full((3, 5), 10.0 * (step + 1))) - 1.0) ** 2
        pyupdate.update_model(model, loss, scaler=scaler, retain_graph=False)
        scaler.update()
        skips.append(pyupdate.last_update(model).skipped)
    return [p.detach() for p in model.parameters()], skips, scaler.get_scale()


@readers
def test_update_model_with_a_scaler(compiled, by_compiled):
    with triton_backend(compiled=by_compiled):
        params, skips, scale = scaled_training()
    with pyupdate.use_backend("cpu"):
        expected, expected_skips, expected_scale = scaled_training()
    assert skips == expected_skips and True in skips and False in skips
    assert scale == expected_scale
    for x, y in zip(params, expected, strict=True):
        assert_same_bits(x, y, "parameter")


class Unread(torch.Tensor):
    """A number that may be sent to a kernel and not read."""

    def __float__(self) -> float:
        pytest.fail("the step waits for the device")

    def __bool__(self) -> bool:
        pytest.fail("the step waits for the device")

    def item(self) -> float:  # type: ignore[override]
        pytest.fail("the step waits for the device")


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_step_with_a_scaler_reads_no_number(unscaled, compiled):
    param = torch.nn.Parameter(torch.ones(70))
    optimizer = pyupdate.optim.AdamW([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with triton_backend():
        for step in range(3):
            scaler.scale(torch.zeros(()))
            param.grad = torch.full((70,), math.inf if step == 1 else 2.0)
            if unscaled:
                scaler.unscale_(optimizer)
                flags = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
                for device, flag in flags.items():
                    flags[device] = flag.as_subclass(Unread) if step else flag
            elif step:  # the first one is made in parts
                scaler._scale = scaler._scale.as_subclass(Unread)
            scaler.step(optimizer)
            if step:
                flags = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
                values = [flag.as_subclass(torch.Tensor) for flag in flags.values()]
                assert [float(value) for value in values] == [float(step == 1)]
            scaler._scale = scaler._scale.as_subclass(torch.Tensor)
            scaler._per_optimizer_states.clear()
    assert optimizer.state[param]["step"] == 2.0


# ----- rows ---------------------------------------------------------------------------------------


def test_every_small_size(compiled):
    check("adamw", [torch.bfloat16], sizes=range(71), max_norm=1.0)


@readers
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_that_are_not_aligned_are_a_launch_of_their_own(dtype, compiled, by_compiled):
    def trained_on() -> tuple[list[torch.Tensor], list[Any]]:
        rng = np.random.default_rng(9)
        values = [random_values(rng, n, dtype) for n in (1025, 1025, 20_000, 70)]
        offsets = (0, dtype.itemsize, 3 * dtype.itemsize, 0)
        memory = [held(v, offset=o) for v, o in zip(values, offsets, strict=True)]
        params = [torch.nn.Parameter(m.tensor) for m in memory]
        optimizer = pyupdate.optim.AdamW(params, max_norm=1.0)
        for _ in range(2):
            for param, offset in zip(params, (dtype.itemsize, 0, 0, 0), strict=True):
                grad = random_values(rng, param.numel(), dtype)
                param.grad = held(grad, offset=offset).tensor
            optimizer.step()
        for m in memory:
            m.assert_neighbours_untouched("parameter")
        return [p.detach() for p in params], memory

    with triton_backend(compiled=by_compiled) as machine:
        found, _ = trained_on()
    names = [launch.name for launch in machine.launches]
    assert names[-4:] == ["reduce_pass"] * 2 + ["apply_pass"] * 2
    with pyupdate.use_backend("cpu"):
        expected, _ = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y, "parameter")


@readers
def test_other_layouts(compiled, by_compiled):
    def trained_on() -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)),
            torch.nn.Parameter(torch.randn(30, 20).t()),
            torch.nn.Parameter(torch.randn(4, 6)[:, ::2]),  # left to `reference`
        ]
        optimizer = pyupdate.optim.AdamW(params, max_norm=1.0)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape)  # contiguous
            optimizer.step()
        return [p.detach().clone() for p in params], plan_of(optimizer).backends

    with triton_backend(compiled=by_compiled):
        found, names = trained_on()
    assert names == ("reference", "triton")
    with pyupdate.use_backend("cpu"):
        expected, _ = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x.contiguous(), y.contiguous(), "parameter")


@readers
def test_rows_of_other_counts(compiled, by_compiled):
    # The second parameter's gradient comes late, the first one's rests once.
    grads = gradients((70, 2049), [torch.float32], 5)
    grads[0][1] = grads[2][0] = None
    for rule in ("adamw", "nadam", "sgd_momentum"):
        with triton_backend(compiled=by_compiled):
            found = trained(rule, [torch.float32], grads, (70, 2049))
        with pyupdate.use_backend("cpu"):
            expected = trained(rule, [torch.float32], grads, (70, 2049))
        assert_alike(found, expected, rule)


def test_late_gradients_wait_for_nothing(monkeypatch, compiled):
    # Compiled code knows which rows were stepped alike by what it has done with them.
    def read(self: torch.Tensor) -> Any:
        pytest.fail("a number is read")

    def trained_on() -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.full((70,), float(k))) for k in range(3)]
        optimizer = pyupdate.optim.NAdam(params, lr=0.1)
        for step in range(5):
            for k, param in enumerate(params):
                param.grad = torch.arange(70.0) if step in (0, 4) or k != step % 3 else None
            optimizer.step()
            monkeypatch.setattr(torch.Tensor, "tolist", read)  # once there is state
            monkeypatch.setattr(torch.Tensor, "item", read)
        monkeypatch.undo()
        return [p.detach() for p in params]

    with triton_backend(compiled=True):
        found = trained_on()
    with pyupdate.use_backend("cpu"):
        expected = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y, "parameter")


@readers
def test_groups_and_schedules_share_a_launch(compiled, by_compiled):
    def trained_on() -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.full((70,), float(k))) for k in range(3)]
        groups = [{"params": [p], "lr": 0.1 * k, "maximize": k == 2} for k, p in enumerate(params)]
        optimizer = pyupdate.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            for param in params:
                param.grad = torch.arange(70.0)
            optimizer.step()
            schedule.step()
        return [p.detach() for p in params]

    with triton_backend(compiled=by_compiled) as machine:
        found = trained_on()
    assert [launch.name for launch in machine.launches] == ["prepare_pass", "apply_pass"] * 3
    with pyupdate.use_backend("cpu"):
        expected = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y, "parameter")


@readers
def test_gradients_that_move_are_followed_and_looked_at(compiled, by_compiled):
    def trained_on() -> list[torch.Tensor]:
        rng = np.random.default_rng(2)
        params = [torch.nn.Parameter(random_values(rng, n, torch.float32)) for n in (0, 70, 2049)]
        optimizer = pyupdate.optim.AdamW(params, max_norm=1.0)
        kept = []
        for step in range(5):
            for k, param in enumerate(params):
                kept.append(param.grad)
                if k != step % 3:
                    param.grad = random_values(rng, param.numel(), torch.float32)
                if step == 0:
                    param.grad = torch.ones(param.numel())
            optimizer.step()
        values = [param.detach().clone() for param in params]
        params[1].grad = optimizer.state[params[1]]["exp_avg"]
        with pytest.raises(ValueError, match="lies in the memory of state 'exp_avg'"):
            optimizer.step()
        return values

    with triton_backend(compiled=by_compiled):
        found = trained_on()
    with pyupdate.use_backend("cpu"):
        expected = trained_on()
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y, "parameter")


@readers
@pytest.mark.parametrize(
    ("change", "shift"),
    [
        (lambda opt, p: opt.load_state_dict(opt.state_dict()), 0),
        (lambda opt, p: opt.state[p]["step"].fill_(7.0), 5),
        (lambda opt, p: p.data.set_(torch.ones(70)), 0),
    ],
    ids=["load_state_dict", "step by hand", "other memory"],
)
def test_what_is_changed_between_steps_is_seen(
    change: Callable[..., Any], shift, compiled, by_compiled
):
    def trained_on() -> tuple[torch.Tensor, float]:
        param = torch.nn.Parameter(torch.arange(70.0))
        optimizer = pyupdate.optim.AdamW([param], lr=0.1)
        for step in range(4):
            if step == 2:
                change(optimizer, param)
            param.grad = torch.arange(70.0) - step
            optimizer.step()
        return param.detach(), float(optimizer.state[param]["step"])

    with triton_backend(compiled=by_compiled):
        found, count = trained_on()
    with pyupdate.use_backend("cpu"):
        expected, _ = trained_on()
    assert count == 4 + shift
    assert_same_bits(found, expected, "parameter")


# ----- what is launched ---------------------------------------------------------------------------


@readers
def test_tables_are_sent_again_only_where_a_pointer_moved(monkeypatch, compiled, by_compiled):
    from pyupdate.backends.triton import Part

    sent = []
    send = Part._send
    monkeypatch.setattr(Part, "_send", lambda self, host: (sent.append(host), send(self, host))[1])
    param = torch.nn.Parameter(torch.ones(70))
    param.grad = torch.ones(70)
    optimizer = pyupdate.optim.AdamW([param], max_norm=1.0)
    with triton_backend(compiled=by_compiled):
        for _ in range(2):
            optimizer.step()
        sent.clear()
        for _ in range(3):
            optimizer.step()
        assert not sent
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        assert [host.dtype for host in sent] == [torch.float64]  # the numbers alone
        sent.clear()
        kept = param.grad  # or the new one might lie there
        param.grad = torch.ones(70)  # the addresses alone
        optimizer.step()
        assert [host.dtype for host in sent] == [torch.int64]
        del kept
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        plan_of(optimizer).parts[0]._is_cuda = True
        optimizer.step()
        before = param.detach().clone()
        optimizer.param_groups[0]["lr"] = 0.25
        with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured.*three steps"):
            optimizer.step()
        param.grad = torch.ones(70)
        with pytest.raises(RuntimeError, match="an address or the set of gradients has changed"):
            optimizer.step()
    assert_same_bits(param.detach(), before, "refused")


@pytest.mark.parametrize(
    ("rule", "stages", "options"),
    [
        ("adamw", 1, {}),
        ("adamw", 1, {"max_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.75}),
        ("lamb", 2, {"max_norm": 1.0}),
        ("lamb", 2, {}),
    ],
)
def test_a_step_is_one_launch_and_one_a_stage(rule, stages, options, compiled):
    grads = gradients((70, 2049, 40_000), [torch.float32], 3)
    with triton_backend() as machine:
        trained(rule, [torch.float32], grads, (70, 2049, 40_000), **options)
    first = "reduce_pass" if options else "prepare_pass"
    one = [first, *["apply_pass"] * stages]
    # The first step makes its state between the check and the step.
    assert [launch.name for launch in machine.launches[-2 * len(one) :]] == one * 2
    assert len(machine.launches) <= len(one) * 3 + 1


@pytest.mark.parametrize(("rule", "kernel"), [("adamw", "reduce_pass"), ("lamb", "apply_pass")])
def test_the_last_program_sees_what_the_others_wrote(rule, kernel, compiled):
    # On one OS thread memory is in order, so the order that a GPU needs is read in the PTX.
    with triton_backend() as machine:
        trained(rule, [torch.float32], gradients((70,), [torch.float32], 2), (70,), max_norm=1.0)
    texts = {launch.text for launch in machine.launches if launch.name == kernel}
    ordered = re.compile(
        r"bar\.sync\s+0;\s[^{}]*?atom\.global\.gpu\.acq_rel\.add[^{}]*?bar\.sync\s+0;", re.S
    )
    tickets = [text for text in texts if "atom." in text]
    assert tickets
    for text in tickets:
        (found,) = ordered.findall(text)
        before, after = found.split("atom.global")
        assert "st.global" not in before and "ld.global" not in after


FORBIDDEN = re.compile(r"\b(fma|mad)\.(rn\.)?f|\.approx|\.ftz|div\.full|\.local")
MOVED = re.compile(r"bar\.sync|ldmatrix|stmatrix|st\.shared")


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in OTHER_CAPABILITIES)]
)
def test_the_ptx_keeps_the_contract_and_moves_16_bytes(capability, compiled):
    wide = {torch.float64: "v2.b64", torch.float32: "v4.b32"}
    for dtype in DTYPES:
        grads = gradients((20_000,), [dtype], 2)
        with triton_backend(capability) as machine:
            trained("adamw", [dtype], grads, (20_000,), max_norm=1.0)
        texts = {launch.name: launch.text for launch in machine.launches}
        for name, text in texts.items():
            assert not FORBIDDEN.search(text), name
        apply = texts["apply_pass"]
        assert not MOVED.search(apply)  # nothing goes from thread to thread
        size = wide.get(dtype, "v4.b32")
        assert len(re.findall(rf"ld\.global\.{size}", apply)) == 4
        assert len(re.findall(rf"st\.global\.{size}", apply)) == 3
        assert re.search(rf"ld\.global\.{size}", texts["reduce_pass"])


def test_a_row_that_is_longer_than_its_memory_is_caught(monkeypatch, compiled):
    # The harness is worth something only if it sees this.
    from pyupdate.backends.triton_rows import Entry

    columns = Entry.columns
    monkeypatch.setattr(Entry, "columns", lambda self: [*columns(self)[:-1], self.size + 1])
    with pytest.raises(AssertionError, match="out of bounds"):
        check("adamw", [torch.float32], sizes=(70,))


@pytest.mark.parametrize("size", [2048, 16_385, 100_000])
def test_sums_are_in_the_one_order(size, compiled):
    # A 1 beside 2**54 is lost in fp64, and several of them are not, so any other order shows.
    grad = torch.ones(size, dtype=torch.float64)
    grad[:: 2048 // 8 + 3] = 2.0**27
    with triton_backend():
        *_, found = trained("adamw", [torch.float64], [[grad]], (size,), max_norm=1.0)
    with pyupdate.use_backend("cpu"):
        *_, expected = trained("adamw", [torch.float64], [[grad]], (size,), max_norm=1.0)
    assert found == expected
