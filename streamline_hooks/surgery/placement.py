"""Device and precision: of what is put in, and of what was out while the model was moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from streamline_hooks.offload import execution_device

Placement = dict[str, tuple[torch.device, torch.dtype]]


def placement(block: nn.Module) -> Placement:
    """The device and precision of each parameter and buffer of a block."""
    return {name: (tensor.device, tensor.dtype) for name, tensor in _tensors(block).items()}


def move_beside(module: nn.Module, block: nn.Module) -> None:
    """Give a module a block's mode, and the device and the precision that most of its parameters have.

    A module most of which has that precision keeps what it holds in another one: a copy of a block whose router is in
    float32 would be another block with that rounded.
    """
    module.train(block.training)
    found = None if _offloaded(module) else _most(block)
    if found is not None:
        mine = _most(module)
        module.to(device=found[0], dtype=None if mine is not None and mine[1] == found[1] else found[1])


def bring_to(module: nn.Module, block: nn.Module) -> Callable[[], None]:
    """Bring a module that is in the model to a block's device, as it is; what is returned brings it back."""
    held = next(module.parameters(), None)
    found = None if held is None or _offloaded(module) else _most(block)
    device = None if held is None or found is None else found[0]
    if held is None or device is None or device == held.device:
        return lambda: None
    before = held.device
    module.to(device=device)

    def bring_back() -> None:
        module.to(device=before)

    return bring_back


def _offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings it to where it runs."""
    return any(parameter.is_meta for parameter in module.parameters())


def _most(block: nn.Module) -> tuple[torch.device | None, torch.dtype] | None:
    """The device and the precision of most of a block's parameters; None where it has none."""
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for parameter in block.parameters():
        if parameter.is_floating_point():
            key = (parameter.device, parameter.dtype)
            sizes[key] = sizes.get(key, 0) + parameter.numel()
    if not sizes:
        return None
    device, dtype = max(sizes, key=lambda key: sizes[key])
    return (execution_device(block) if device.type == "meta" else device), dtype


def follow(blocks: Sequence[nn.Module], kept: Iterable[int], before: Sequence[Placement]) -> None:
    """Bring the blocks that were out to where a ``model.to(...)`` has brought the others meanwhile.

    Parameters
    ----------
    blocks : sequence of torch.nn.Module
        All blocks of the stack.
    kept : iterable of int
        Those that were in the model.
    before : sequence of Placement
        Of all blocks, before.
    """
    present = set(kept)
    moved = {
        before[k][name]: (tensor.device, tensor.dtype)
        for k in present
        for name, tensor in _tensors(blocks[k]).items()
        if name in before[k]
    }
    for k, block in enumerate(blocks):
        for name, tensor in _tensors(block).items() if k not in present else ():
            target = moved.get(before[k].get(name, (tensor.device, tensor.dtype)))
            if target is None or tensor.is_meta or target[0].type == "meta":
                continue  # accelerate has the values
            if target != (tensor.device, tensor.dtype):
                tensor.data = tensor.data.to(device=target[0], dtype=target[1])


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict([*block.named_parameters(), *block.named_buffers()])
