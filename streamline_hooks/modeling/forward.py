"""Run a model for inference: evaluation mode, restored state, and checks of hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import StreamlineError, exclusive_model

_INSTALLED = "_output_capturing_hooks_installed"


def next_hook_id() -> int:
    """Return the key of the next hook that is registered on any module."""
    return int(RemovableHandle.next_id)


def remove_capture_hooks(model: nn.Module, since: int) -> None:
    """Remove the capture hooks with a key of at least `since`, so that Transformers installs new ones."""
    for module in model.modules():
        recent = [k for k, hook in module._forward_hooks.items() if k >= since and is_capture_hook(hook)]
        for key in recent:
            module._forward_hooks.pop(key)
        if recent:
            for owner in model.modules():
                vars(owner).pop(_INSTALLED, None)


def copy_capture_hooks(lender: nn.Module, block: nn.Module) -> list[RemovableHandle]:
    """Register the capture hooks of a model's block on a new block, unless it already has such hooks."""
    if any(map(is_capture_hook, block._forward_hooks.values())):
        return []
    return [block.register_forward_hook(hook) for hook in lender._forward_hooks.values() if is_capture_hook(hook)]


def is_capture_hook(hook: object) -> bool:
    """Whether Transformers registered a hook to capture hidden states or attention maps."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


# Attributes of every nn.Module are restored separately or not at all; Accelerate sets "forward".
_NOT_RESTORED = frozenset(vars(nn.Module())) | {"forward"}


def restore_4_bit_layout(root: nn.Module) -> None:
    """Change 4-bit weights that bitsandbytes has changed for inference back to the layout in which they are saved.

    On CPUs with bfloat16 (AVX-512), a forward pass in evaluation mode changes 4-bit weights in place to a layout with
    scales in bfloat16, whose products have no gradient. ``state_dict`` changes them back, but leaves the scales of
    weights without double quantization in another order (bitsandbytes 0.50.2), which makes the weights wrong. The
    rounding of the scales stays.
    """
    for layer in layers_of_4_bits(root):
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()
            scales = layer.weight.quant_state.absmax
            if scales.ndim == 2:
                layer.weight.quant_state.absmax = scales.T.reshape(-1).float()


def keep_4_bit_layout(root: nn.Module) -> list[Any]:
    """Call `restore_4_bit_layout`, let no forward pass change the layout, and return the layers that would do it."""
    restore_4_bit_layout(root)
    layers = [layer for layer in layers_of_4_bits(root) if layer.support_avx512bf16_for_cpu]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return layers


@contextmanager
def keeping_4_bit_layout(root: nn.Module) -> Iterator[None]:
    """Keep the layout of 4-bit weights that `restore_4_bit_layout` restores, for the duration of the context."""
    layers = keep_4_bit_layout(root)
    try:
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True


def layers_of_4_bits(root: nn.Module) -> list[Any]:
    """Return the modules with 4-bit weights of bitsandbytes, whose layout a forward pass on a CPU may change."""
    return [module for module in root.modules() if hasattr(module, "support_avx512bf16_for_cpu")]


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Set all modules of the models to evaluation mode, and restore the mode of each module on exit.

    ``model.eval()`` would also change blocks that a surgeon has removed, and their mode would not be restored. A model
    that another thread runs in this context is refused.
    """
    with exclusive_model(*models):
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
    """Restore on exit what the forwards inside the context change in a model.

    Submodules, buffers (objects and values), plain attributes, attributes of configurations, and Transformers' capture
    hooks are restored. Parameters, modes, other hooks, and attributes of torch's own modules (including DDP and FSDP)
    are not. If a forward changed a parameter in place, only tensor values and capture hooks are restored: RWKV scales
    its parameters for evaluation and records this in an attribute.
    """
    modules = [module for module in model.modules() if not type(module).__module__.startswith("torch.")]
    holders = [vars(module) for module in modules] + [vars(config) for config in _reachable_configs(modules)]
    contents = [_snapshot(attributes) for module in modules for attributes in (module._modules, module._buffers)]
    contents += [_snapshot(module._non_persistent_buffers_set) for module in modules]
    contents += [_snapshot(holder, _NOT_RESTORED) for holder in holders]
    contents += [_snapshot(value) for value in _attribute_values(holders) if type(value) in (dict, list, set)]
    tensors = [*_mutable_buffers(modules), *(v for v in _attribute_values(holders) if type(v) is Tensor)]
    values = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors if not tensor.is_inference()]
    versions = [(p, p._version) for p in model.parameters() if not p.is_inference()]
    first_hook = next_hook_id()
    try:
        yield
    finally:
        for module in {*modules, *model.modules()}:
            for key in [k for k, hook in module._forward_hooks.items() if k >= first_hook and is_capture_hook(hook)]:
                del module._forward_hooks[key]  # Transformers installs new ones when states are requested
        for restore in contents if all(parameter._version == version for parameter, version in versions) else ():
            restore()
        with torch.no_grad():
            for tensor, version, copied in values:
                if tensor._version != version:
                    tensor.copy_(copied)


def _snapshot(container: Any, excluded: Collection[str] = ()) -> Callable[[], None]:
    """Return a function that restores the current entries of a dictionary, list or set in place."""

    def entries() -> Any:
        return (
            {k: v for k, v in container.items() if k not in excluded}
            if isinstance(container, dict)
            else container.copy()
        )

    original = entries()

    def restore() -> None:
        current = entries()
        if _identities(current) == _identities(original):
            return
        if isinstance(container, list):
            container[:] = original
            return
        delete = container.__delitem__ if isinstance(container, dict) else container.remove
        for key in current:
            delete(key)
        container.update(original)

    return restore


def _identities(container: Any) -> Any:
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return container if isinstance(container, set) else list(map(id, container))


def _attribute_values(holders: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return (value for holder in holders for name, value in holder.items() if name not in _NOT_RESTORED)


def _mutable_buffers(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the buffers that a forward may change: all except saved integer matrices, which are quantized weights."""
    for module in modules:
        for name, buffer in module._buffers.items():
            is_unsaved = name in module._non_persistent_buffers_set
            if type(buffer) is Tensor and (is_unsaved or buffer.is_floating_point() or buffer.ndim < 2):
                yield buffer


def _reachable_configs(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the configurations of modules and the configurations nested in them, each once."""
    configs: dict[int, Any] = {}
    pending = [value for module in modules for value in vars(module).values()]
    while pending:
        value = pending.pop()
        if callable(getattr(type(value), "to_dict", None)) and hasattr(value, "__dict__") and id(value) not in configs:
            configs[id(value)] = value
            pending += vars(value).values()
    return list(configs.values())


@contextmanager
def inference(model: nn.Module, *, restore: bool = True) -> Iterator[None]:
    """Run a model in evaluation mode and without gradients, and restore its mode on exit.

    Weights of 4 bits keep the layout in which they are saved, see `restore_4_bit_layout`.

    Parameters
    ----------
    model : torch.nn.Module
    restore : bool
        Also restore the buffers and attributes that forwards change, see `preserve_forward_state`.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama").train()
    >>> with inference(model):
    ...     print(model.training, torch.is_grad_enabled())
    False False
    >>> model.training
    True
    """
    preserved = preserve_forward_state(model) if restore else nullcontext()
    with evaluation_mode(model), keeping_4_bit_layout(model), preserved, torch.no_grad():
        yield


def forward_parameters(model: nn.Module) -> Collection[str]:
    """Return the names of the parameters of a model's forward."""
    inside = getattr(model, "get_base_model", None)  # the forward of a PEFT model has only *args and **kwargs
    return inspect.signature((inside() if callable(inside) else model).forward).parameters


def logits_to_keep(model: nn.Module, positions: int) -> dict[str, int]:
    """Return keyword arguments that limit the LM head to the last `positions` positions; empty if unsupported."""
    return {"logits_to_keep": positions} if "logits_to_keep" in forward_parameters(model) else {}


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether the float64 sums of tensors are finite, which is False if a tensor contains NaN or infinite values.

    The host waits for the devices once.
    """
    sums = [tensor.sum(dtype=torch.float64) for tensor in tensors]
    return bool(torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all()) if sums else True


def require_finite(state: Tensor, real: Tensor, where: str, number: int) -> None:
    """Raise unless the real tokens of a hidden state of shape (batch, tokens, features) are finite."""
    if not all_finite([state]) and not torch.isfinite(state[real.to(state.device)]).all():
        raise StreamlineError(
            f"The state that {where} contains NaN or infinite values (batch {number}). Expected finite values. Check "
            "the weights of the blocks before it, or run the model in float32 or bfloat16."
        )


def saved_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of a model with their names."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


_P = ParamSpec("_P")
_T = TypeVar("_T")


def closing_generator(
    generator: Callable[_P, Generator[_T, None, None]],
) -> Callable[_P, AbstractContextManager[Iterator[_T]]]:
    """Turn a generator function into a context manager that always closes the generator on exit.

    After an exception, a suspended generator lives as long as the traceback, which notebooks keep. The model would
    remain in evaluation mode, with hooks and without gradients. Whether gradients are computed is restored separately,
    because ``zip`` of two generators ends the first before the second, which was started without gradients.
    """

    @wraps(generator)
    @contextmanager
    def opened(*args: _P.args, **kwargs: _P.kwargs) -> Iterator[Iterator[_T]]:
        with torch.set_grad_enabled(torch.is_grad_enabled()), closing(generator(*args, **kwargs)) as items:
            yield items

    return opened
