"""An accelerator that is emulated on the CPU, to run code for GPUs where there is none, or a real one.

Inside `emulated_device`, tensors may be on ``torch.device("emulated")``. They hold a tensor of the CPU, on which all
operations run. As on a GPU, an operation on tensors of two devices raises an error, and reads of values make the host
wait, which is counted. Autograd, optimizers and `generate` work. Registering the device changes PyTorch for the whole
process: `torch.accelerator` has it afterwards.

With ``STREAMLINE_TEST_DEVICE=cuda`` the same tests run on a GPU, and the same operations are counted there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_EMULATED = "emulated"
NAME = os.environ.get("STREAMLINE_TEST_DEVICE", _EMULATED)
IS_SUPPORTED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
_COPYING = ("aten::_to_copy", "aten::copy_")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
_JOINING = ("aten::cat", "aten::stack")
_WAITING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave",
)


class EmulatedTensor(Tensor):
    """A tensor on the emulated device, with the size and strides of a tensor on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> EmulatedTensor:
        """Wrap a tensor on the CPU."""
        tensor: EmulatedTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.raw = raw
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"EmulatedTensor({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_on_cpu(func, args, kwargs or {}, Counter())


def run_on_cpu(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    """Run an operation on the tensors of the CPU, and wrap its results if its inputs were on the emulated device."""
    name = func._schema.name
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    emulated = [tensor for tensor in tensors if isinstance(tensor, EmulatedTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, EmulatedTensor)]
    if emulated and others and name not in _COPYING:
        # As on a GPU, indices may be on the CPU, and numbers in operations that are neither in place nor join tensors.
        if name in _INDEXING:
            is_mixed = not isinstance(tensors[0], EmulatedTensor) or (
                name != "aten::index" and not isinstance(args[2], EmulatedTensor) and bool(args[2].ndim)
            )
        else:
            in_place = name.endswith("_") and not isinstance(tensors[0], EmulatedTensor)
            is_mixed = any(t.ndim for t in others) or in_place or name in _JOINING
        if is_mixed:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu in {name}.")
    device = kwargs.get("device")
    wraps = bool(emulated) if device is None else _is_emulated(device)
    if name == "aten::copy_":
        wraps = isinstance(args[0], EmulatedTensor)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if emulated and (name in _WAITING or (name in _COPYING and not wraps)):
        waits[name] += 1
    if name in _COPYING and wraps and not isinstance(tensors[-1], EmulatedTensor):
        waits["upload"] += 1
    if emulated and name in _INDEXING:
        waits["mask"] += any(t.dtype == torch.bool for t in tensors[1:])
        waits["upload"] += any(not isinstance(t, EmulatedTensor) for t in tensors[1:])
    output = func(*tree_map(_raw_of, args), **tree_map(_raw_of, kwargs))
    same = {id(tensor.raw): tensor for tensor in emulated}  # the result of an operation in place is its input

    def wrap(value: Any) -> Any:
        if not wraps or not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else EmulatedTensor(value)

    return tree_map(wrap, output)


class _Operations(TorchDispatchMode):
    """Run all operations, also those that create tensors on the emulated device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_on_cpu(func, args, kwargs or {}, self.waits)


class _Functions(TorchFunctionMode):
    """Run functions that PyTorch does not dispatch as operations."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_emulated(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        if func is Tensor.new_tensor and isinstance(args[0], EmulatedTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(NAME)
        if func is Tensor.tolist and isinstance(args[0], EmulatedTensor):
            self.waits["tolist"] += 1
            return args[0].raw.tolist()
        return func(*args, **kwargs)


class _Counting(TorchDispatchMode):
    """Count the operations on a real accelerator for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        output = func(*args, **kwargs)
        is_there = any(isinstance(t, Tensor) and t.device.type == NAME for t in tree_leaves((args, kwargs)))
        leaves = isinstance(output, Tensor) and output.device.type == "cpu" and name in _COPYING
        self.waits[name] += is_there and (name in _WAITING or leaves)
        return output


@contextmanager
def emulated_device() -> Iterator[Counter[str]]:
    """Make the device available; yield a count of the operations for which the host waits, by name."""
    if NAME != _EMULATED:
        with _Counting() as counting:
            yield counting.waits
        return
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME)
    operations = _Operations()
    with operations, _Functions(operations.waits):
        yield operations.waits


def _is_emulated(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _raw_of(value: Any) -> Any:
    return value.raw if isinstance(value, EmulatedTensor) else value
