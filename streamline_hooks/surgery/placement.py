"""Device, precision and flags: of what is put in, and of what was out while the model was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from streamline_hooks.offload import execution_device
from streamline_hooks.stack import BlockStack

Placement = dict[str, tuple[torch.device, torch.dtype]]


def placement(module: nn.Module) -> Placement:
    """The device and precision of each parameter and buffer of a module."""
    return {name: (tensor.device, tensor.dtype) for name, tensor in _tensors(module).items()}


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


class TrainWithRemoved:
    """Stands in the place of ``train`` of a stack's container, so that ``model.eval()`` reaches the removed blocks too.

    A copy of the model has the container's method alone.

    Parameters
    ----------
    container : torch.nn.Module
    removed : sequence of torch.nn.Module
        The blocks that are out of it.
    """

    def __init__(self, container: nn.Module, removed: Sequence[nn.Module] = ()) -> None:
        self._container, self._removed, self.earlier = container, removed, vars(container).get("train")

    def __reduce__(self) -> tuple[type[TrainWithRemoved], tuple[nn.Module]]:
        return TrainWithRemoved, (self._container,)

    def __call__(self, mode: bool = True) -> nn.Module:
        """Set the mode of the removed blocks and of the container."""
        for block in self._removed:
            block.train(mode)
        if self.earlier is not None:
            return self.earlier(mode)  # type: ignore[no-any-return]
        return type(self._container).train(self._container, mode)


class BlockStates:
    """Remember device, precision, mode and ``requires_grad`` of a stack, so that removed blocks can follow the model.

    Parameters
    ----------
    stack : BlockStack
        As it is when the surgeon opens.
    """

    def __init__(self, stack: BlockStack) -> None:
        self._placements = [placement(block) for block in stack.blocks]
        self._placement_outside = _placement_outside(stack)
        self._flags = _Flags(stack)

    def follow(self, stack: BlockStack, kept: Iterable[int]) -> None:
        """Apply to the removed blocks what was done to the model while they were out of it.

        A removed block is moved where ``model.to(...)`` moved the others; see `follow_flags` for the rest.

        Parameters
        ----------
        stack : BlockStack
            Of all blocks, whether they are in the model or not.
        kept : iterable of int
            The blocks that are in the model.
        """
        present = set(kept)
        if len(present) < len(stack):
            now = _placement_outside(stack)
            moved = {before: now[name] for name, before in self._placement_outside.items() if name in now}
            _follow_placement(stack.blocks, present, self._placements, moved)
        self.follow_flags(stack, present)

    def follow_flags(self, stack: BlockStack, kept: Iterable[int]) -> None:
        """Apply to the removed blocks what was done to modes and ``requires_grad`` since this was last called.

        Modules and parameters of a removed block follow those at the same path in the kept blocks that had the same
        mode, or ``requires_grad``, then, where all of these agree; what has no such counterpart follows a change of the
        whole stack, or model.
        """
        present, before, now = set(kept), self._flags, _Flags(stack)
        removed = [k for k in range(len(stack)) if k not in present]
        if removed:
            changes = _Changes(before.modes, now.modes, present, [(before.container_mode, now.container_mode)])
            for k in removed:
                for path, module in stack[k].named_modules():
                    held = module.training
                    module.training = changes.value(path, before.modes[k].get(path, held), held)
            outside = [(before.outside[name], value) for name, value in now.outside.items() if name in before.outside]
            changes = _Changes(before.grads, now.grads, present, outside)
            for k in removed:
                for name, parameter in stack[k].named_parameters():
                    held = parameter.requires_grad
                    value = changes.value(name, before.grads[k].get(name, held), held)
                    if value != held:
                        parameter.requires_grad = value
        self._flags = _Flags(stack)


class _Flags:
    """Modes and ``requires_grad`` of a stack's blocks, and of what is around them."""

    def __init__(self, stack: BlockStack) -> None:
        self.modes = [_modes(block) for block in stack.blocks]
        self.grads = [_grads(block) for block in stack.blocks]
        self.container_mode = stack.container.training
        self.outside = _grads_outside(stack)


class _Changes:
    """What became of a flag in the kept blocks, by path, and in all of the model that was there throughout."""

    def __init__(
        self,
        before: Sequence[dict[str, bool]],
        now: Sequence[dict[str, bool]],
        present: Iterable[int],
        outside: Sequence[tuple[bool, bool]],
    ) -> None:
        self._by_path: dict[tuple[str, bool], list[bool]] = {}
        pairs = list(outside)
        for k in present:
            for path, value in now[k].items():
                if path in before[k]:
                    self._by_path.setdefault((path, before[k][path]), []).append(value)
                    pairs.append((before[k][path], value))
        values = {value for _, value in pairs}
        changed = len(values) == 1 and any(old != new for old, new in pairs)
        self._everywhere = values.pop() if changed else None

    def value(self, path: str, before: bool, now: bool) -> bool:
        """The value that a removed block's flag must have: what it is now, if the kept blocks show no change."""
        counterparts = self._by_path.get((path, before), [])
        if not counterparts:
            return now if self._everywhere is None else self._everywhere
        # One block that changed alone may have been meant alone.
        agree = len(set(counterparts)) == 1 and (len(counterparts) > 1 or counterparts[0] == self._everywhere)
        return counterparts[0] if agree else now


def _follow_placement(
    blocks: Sequence[nn.Module],
    present: set[int],
    before: Sequence[Placement],
    moved_outside: Mapping[tuple[torch.device, torch.dtype], tuple[torch.device, torch.dtype]],
) -> None:
    """Move the removed blocks as the kept ones were moved; where none was kept, as the model around the stack was."""
    moved = {} if present else dict(moved_outside)
    moved |= {
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


def _modes(block: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in block.named_modules()}


def _grads(block: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in block.named_parameters() if p.is_floating_point()}


def _placement_outside(stack: BlockStack) -> Placement:
    """Device and precision of what is outside the stack, by name."""
    return {name: at for name, at in placement(stack.model).items() if not name.startswith(f"{stack.path}.")}


def _grads_outside(stack: BlockStack) -> dict[str, bool]:
    """``requires_grad`` of the floating-point parameters outside the stack, by name."""
    return {
        name: parameter.requires_grad
        for name, parameter in stack.model.named_parameters()
        if not name.startswith(f"{stack.path}.") and parameter.is_floating_point()
    }


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict([*block.named_parameters(), *block.named_buffers()])
