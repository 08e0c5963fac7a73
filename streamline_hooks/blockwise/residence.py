"""A block's weights, in memory for as long as it is needed and read once; see accelerate's ``AlignDevicesHook``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from streamline_hooks.stack import BlockStack
from streamline_hooks.statistics.identity import held_weights, identity


@contextmanager
def resident(block: nn.Module) -> Iterator[None]:
    """Read the weights of a block that accelerate keeps elsewhere, run it as often as wanted, and let go of them.

    Without it, every forward of the block reads them again.

    Parameters
    ----------
    block : torch.nn.Module
        Left as it is where its weights are in memory.
    """
    held: list[tuple[nn.Module, Any]] = []
    try:
        for module, hook in _offloading(block):
            held.append((module, hook))
            hook.pre_forward(module)
            hook.offload = False
        yield
    finally:
        for module, hook in held:
            hook.offload = True
            hook.post_forward(module, None)


def stored_bytes(block: nn.Module) -> int:
    """Bytes of a block's weights in the files that they are read from; 0 where they are in memory."""
    total = 0
    for module, hook in _offloading(block):
        for name, parameter in module.named_parameters(recurse=hook.place_submodules):
            total += parameter.numel() * _itemsize(hook.weights_map, name, parameter)
    return total


def identity_of(stack: BlockStack) -> dict[str, Any]:
    """What `identity` says of a model that is in memory, of one whose blocks are on disk.

    Of each parameter on disk up to 16 values are looked at; its file is mapped, so that no more is read, unless the
    parameter is run in another dtype than it is stored in.
    """
    return identity(stack, _mapped(stack.model))


def _mapped(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """A model's weights, one after the other, with the values that are on disk."""
    hooks = {id(module): hook for module, hook in _offloading(model)}
    for name, tensor in held_weights(model):
        path, _, own = name.rpartition(".")
        hook = hooks.get(id(model.get_submodule(path)))
        yield name, tensor if hook is None or not tensor.is_meta else hook.weights_map[own]


def _offloading(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The modules whose weights accelerate reads for each forward, and the hooks that do it."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) and hasattr(one, "weights_map"):
                yield part, one


def _itemsize(weights: Any, name: str, parameter: Tensor) -> int:
    """Bytes of one number as it is stored, which may be narrower than what it is run in."""
    index = getattr(getattr(weights, "dataset", None), "index", {})
    where = index.get(f"{getattr(weights, 'prefix', '')}{name}", {})
    if where.get("safetensors_file") is None:
        return parameter.element_size()
    with safe_open(where["safetensors_file"], framework="pt") as opened:
        stored = opened.get_slice(where["weight_name"]).get_dtype()
    bits = int("".join(c for c in stored.split("_")[0] if c.isdigit()) or 8)  # F32, BF16, F8_E4M3, BOOL
    return max(1, bits // 8)
