"""Device and precision: of what is put in, and of what was out while the model was moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from streamline_hooks.offload import execution_device

Placement = dict[str, tuple[torch.device, torch.dtype]]


def placement(block: nn.Module) -> Placement:
    """The device and precision of each parameter and buffer of a block."""
    return {name: (tensor.device, tensor.dtype) for name, tensor in _tensors(block).items()}


def move_beside(module: nn.Module, block: nn.Module) -> None:
    """Give a module a block's mode, and the device and the precision that most of its parameters have."""
    module.train(block.training)
    if any(parameter.is_meta for parameter in module.parameters()):
        return  # a copy of an offloaded block, which accelerate brings to where it runs
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for parameter in block.parameters():
        if parameter.is_floating_point():
            key = (parameter.device, parameter.dtype)
            sizes[key] = sizes.get(key, 0) + parameter.numel()
    if sizes:
        device, dtype = max(sizes, key=lambda key: sizes[key])
        module.to(device=execution_device(block) if device.type == "meta" else device, dtype=dtype)


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
