# SPDX-License-Identifier: Apache-2.0
"""The shape lists against what the models' papers and authors state, the counts by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
def test_bytes_of_an_adamw_parameter_by_hand(kind, foreach, fused, apex, ours):
    of = 16 * 24
    found = {name: count([(16, 24)], kind) for name, count in predicted.CONTESTANTS.items()}
    assert {name: count.bytes / of for name, count in found.items()} == {
        "torch foreach": foreach,
        "torch fused": fused,
        "apex": apex,
        "pyupdate": ours,
    }


def test_our_launches_do_not_depend_on_tensors_and_groups():
    import torch

    def params(count, dtype=torch.float32):
        return [
            torch.nn.Parameter(torch.empty(3, dtype=dtype, device="meta")) for _ in range(count)
        ]

    one = pyupdate.optim.AdamW(params(1))
    many = pyupdate.optim.AdamW([{"params": params(5), "lr": lr} for lr in (0.1, 0.2, 0.3)])
    assert predicted.launches(one) == predicted.launches(many) == 2
    mixed = pyupdate.optim.AdamW([*params(2), *params(2, torch.bfloat16)], amsgrad=True)
    assert predicted.launches(mixed) == 4
    assert predicted.launches(pyupdate.optim.LAMB(params(7))) == 3


def test_the_table_says_that_it_predicts(capsys):
    table = predicted.table()
    assert table.count("\n") == 1 + 4 * len(predicted.KINDS) * len(predicted.CONTESTANTS)
    # 124,439,808 x 28 bytes at 3,352 GB/s
    assert "| GPT-2 124M, 124,439,808 | step | pyupdate | 28 | 2 | 1.709 | 1.039 | 0.436 |" in table
