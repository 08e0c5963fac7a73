"""Models whose weights are divided among processes, and when parts of them may be exchanged all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_ALLOWED: ContextVar[bool] = ContextVar("surgery_on_shards", default=False)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module, or a part of it, is sharded by ``fully_shard`` (FSDP2)."""
    return any(_is_torchs(kind) for part in module.modules() for kind in type(part).__mro__)


@contextmanager
def surgery_on_shards() -> Iterator[None]:
    """Let surgeons open on a sharded model, for surgery that is undone before anybody looks at the weights.

    Every process has to do the same in the same order: forwards of a sharded model wait for one another.
    """
    token = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def shards_may_be_operated_on() -> bool:
    """Whether this is inside `surgery_on_shards`."""
    return _ALLOWED.get()


def _is_torchs(kind: type) -> bool:
    return kind.__name__ == "FSDPModule" and kind.__module__.startswith("torch.")
