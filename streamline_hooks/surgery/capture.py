"""Keep Transformers' own ``output_hidden_states`` right across a surgery.

Transformers installs its capture hooks once, on the blocks that are there when hidden states are first asked for. If
that happens while blocks are out, it goes on returning too few states after they are back.
"""

from __future__ import annotations

from torch import nn
from torch.utils.hooks import RemovableHandle

_INSTALLED = "_output_capturing_hooks_installed"


def next_hook_id() -> int:
    """The number that the next hook on any module will get."""
    return int(RemovableHandle.next_id)


def forget_capture_hooks(model: nn.Module, since: int) -> None:
    """Take away the capture hooks that were installed from a hook number on, so that they are installed anew.

    Parameters
    ----------
    model : torch.nn.Module
    since : int
        As `next_hook_id` gave it.
    """
    for module in model.modules():
        recent = [k for k, hook in module._forward_hooks.items() if k >= since and captures(hook)]
        for key in recent:
            module._forward_hooks.pop(key)
        if recent:
            for owner in model.modules():
                vars(owner).pop(_INSTALLED, None)


def lend_capture_hooks(lender: nn.Module, block: nn.Module) -> list[RemovableHandle]:
    """Give a block that is new in a model the capture hooks that the model's own blocks have.

    Returns
    -------
    list of RemovableHandle
        Empty where the block has such hooks already, as a copy of an own block has.
    """
    if any(map(captures, block._forward_hooks.values())):
        return []
    return [block.register_forward_hook(hook) for hook in lender._forward_hooks.values() if captures(hook)]


def captures(hook: object) -> bool:
    """Whether a hook is one of those by which Transformers collects what a forward is asked for."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
