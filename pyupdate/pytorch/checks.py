# SPDX-License-Identifier: Apache-2.0
"""What a step accepts, and the words of every refusal. One text for all back ends.

The compiled plan looks at a row in nanoseconds and hands it over here when anything is unusual;
the reference back end calls this for every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy
from torch.optim import optimizer as torch_optimizer

from . import state

STORAGES: dict[torch.dtype, str] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""The dtypes that a step takes, with the names that compiled modules use."""

_ACCEPTED = "accepted are dense tensors of float64, float32, bfloat16 and float16"


def owns_its_memory(kind: type) -> bool:
    """Whether tensors of this type are their own memory, not wrappers (DTensor, fake tensors)."""
    dispatch = getattr(kind, "__torch_dispatch__", None)
    return dispatch is torch._C._disabled_torch_dispatch_impl


def check_parameter(param: torch.Tensor, name: str) -> None:
    """Refuse what no back end can step, whatever its values.

    Raises:
        TypeError: names the parameter, what it is, what is accepted and the mend.
    """
    _check_kind(param, f"parameter '{name}'")
    if param.dtype.is_complex:
        message = (
            f"parameter '{name}' is complex ({param.dtype}); {_ACCEPTED}: "
            "keep it as torch.view_as_real(...) of its values"
        )
        raise TypeError(message)
    if param.dtype not in STORAGES:
        message = f"parameter '{name}' has dtype {param.dtype}; {_ACCEPTED}"
        raise TypeError(message)


def check_gradient(param: torch.Tensor, grad: torch.Tensor, name: str) -> None:
    """Refuse a gradient that does not belong to its parameter.

    Raises:
        TypeError: its kind or dtype.
        ValueError: its device or shape.
    """
    if grad.layout is not torch.strided:
        message = (
            f"the gradient of '{name}' is sparse ({grad.layout}); pyupdate steps dense gradients: "
            "make the layer with sparse=False, or step it with torch.optim.SparseAdam"
        )
        raise TypeError(message)
    _check_kind(grad, f"the gradient of '{name}'")
    what, mend = f"the gradient of '{name}'", "set .grad to one that is alike"
    _check_alike(param, grad, (param.dtype,), what, mend)


def check_entry(inner: object, name: str) -> None:
    """Refuse what stands in the place of a parameter's state and is no dict.

    Raises:
        TypeError: names the parameter, and what it is.
    """
    if not isinstance(inner, dict):
        message = (
            f"the state of '{name}' is a {type(inner).__name__}, not a dict: delete it with "
            "optimizer.state.pop(parameter), or load a state dict that fits"
        )
        raise TypeError(message)


def check_state(param: torch.Tensor, value: object, key: str, name: str) -> None:
    """Refuse state that does not belong to its parameter.

    Raises:
        TypeError: it is no tensor, or of the wrong kind or dtype.
        ValueError: its device or shape.
    """
    what = f"state '{key}' of '{name}'"
    if not isinstance(value, torch.Tensor):
        message = f"{what} is {type(value).__name__}, not a tensor: load a state dict that fits"
        raise TypeError(message)
    _check_kind(value, what)
    mend = "load a state dict that fits this model"
    if param.dtype in state.HALVES:
        mend = "convert it to torch.float32, or " + mend
    _check_alike(param, value, state.dtypes_of(param), what, mend)


def check_average(param: torch.Tensor, value: object, key: str, name: str) -> None:
    """Refuse an average that does not belong to its parameter.

    Raises:
        TypeError: it is no tensor, or of the wrong kind or dtype.
        ValueError: its device or shape.
    """
    what = f"state '{key}' of '{name}'"
    wanted = state.compute_type(param)
    mend = f"delete it, or give one of {wanted}"
    if not isinstance(value, torch.Tensor):
        message = f"{what} is {type(value).__name__}, not a tensor: {mend}"
        raise TypeError(message)
    _check_kind(value, what)
    if value.dtype is param.dtype is not wanted:
        message = (
            f"{what} is {value.dtype}, but the average of a {param.dtype} parameter is kept in "
            f"{wanted}: torch's load_state_dict has rounded it. Call pyupdate.accelerate with "
            "ema_decay before load_state_dict, or delete it to begin the average anew"
        )
        raise TypeError(message)
    _check_alike(param, value, (wanted,), what, mend)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one piece of memory, each in a place of its own."""
    reach = 1
    dims = [(s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    for stride, size in sorted(dims):
        if stride != reach:
            return tensor.numel() == 0
        reach *= size
    return True


def check_one_dtype(states: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse state of which a part was kept in float32 and a part was not.

    Raises:
        TypeError: names the dtypes.
    """
    found = {key: value.dtype for key, value in states.items()}
    if len(set(found.values())) > 1:
        said = ", ".join(f"'{key}' {dtype}" for key, dtype in found.items())
        message = (
            f"the states of '{name}' have different dtypes ({said}): convert them to one, "
            "torch.float32 without loss"
        )
        raise TypeError(message)


def check_scalar(value: object, key: str, name: str) -> None:
    """Refuse scalar state that is not one number.

    Raises:
        TypeError: it is no floating tensor.
        ValueError: it is not of one element.
    """
    what = f"state '{key}' of '{name}'"
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.float64):
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        message = f"{what} must be a tensor of float32 or float64, but is {found}"
        raise TypeError(message)
    if value.numel() != 1:
        message = f"{what} must hold one number, but has shape {tuple(value.shape)}"
        raise ValueError(message)


def check_step(value: object, name: str) -> None:
    """Refuse a step counter that counts nothing; one on a GPU is not read, which would wait for it.

    Raises:
        TypeError: it is no floating tensor.
        ValueError: it is not one whole number from 0 to 2**53.
    """
    check_scalar(value, "step", name)
    assert isinstance(value, torch.Tensor)
    if value.device.type != "cpu":
        return
    count = float(value)
    if not 0.0 <= count < 2.0**53 or count != int(count):
        message = f"state 'step' of '{name}' must be a whole number from 0 on, but is {count}"
        raise ValueError(message)


def _check_kind(tensor: torch.Tensor, what: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        message = f"{what} is {type(tensor).__name__}, not a tensor"
        raise TypeError(message)
    kind = None
    if is_lazy(tensor):
        message = f"{what} is uninitialised: run a forward pass of its lazy module first"
        raise TypeError(message)
    if not owns_its_memory(type(tensor)):
        kind = f"a {type(tensor).__name__}, which wraps other tensors"
    elif tensor.layout is not torch.strided:
        kind = f"sparse or blocked ({tensor.layout})"
    elif tensor.is_quantized:
        kind = f"quantised ({tensor.dtype})"
    elif tensor.is_nested:
        kind = "nested"
    elif tensor.is_inference() and not torch.is_inference_mode_enabled():
        kind = (
            "an inference tensor, which torch lets nobody write outside of torch.inference_mode(): "
            "give it memory of its own with .clone()"
        )
    elif tensor.is_neg():
        kind = "lazily negated: give it memory of its own with .resolve_neg()"
    elif tensor.device.type == "meta":
        kind = "on the meta device and has no values: give it some with to_empty() and a reset"
    elif tensor.numel() and tensor.data_ptr() == 0:
        kind = "without memory: its storage was freed (resize_(0)); bring it back before the step"
    elif not _lies_within(tensor):
        kind = "larger than its storage, which was resized: give it memory of its own"
    if kind is not None:
        message = f"{what} is {kind}; {_ACCEPTED}"
        raise TypeError(message)


def _lies_within(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in sizes)
    return (last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _check_alike(
    param: torch.Tensor,
    other: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    what: str,
    mend: str,
) -> None:
    if other.dtype not in dtypes:
        message = f"{what} has dtype {other.dtype}, but the parameter {param.dtype}: {mend}"
        raise TypeError(message)
    if other.device != param.device:
        message = f"{what} is on {other.device}, but the parameter on {param.device}: {mend}"
        raise ValueError(message)
    if other.shape != param.shape:
        message = (
            f"{what} has shape {tuple(other.shape)}, but the parameter {tuple(param.shape)}: {mend}"
        )
        raise ValueError(message)


# ----- memory that is shared ----------------------------------------------------------------------


class Memory(NamedTuple):
    """A tensor that a step touches, with the words for it."""

    what: str
    tensor: torch.Tensor
    written: bool


class _Extent(NamedTuple):
    start: int
    end: int
    memory: Memory


def check_memory(memories: Sequence[Memory]) -> None:
    """Refuse a step that writes one place twice, or reads a gradient where it writes.

    Exact: interleaved views of one storage are fine as long as no element is shared.

    Raises:
        ValueError: names both tensors.
    """
    devices: dict[torch.device, list[_Extent]] = {}
    for memory in memories:
        tensor = memory.tensor
        if tensor.numel() == 0:
            continue
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        extent = _Extent(start, start + (last + 1) * tensor.element_size(), memory)
        devices.setdefault(tensor.device, []).append(extent)
    for extents in devices.values():
        extents.sort(key=lambda extent: extent.start)
        cluster: list[_Extent] = []
        end = 0
        for extent in extents:
            if extent.start >= end:
                _check_cluster(cluster)
                cluster = []
            cluster.append(extent)
            end = max(end, extent.end)
        _check_cluster(cluster)


def _check_cluster(cluster: list[_Extent]) -> None:
    """Mark every byte of tensors whose extents meet; a byte that is written is marked once."""
    plain = len(cluster) == 1 and (
        not cluster[0].memory.written or _is_plainly_injective(cluster[0].memory.tensor)
    )
    if not cluster or plain or not any(extent.memory.written for extent in cluster):
        return
    start = cluster[0].start
    span = max(extent.end for extent in cluster) - start
    marks = torch.zeros(span, dtype=torch.uint8, device="cpu")
    for extent in sorted(cluster, key=lambda extent: not extent.memory.written):
        what, tensor, written = extent.memory
        size = tensor.element_size()
        view = marks.as_strided(
            (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1), extent.start - start
        )
        if bool(view.any()):
            other = _who_else(cluster, extent)
            verb = "shares memory with" if written else "lies in the memory of"
            mend = "give each its own (tie weights by one Parameter, not by two)"
            message = f"{what} {verb} {other}, which the step writes: {mend}"
            raise ValueError(message)
        if not written:
            continue
        before = int(marks.sum())
        if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            expanded = True
        else:
            index = torch.arange(marks.numel(), device="cpu").as_strided(
                view.shape, view.stride(), view.storage_offset()
            )
            marks[index.reshape(-1)] = 1
            expanded = int(marks.sum()) - before != view.numel()
        if expanded:
            message = (
                f"{what} is expanded or overlaps itself (shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}): several elements are one place; give it memory of its own "
                "with .clone()"
            )
            raise ValueError(message)


def _who_else(cluster: list[_Extent], extent: _Extent) -> str:
    for other in cluster:
        meets = other.start < extent.end and extent.start < other.end
        if other is not extent and other.memory.written and meets:
            return other.memory.what
    return "another tensor"


def _is_plainly_injective(tensor: Any) -> bool:
    reach = 1
    dims = [(s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    for stride, size in sorted(dims):
        if stride < reach:
            return False
        reach += stride * (size - 1)
    return True


def check_capturable(group: Mapping[str, Any]) -> None:
    """Refuse what a device cannot capture.

    Raises:
        AssertionError: torch's own words.
    """
    supported = torch_optimizer._get_capturable_supported_devices()
    for param in group["params"]:
        if param.grad is not None and param.device.type not in supported:
            message = (
                "If capturable=True, params and state_steps must be on supported devices: "
                f"{supported}."
            )
            raise AssertionError(message)
