"""Keep the device, dtype and flags of inserted and of removed blocks in line with the model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from streamline_hooks.core import execution_device
from streamline_hooks.modeling import BlockStack

Placement = dict[str, tuple[torch.device, torch.dtype]]


def placement_by_name(module: nn.Module) -> Placement:
    """Return the device and dtype of each parameter and buffer of a module."""
    return _placements(_named_tensors(module))


def match_block(module: nn.Module, block: nn.Module) -> None:
    """Set the mode, device and dtype of a module to those of most parameters of a block.

    If most parameters of the module already have the dtype, the others keep theirs. A copy of a block with a float32
    router would otherwise be rounded.
    """
    module.train(block.training)
    target = None if _offloaded(module) else _main_device_and_dtype(block)
    if target is not None:
        module.to(device=target[0], dtype=matched_dtype(module, block))


def matched_dtype(module: nn.Module, block: nn.Module) -> torch.dtype | None:
    """Return the dtype that `match_block` gives to all parameters of a module, or None if they keep their dtypes."""
    target, current = _main_device_and_dtype(block), _main_device_and_dtype(module)
    return None if target is None or (current is not None and current[1] == target[1]) else target[1]


def move_to_device_of(module: nn.Module, block: nn.Module) -> Callable[[], None]:
    """Move a module to the device of a block without changing its dtype, and return a function that undoes it."""
    parameter = next(module.parameters(), None)
    target = None if parameter is None or _offloaded(module) else _main_device_and_dtype(block)
    if parameter is None or target is None or target[0] in (None, parameter.device):
        return lambda: None
    original = parameter.device
    module.to(device=target[0])

    def bring_back() -> None:
        module.to(device=original)

    return bring_back


def _offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the parameters of a module on demand."""
    return any(parameter.is_meta for parameter in module.parameters())


def _main_device_and_dtype(block: nn.Module) -> tuple[torch.device | None, torch.dtype] | None:
    """Return the device and dtype of most of a block's parameters, or None if it has none."""
    sizes = Counter[tuple[torch.device, torch.dtype]]()
    for parameter in block.parameters():
        if parameter.is_floating_point():
            sizes[parameter.device, parameter.dtype] += parameter.numel()
    if not sizes:
        return None
    ((device, dtype), _) = sizes.most_common(1)[0]
    return (execution_device(block) if device.type == "meta" else device), dtype


class TrainWithRemoved:
    """Replacement of ``train`` of a stack's container, so that ``model.eval()`` also reaches the removed blocks.

    A copy of the model has the container's original method.
    """

    def __init__(self, container: nn.Module, removed: Sequence[nn.Module] = ()) -> None:
        self._container, self._removed, self.earlier = container, removed, vars(container).get("train")

    def __reduce__(self) -> tuple[type[TrainWithRemoved], tuple[nn.Module]]:
        return TrainWithRemoved, (self._container,)

    def __call__(self, mode: bool = True) -> nn.Module:
        """Set the mode of the removed blocks and of the container."""
        for block in self._removed:
            block.train(mode)
        container = self._container
        result: nn.Module = type(container).train(container, mode) if self.earlier is None else self.earlier(mode)
        return result


class BlockStates:
    """Record device, dtype, mode and ``requires_grad`` of a stack, so that removed blocks can follow the model."""

    def __init__(self, stack: BlockStack) -> None:
        self._placements = [placement_by_name(block) for block in stack.blocks]
        self._placement_outside = _placements(_tensors_outside(stack))
        self._flags = _Flags(stack)

    def follow(self, stack: BlockStack, kept: Iterable[int]) -> None:
        """Apply to the removed blocks what was done to the model while they were removed.

        Removed blocks are moved like the remaining ones by ``model.to(...)``; see `follow_flags` for the flags.
        """
        present = set(kept)
        if len(present) < len(stack):
            now = _placements(_tensors_outside(stack))
            moved = {before: now[name] for name, before in self._placement_outside.items() if name in now}
            _follow_placement(stack.blocks, present, self._placements, moved)
        self.follow_flags(stack, present)

    def follow_flags(self, stack: BlockStack, kept: Iterable[int]) -> None:
        """Apply to the removed blocks the changes of mode and ``requires_grad`` since the last call.

        A module or parameter of a removed block follows those at the same path in the remaining blocks that had the
        same value before, if all of these agree. Without such counterparts it follows a change of the whole stack or
        model.
        """
        present, before, now = set(kept), self._flags, _Flags(stack)
        removed = [k for k in range(len(stack)) if k not in present]
        is_changed = False
        if removed:
            modes = _Changes(before.modes, now.modes, present, [(before.container_mode, now.container_mode)])
            outside = [(before.outside[name], value) for name, value in now.outside.items() if name in before.outside]
            grads = _Changes(before.grads, now.grads, present, outside)
            for k in removed:
                for path, module in stack[k].named_modules():
                    if (mode := modes.value(path, before.modes[k].get(path), module.training)) != module.training:
                        module.training, is_changed = mode, True
                for name, parameter in stack[k].named_parameters():
                    current = parameter.requires_grad
                    if (value := grads.value(name, before.grads[k].get(name), current)) != current:
                        parameter.requires_grad, is_changed = value, True
        self._flags = _Flags(stack) if is_changed else now


class _Flags:
    """Modes and ``requires_grad`` of a stack's blocks and of the modules around them."""

    def __init__(self, stack: BlockStack) -> None:
        self.modes = [{path: module.training for path, module in block.named_modules()} for block in stack.blocks]
        self.grads = [_grads(dict(block.named_parameters())) for block in stack.blocks]
        self.container_mode = stack.container.training
        self.outside = _grads(_tensors_outside(stack))


class _Changes:
    """Changes of a flag in the remaining blocks, by path, and in the whole model."""

    def __init__(
        self,
        before: Sequence[dict[str, bool]],
        now: Sequence[dict[str, bool]],
        present: Iterable[int],
        outside: Sequence[tuple[bool, bool]],
    ) -> None:
        self._by_path: dict[tuple[str, bool], list[bool]] = defaultdict(list)
        pairs = list(outside)
        for k in present:
            for path, value in now[k].items():
                if path in before[k]:
                    self._by_path[path, before[k][path]].append(value)
                    pairs.append((before[k][path], value))
        values = {value for _, value in pairs}
        changed = len(values) == 1 and any(old != new for old, new in pairs)
        self._everywhere = values.pop() if changed else None

    def value(self, path: str, before: bool | None, now: bool) -> bool:
        """Return the flag for a removed block: its current value, unless the remaining blocks changed."""
        counterparts = self._by_path.get((path, now if before is None else before), [])
        if not counterparts:
            return now if self._everywhere is None else self._everywhere
        # A change of a single block may be intended for this block only.
        agree = len(set(counterparts)) == 1 and (len(counterparts) > 1 or counterparts[0] == self._everywhere)
        return counterparts[0] if agree else now


def _follow_placement(
    blocks: Sequence[nn.Module],
    present: set[int],
    before: Sequence[Placement],
    moved_outside: Mapping[tuple[torch.device, torch.dtype], tuple[torch.device, torch.dtype]],
) -> None:
    """Move removed blocks like the remaining ones, or like the model around the stack if no block remains."""
    moved = {} if present else dict(moved_outside)
    moved |= {
        before[k][name]: at for k in present for name, at in placement_by_name(blocks[k]).items() if name in before[k]
    }
    for k, block in enumerate(blocks):
        for name, tensor in _named_tensors(block).items() if k not in present else ():
            placement = (tensor.device, tensor.dtype)
            target = moved.get(before[k].get(name, placement), placement)
            # Parameters on the meta device are moved by accelerate.
            if target != placement and not tensor.is_meta and target[0].type != "meta":
                tensor.data = tensor.data.to(device=target[0], dtype=target[1])


def _placements(tensors: Mapping[str, Tensor]) -> Placement:
    return {name: (tensor.device, tensor.dtype) for name, tensor in tensors.items()}


def _grads(tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    floating = {name: p for name, p in tensors.items() if isinstance(p, nn.Parameter) and p.is_floating_point()}
    return {name: parameter.requires_grad for name, parameter in floating.items()}


def _tensors_outside(stack: BlockStack) -> dict[str, Tensor]:
    """Return the parameters and buffers outside the stack by name, without visiting the blocks."""
    tensors: dict[str, Tensor] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        named = (*module._parameters.items(), *module._buffers.items())
        tensors.update({f"{prefix}{name}": tensor for name, tensor in named if tensor is not None})
        for name, child in module._modules.items():
            if child is not None and child is not stack.container:
                visit(child, f"{prefix}{name}.")

    visit(stack.model, "")
    return tensors


def _named_tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict([*block.named_parameters(), *block.named_buffers()])
