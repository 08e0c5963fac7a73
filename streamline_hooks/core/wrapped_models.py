"""Refuse operations on wrapped, compiled and sharded models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from streamline_hooks.core.errors import StreamlineError, UnsupportedSurgery

_ON_SHARDS: ContextVar[bool] = ContextVar("surgery_on_shards", default=False)
_WRAPPERS = {
    "DataParallel": "wrapped in DataParallel",
    "DistributedDataParallel": "wrapped in DistributedDataParallel",
    "FullyShardedDataParallel": "sharded by FullyShardedDataParallel",
    "FSDPModule": "sharded by fully_shard",
}


def is_sharded(module: nn.Module) -> bool:
    """Whether a module, or a part of it, is sharded by ``fully_shard`` (FSDP2)."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    return any(kind.__name__ == "FSDPModule" and kind.__module__.startswith("torch.") for kind in kinds)


@contextmanager
def surgery_on_shards() -> Iterator[None]:
    """Allow surgery on a sharded model inside the context.

    Undo the surgery before the weights are read, in the same order on every rank.
    """
    token = _ON_SHARDS.set(True)
    try:
        yield
    finally:
        _ON_SHARDS.reset(token)


def refuse_compiled(model: nn.Module, action: str) -> None:
    """Raise if a model or a part of it is compiled: a hook added after ``torch.compile`` never fires."""
    # If this module was never imported, nothing was compiled; importing it takes a second.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return
    for name, module in model.named_modules():
        if (
            isinstance(module, compiler.OptimizedModule)
            or module._compiled_call_impl is not None
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
            or vars(module).get("do_not_compile") is False  # vLLM's mark
        ):
            where = f"its part {name!r}" if name else "it"
            raise StreamlineError(
                f"Cannot {action} a compiled {type(model).__name__}: {where} was compiled by torch.compile, and hooks "
                "added after compilation never fire. Use the model before compilation, and compile it afterwards; "
                "in vLLM, load it with enforce_eager=True."
            )


def forget_compiled_graphs() -> None:
    """Discard all that ``torch.compile`` has compiled in this process.

    By default a compiled function does not notice hooks that are added to modules, such as splices, but does notice
    that hooks are removed. This also concerns functions that call a model, and the compilation that ``generate`` starts
    with a static cache.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def refuse_replicated(model: nn.Module, action: str) -> None:
    """Raise if a model runs as copies on several GPUs (``nn.DataParallel``), where hooks record nothing."""
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise StreamlineError(
                f"Cannot {action} a model in DataParallel, which runs copies on {len(module.device_ids)} GPUs. Pass "
                "the wrapped model (its attribute module), or use DistributedDataParallel."
            )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if a model or a part of it is already wrapped for distributed training."""
    kinds = dict.fromkeys(map(type, model.modules()))
    for wrapper in dict.fromkeys(wrapper for kind in kinds for wrapper in _wrappers_of(kind)):
        if wrapper != "FSDPModule" or not _ON_SHARDS.get():
            raise StreamlineError(
                f"The model ({type(model).__name__}) is {_WRAPPERS[wrapper]} already. Expected a plain model. Apply "
                "surgery first, then wrap the model."
            )


def _wrappers_of(kind: type[nn.Module]) -> list[str]:
    """Return the wrappers for distributed training that a class is or derives from."""
    names = {f"{c.__module__}.{c.__name__}" for c in kind.__mro__ if c.__module__.startswith("torch.")}
    return [wrapper for wrapper in _WRAPPERS if any(name.endswith(f".{wrapper}") for name in names)]


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raise if tensors of a model are sharded among ranks that process the same batches."""
    if not is_sharded(model) and any(type(p.data).__name__ == "DTensor" for p in model.parameters()):
        raise StreamlineError(
            f"Tensors of {type(model).__name__} are divided among processes that have the same batches. Pass the group "
            "of processes with different batches: group=mesh['dp'].get_group()."
        )


def refuse_adapters(model: nn.Module, action: str) -> None:
    """Raise if a model has PEFT adapters, whose checkpoints depend on the blocks' indices."""
    for module in model.modules():
        if any(c.__module__.partition(".")[0] == "peft" for c in type(module).__mro__):
            raise UnsupportedSurgery(
                f"{type(model).__name__} cannot be {action}: it has PEFT adapters ({type(module).__name__}). "
                "Expected a model without. Merge them first (merge_and_unload), or commit and save the model before "
                "get_peft_model."
            )
