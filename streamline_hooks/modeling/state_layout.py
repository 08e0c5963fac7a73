"""Declare the layouts of hidden states that are not (batch, tokens, features).

Layouts are declared by the class of the block and not inferred from shapes. Only a state of two axes needs no
declaration: it is one row of tokens, such as the patches of all images in Qwen2-VL.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from streamline_hooks.core import UnsupportedSurgery
from streamline_hooks.modeling.hidden_state import tokens_first

DEFAULT_LAYOUT = "batch tokens features"

# Parallel streams form one state.
STATE_LAYOUTS = {
    "DeepseekV4DecoderLayer": "batch tokens streams features",
    "Gemma3nTextDecoderLayer": "streams batch tokens features",
    "HYV4DecoderLayer": "batch tokens streams features",
    "XLNetLayer": "tokens batch features",
    "modeling_fsmt.DecoderLayer": "tokens batch features",
    "modeling_fsmt.EncoderLayer": "tokens batch features",
}
"""Layouts by the class of the block, with its module if other models have a class of the same name."""


def layout_of(block: nn.Module) -> str:
    """Return the axes of the states of a block, such as "batch tokens features"."""
    if tokens_first(block):
        return "tokens batch features"
    name, module = type(block).__name__, type(block).__module__.rpartition(".")[2]
    return STATE_LAYOUTS.get(name) or STATE_LAYOUTS.get(f"{module}.{name}", DEFAULT_LAYOUT)


def require_default_layout(blocks: Iterable[nn.Module], what: str, advice: str) -> None:
    """Raise `UnsupportedSurgery` unless the states of all blocks have the layout (batch, tokens, features)."""
    for layout in {layout_of(block) for block in blocks} - {DEFAULT_LAYOUT}:
        raise UnsupportedSurgery(
            f"{what}: its states have the layout ({', '.join(layout.split())}). Expected (batch, tokens, features). "
            f"{advice}"
        )


def by_token(state: Tensor, block: nn.Module) -> Tensor:
    """Return the state of a block as (batch, tokens, features), with streams concatenated along the features.

    A state without a batch axis becomes a batch of one. A state in this layout is returned unchanged.
    """
    layout = layout_of(block)
    if layout == DEFAULT_LAYOUT:
        return state[None] if state.ndim == 2 else state
    axes = layout.split()
    ordered_axes = [axis for axis in ("batch", "tokens", "streams", "features") if axis in axes]
    return state.permute([axes.index(axis) for axis in ordered_axes]).flatten(2)
