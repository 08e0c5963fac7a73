"""Low-rank adapters beside the linear layers of a block (LoRA, arXiv 2106.09685), which peft makes and merges."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.surgery.silence import silent_parameters
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices


def with_adapters(
    block: nn.Module, rank: int, alpha: float, dropout: float, targets: tuple[str, ...] = ()
) -> nn.Module:
    """A copy of a block that shares its weights, with an adapter beside its linear layers.

    Parameters
    ----------
    block : torch.nn.Module
        It is not changed.
    rank, alpha, dropout
        Of the adapters: alpha/rank is their scale.
    targets : tuple of str
        How the names of the layers end that get one; by default every linear layer does.

    Raises
    ------
    StreamlineError
        If peft is missing or refuses these layers, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise StreamlineError("Healing by adapters takes the package peft: pip install peft") from error
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in block.parameters()}
    made = copy.deepcopy(block, shared)
    for place in (BEFORE, AFTER):  # what is spliced in beside a block is no part of it
        set_splices(made, place, [])
    linear = [name for name, module in made.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    linear = [name for name in linear if not silent_parameters(made.get_submodule(name))]  # what was silenced stays so
    names = [name for name in linear if not targets or name.endswith(targets)]
    if not names:
        raise StreamlineError(
            f"No layer of a {type(block).__name__} ends in {' or '.join(targets)}; its linear layers are "
            f"{', '.join(linear) or 'none'}. Name some of these (targets)."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=_is_conv1d(made.get_submodule(names[0])),
    )
    try:
        adapted: nn.Module = inject_adapter_in_model(config, made)  # type: ignore[arg-type]
    except ValueError as error:
        raise StreamlineError(
            f"peft puts no adapters on {', '.join(names)} of a {type(block).__name__}: {error} Name others (targets), "
            "or train blocks whole (partial)."
        ) from error
    return adapted


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def merge_adapters(block: nn.Module) -> None:
    """Add what adapters learnt to the weights beside them, in a copy that shares them with the original no more."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # without peft there is none
        return
    for path, layer in list(block.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            layer.merge()
            block.set_submodule(path, base)
