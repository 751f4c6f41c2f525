# SPDX-License-Identifier: Apache-2.0
"""The shapes of real models' parameters, made from their architectures, in their modules' order.

    python benchmarks/shapes.py    # every model with its number of tensors and parameters

`depth` cuts a model to a part of its blocks, for machines that its whole does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


def _linear(outputs: int, inputs: int, *, bias: bool = True) -> list[Shape]:
    return [(outputs, inputs), *([(outputs,)] if bias else [])]


def _norm(width: int) -> list[Shape]:
    """Scale and shift."""
    return [(width,), (width,)]


def resnet50(depth: float = 1.0) -> list[Shape]:
    """He et al. 2015, arXiv:1512.03385: bottlenecks of 3, 4, 6 and 3, for 1,000 classes."""
    shapes: list[Shape] = [(64, 3, 7, 7), *_norm(64)]
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(_part(blocks, depth)):
            shapes += [(width, inputs, 1, 1), *_norm(width)]
            shapes += [(width, width, 3, 3), *_norm(width)]
            shapes += [(4 * width, width, 1, 1), *_norm(4 * width)]
            if block == 0:  # the shortcut changes its width
                shapes += [(4 * width, inputs, 1, 1), *_norm(4 * width)]
            inputs = 4 * width
    return [*shapes, *_linear(1000, inputs)]


def vit_b16(depth: float = 1.0) -> list[Shape]:
    """Dosovitskiy et al. 2020, arXiv:2010.11929: ViT-B/16 on 224 x 224, for 1,000 classes."""
    width = 768
    shapes: list[Shape] = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    for _ in range(_part(12, depth)):
        shapes += [*_norm(width), *_linear(3 * width, width), *_linear(width, width)]
        shapes += [*_norm(width), *_linear(4 * width, width), *_linear(width, 4 * width)]
    return [*shapes, *_norm(width), *_linear(1000, width)]


def gpt2(depth: float = 1.0) -> list[Shape]:
    """Radford et al. 2019: the smallest GPT-2, whose output layer is its embedding."""
    width = 768
    shapes: list[Shape] = [(50257, width), (1024, width)]
    for _ in range(_part(12, depth)):
        shapes += [*_norm(width), *_linear(3 * width, width), *_linear(width, width)]
        shapes += [*_norm(width), *_linear(4 * width, width), *_linear(width, 4 * width)]
    return [*shapes, *_norm(width)]


def llama_1b(depth: float = 1.0) -> list[Shape]:
    """Llama 3.2 of 1B (Grattafiori et al. 2024, arXiv:2407.21783): 16 blocks, 8 key-value heads."""
    width, inner, keys = 2048, 8192, 8 * 64
    shapes: list[Shape] = [(128256, width)]
    for _ in range(_part(16, depth)):
        shapes += [(width, width), (keys, width), (keys, width), (width, width)]
        shapes += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [*shapes, (width,)]


def llama_block(depth: float = 1.0) -> list[Shape]:
    """The blocks of `llama_1b` without what stands around them."""
    return llama_1b(depth)[1:-1]


def matrices_of_vit(depth: float = 1.0) -> list[Shape]:
    """Those of the blocks of `vit_b16`: what Muon is for."""
    return [shape for shape in vit_b16(depth)[4:-2] if len(shape) == 2]


def dlrm(depth: float = 1.0) -> list[Shape]:
    """Naumov et al. 2019, arXiv:1906.00091, with four embeddings of half a million rows."""
    rows, width = _part(500_000, depth), 64
    shapes: list[Shape] = [(rows, width)] * 4
    for inputs, outputs in ((13, 512), (512, 256), (256, width)):
        shapes += _linear(outputs, inputs)
    pairs = 5 * 4 // 2  # products of the four embeddings and the dense features
    for inputs, outputs in ((width + pairs, 512), (512, 256), (256, 1)):
        shapes += _linear(outputs, inputs)
    return shapes


def tiny(count: int) -> list[Shape]:
    """So many tensors of 256 elements: what a step costs beside its memory."""
    return [(256,)] * count


def _part(blocks: int, depth: float) -> int:
    return max(1, round(blocks * depth))


@dataclass(frozen=True)
class Model:
    """A shape list by name.

    Attributes:
        make: its shapes, for a part of the blocks.
        depth: the part that two cores and 24 GiB take in a benchmark's time.
    """

    name: str
    make: Callable[[float], list[Shape]]
    depth: float = 1.0

    def shapes(self, scale: float = 1.0) -> tuple[Shape, ...]:
        """Its shapes for a machine `scale` times as large, at most the whole model."""
        return tuple(self.make(min(1.0, self.depth * scale)))


MODELS = {
    model.name: model
    for model in (
        Model("ResNet-50", resnet50),
        Model("ViT-B/16", vit_b16, 0.5),
        Model("GPT-2 124M", gpt2, 0.25),
        Model("Llama 1B", llama_1b, 1 / 16),
        Model("Llama blocks", llama_block, 1 / 16),
        Model("ViT-B/16 matrices", matrices_of_vit, 1 / 12),
        Model("DLRM", dlrm, 0.25),
        Model("1,000 tiny", lambda _: tiny(1000)),
        Model("5,000 tiny", lambda _: tiny(5000)),
        Model("one of 100M", lambda depth: [(_part(100_000_000, depth),)]),
    )
}


def elements(shapes: tuple[Shape, ...] | list[Shape]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(prod(shape) for shape in shapes)


def main() -> None:
    for model in MODELS.values():
        whole, here = model.make(1.0), model.shapes()
        print(
            f"{model.name:18} {len(whole):5} tensors {elements(whole):13,} parameters; "
            f"by default {len(here):5} and {elements(here):13,}"
        )


if __name__ == "__main__":
    main()
