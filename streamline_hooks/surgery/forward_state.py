"""Undo what forwards change in a model: submodules, buffers, plain attributes, configurations, capture hooks.

Some models modify themselves depending on their input. BigBird replaces its attention modules for a short text,
dynamic and long RoPE recompute ``inv_freq``, sinusoidal embeddings grow, Qwen2-VL keeps the offset of an image.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.surgery.capture import captures, next_hook_id

# What torch keeps on every module is restored in ways of its own or not at all; "forward" is set by accelerate.
_NOT_RESTORED = frozenset(vars(nn.Module())) | {"forward"}


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode for a while, each module by itself, and each back in the mode that it had.

    ``model.eval()`` would also reach blocks that a surgeon has taken out of the model, which nothing would put back.
    """
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def preserve_forward_state(model: nn.Module) -> Iterator[None]:
    """Leave a model as it was, whatever the forwards inside the context change.

    Submodules, buffers (objects and values), plain attributes and the attributes of configurations are restored.
    Parameters, the mode, and hooks other than those by which Transformers captures states are not, nor is what
    torch's own modules (DDP and FSDP among them) keep about themselves. A model that changes its parameters in place
    (RWKV scales them for evaluation, and notes in an attribute that it did) keeps its attributes too.

    Parameters
    ----------
    model : torch.nn.Module

    Examples
    --------
    >>> class Counter(nn.Module):
    ...     calls = 0
    ...
    ...     def forward(self, state):
    ...         self.calls += 1
    ...         return state
    >>> counter = Counter()
    >>> with preserve_forward_state(counter):
    ...     _ = counter(torch.zeros(1))
    >>> counter.calls
    0
    """
    modules = [module for module in model.modules() if not type(module).__module__.startswith("torch.")]
    holders = [vars(module) for module in modules] + [vars(config) for config in _configs_of(modules)]
    contents = [_Contents(held) for module in modules for held in (module._modules, module._buffers)]
    contents += [_Contents(module._non_persistent_buffers_set) for module in modules]
    contents += [_Contents(holder, _NOT_RESTORED) for holder in holders]
    contents += [_Contents(value) for value in _values_of(holders) if type(value) in (dict, list, set)]
    tensors = [*_buffers_of(modules), *(v for v in _values_of(holders) if type(v) is Tensor)]
    values = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors if not tensor.is_inference()]
    versions = [(p, p._version) for p in model.parameters() if not p.is_inference()]
    first_hook = next_hook_id()
    try:
        yield
    finally:
        for module in {id(module): module for module in [*modules, *model.modules()]}.values():
            for key in [k for k, hook in module._forward_hooks.items() if k >= first_hook and captures(hook)]:
                del module._forward_hooks[key]  # they are installed anew when states are requested
        for held in contents if all(parameter._version == version for parameter, version in versions) else ():
            held.restore()
        with torch.no_grad():
            for tensor, version, copied in values:
                if tensor._version != version:
                    tensor.copy_(copied)


class _Contents:
    """The entries of a dictionary, list or set, to be put back into the same object."""

    def __init__(self, held: Any, excluded: Collection[str] = ()) -> None:
        self._held, self._excluded = held, excluded
        self._entries = self._now()

    def restore(self) -> None:
        now = self._now()
        if type(self._held) is set:
            if now != self._entries:
                self._held.clear()
                self._held.update(self._entries)
        elif isinstance(self._held, list):
            if list(map(id, now)) != list(map(id, self._entries)):
                self._held[:] = self._entries
        elif [(key, id(value)) for key, value in now.items()] != [(k, id(v)) for k, v in self._entries.items()]:
            for key in now:
                del self._held[key]
            self._held.update(self._entries)

    def _now(self) -> Any:
        if isinstance(self._held, dict):
            return {key: value for key, value in self._held.items() if key not in self._excluded}
        return self._held.copy()


def _values_of(holders: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return (value for holder in holders for name, value in holder.items() if name not in _NOT_RESTORED)


def _buffers_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The buffers that a forward may change in place: all but matrices of integers, which are quantized weights."""
    for module in modules:
        for name, buffer in module._buffers.items():
            kept = name in module._non_persistent_buffers_set
            if type(buffer) is Tensor and (kept or buffer.is_floating_point() or buffer.ndim < 2):
                yield buffer


def _configs_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The configurations that modules hold, and those inside them, each once."""
    found: dict[int, Any] = {}
    waiting = [value for module in modules for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if callable(getattr(type(value), "to_dict", None)) and hasattr(value, "__dict__") and id(value) not in found:
            found[id(value)] = value
            waiting += vars(value).values()
    return list(found.values())
