"""Train what stands in the windows' places in a loop of one's own: all else is frozen."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import find_stacks
from streamline_hooks.surgery.silence import silent_inside


@checked()
def freeze_all_but(model: nn.Module, modules: nn.Module | Iterable[nn.Module]) -> list[nn.Parameter]:
    """Let a model's only parameters that take gradients be those of some of its modules.

    Parameters
    ----------
    model : torch.nn.Module
    modules : torch.nn.Module or iterable of them
        Parts of the model, such as what `LayerSurgeon.replace` returned. Where some parameters of one are frozen, these
        stay so; where all are, all are trained, but for the projection of a block's silenced attention or MLP.

    Returns
    -------
    list of torch.nn.Parameter
        Those that are trained, for an optimiser.

    Raises
    ------
    StreamlineError
        If one of the modules is not in the model (the surgeon may have put a copy of it in), or has no parameter of
        floating point to train.

    Examples
    --------
    >>> from streamline_hooks import LayerSurgeon, LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> with LayerSurgeon(model) as surgeon:
    ...     module = surgeon.replace(range(2, 4), LinearReplacement(32))
    ...     [tuple(parameter.shape) for parameter in freeze_all_but(model, module)]
    [(32, 32)]
    """
    chosen = [modules] if isinstance(modules, nn.Module) else list(modules)
    present = set(model.modules())
    missing = [module for module in chosen if module not in present]
    if missing:
        raise StreamlineError(
            f"A {type(missing[0]).__name__} that is to be trained is not in the model. Give what the surgeon returned, "
            "which may be a copy, while it is in the model."
        )
    blocks = [set(stack.blocks) for stack in find_stacks(model)]
    trained = list(dict.fromkeys(p for module in chosen for p in _trainable(module, blocks)))
    if not trained:
        raise StreamlineError(
            f"There is nothing to train in {', '.join(type(module).__name__ for module in chosen) or 'no module'}; "
            "give a module with parameters of floating point."
        )
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def _trainable(module: nn.Module, stacks: Iterable[set[nn.Module]]) -> list[nn.Parameter]:
    floating = [p for p in module.parameters() if p.is_floating_point()]
    # A block beside others of its class that has zeros was silenced; other modules begin at zero.
    own = any(module in blocks and sum(type(b) is type(module) for b in blocks) > 1 for blocks in stacks)
    silent = silent_inside(module) if own else set[int]()
    return [p for p in floating if p.requires_grad] or [p for p in floating if id(p) not in silent]
