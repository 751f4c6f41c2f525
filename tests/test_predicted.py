# SPDX-License-Identifier: Apache-2.0
"""Shape lists against what their authors state; counts by hand, and beside what was launched."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from device_on_cpu import cuda_on_cpu
from ways import plan_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import predicted
import shapes

import pyupdate


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("ResNet-50", 161, 25_557_032),
        ("ViT-B/16", 152, 86_567_656),
        ("GPT-2 124M", 148, 124_439_808),
        ("Llama 1B", 146, 1_235_814_400),
        ("1,000 tiny", 1000, 256_000),
        ("one of 100M", 1, 100_000_000),
    ],
)
def test_models_have_the_parameters_that_their_authors_state(name, tensors, parameters):
    made = shapes.MODELS[name].make(1.0)
    assert (len(made), shapes.elements(made)) == (tensors, parameters)


def test_a_larger_machine_gets_more_of_a_model_and_never_more_than_all():
    model = shapes.MODELS["GPT-2 124M"]
    sizes = [shapes.elements(model.shapes(scale)) for scale in (1, 2, 4, 100)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert sizes[-1] == sizes[-2] == 124_439_808


@pytest.mark.parametrize(
    ("count", "size", "lists", "launches"),
    [
        (252, 256, 4, 1),  # full of tensors
        (253, 256, 4, 2),
        (2000, 256, 4, 8),
        (1, 65_536 * 2240, 4, 1),  # full of blocks
        (1, 65_536 * 2240 + 1, 4, 2),
        (3, 65_536 * 2239, 4, 3),  # the second and third are cut
        (1, 1, 1, 1),
    ],
)
def test_multi_tensor_launches_by_hand(count, size, lists, launches):
    assert predicted.TORCH.launches([(size,)] * count, lists) == launches


@pytest.mark.parametrize(
    ("kind", "foreach", "fused", "apex", "ours"),
    [
        ("step", 80, 28, 28, 28),
        ("clip", 92, 40, 40, 32),
        ("scaler", 88, 36, 36, 32),
        ("scaler + clip", 100, 48, 48, 32),
        ("scaler + clip + average", 112, 60, 60, 40),
    ],
)
def test_bytes_of_an_adamw_parameter_by_hand(kind, foreach, fused, apex, ours, recorded_module):
    of = 16 * 24
    found = {name: count([(16, 24)], kind) for name, count in predicted.CONTESTANTS.items()}
    assert {name: count.bytes / of for name, count in found.items()} == {
        "torch foreach": foreach,
        "torch fused": fused,
        "apex": apex,
        "pyupdate": ours,
    }


FLOAT, HALF = torch.float32, torch.bfloat16


def params(count: int, *dtypes: torch.dtype, device: str = "meta") -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(torch.ones(3 + k, dtype=dtype, device=device))
        for dtype in dtypes
        for k in range(count)
    ]


def test_our_launches_do_not_depend_on_tensors_and_groups(recorded_module):
    one = pyupdate.optim.AdamW(params(1, FLOAT))
    groups = [{"params": params(5, FLOAT), "lr": lr} for lr in (0.1, 0.2, 0.3)]
    assert predicted.planned(one).launches == 2
    assert predicted.planned(pyupdate.optim.AdamW(groups)).launches == 2


# The launches by hand: one for all gradients, then a stage of a rule in a storage each.
STEPS: dict[str, tuple[Callable[[list[Any]], Any], tuple[torch.dtype, ...], int]] = {
    "AdamW": (pyupdate.optim.AdamW, (FLOAT,), 2),
    "AdamW with a norm": (partial(pyupdate.optim.AdamW, max_norm=1.0), (FLOAT,), 2),
    "AdamW with an average": (partial(pyupdate.optim.AdamW, ema_decay=0.9), (FLOAT,), 2),
    "LAMB": (partial(pyupdate.optim.LAMB, max_norm=1.0), (FLOAT,), 3),
    "mixed dtypes": (partial(pyupdate.optim.AdamW, amsgrad=True), (FLOAT, HALF, FLOAT), 3),
    "LAMB, mixed, an average": (partial(pyupdate.optim.LAMB, ema_decay=0.9), (HALF, FLOAT), 5),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_plan_says_what_a_step_launches_and_moves(name, recorded_module):
    make, dtypes, launches = STEPS[name]
    count = predicted.planned(make(params(4, *dtypes)))
    assert count.launches == launches

    listed = params(4, *dtypes, device="cpu")
    optimizer = make(listed)
    with cuda_on_cpu(recorded_module):
        for _ in range(3):  # the first one makes the state
            recorded_launches(recorded_module)
            for param in listed:
                param.grad = torch.ones_like(param)
            optimizer.step()
            made = recorded_launches(recorded_module)
            (part,) = plan_of(optimizer).parts
            said = part.plan.launches(reduce=True)
            assert [(kernel, stage) for kernel, stage, _, _ in made] == [
                (kernel, stage) for kernel, stage, _ in said
            ]
            assert len(made) == launches
            # A tensor of this size is one item of work.
            assert [items for _, _, _, items in made[1:]] == [len(moves) for *_, moves in said[1:]]
    # By Python from the text of the rule, where the plan has what the kernels were compiled to do.
    total = sum(param.numel() for param in listed)
    assert count.bytes == total * pyupdate.bytes_per_parameter(optimizer)


def recorded_launches(module: Any) -> list[tuple[str, int, int, int]]:
    """The kernel, stage, storage and items of what was launched since it was asked last."""
    text = ctypes.create_string_buffer(1 << 16)
    ctypes.CDLL(module.__file__).recorded_launches(text, ctypes.c_int64(len(text)))
    lines = [line.rsplit(" ", 3) for line in text.value.decode().splitlines()]
    return [(kernel, int(stage), int(of), int(items)) for kernel, stage, of, items in lines]


def test_the_table_says_that_it_predicts(recorded_module):
    table = predicted.table()
    assert table.count("\n") == 1 + 4 * len(predicted.KINDS) * len(predicted.CONTESTANTS)
    # 124,439,808 x 28 bytes at 3,352 GB/s
    assert "| GPT-2 124M, 124,439,808 | step | pyupdate | 28 | 2 | 1.709 | 1.039 | 0.436 |" in table
