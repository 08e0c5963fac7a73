"""Layouts of hidden states that are not (batch, tokens, features).

They are declared, by the class of the block, and not guessed from shapes. Only a state of two axes needs no
declaration: it is one row of tokens, as in a tower that is given the patches of all images in one row (Qwen2-VL).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.hidden_state import tokens_first

USUAL = "batch tokens features"

# Several streams beside one another are one state: whatever compares states compares all of them.
LAYOUTS = {
    "DeepseekV4DecoderLayer": "batch tokens streams features",
    "Gemma3nTextDecoderLayer": "streams batch tokens features",
    "HYV4DecoderLayer": "batch tokens streams features",
    "XLNetLayer": "tokens batch features",
}


def layout_of(block: nn.Module) -> str:
    """Return the axes of the states that a block receives and returns, as in "batch tokens features"."""
    return "tokens batch features" if tokens_first(block) else LAYOUTS.get(type(block).__name__, USUAL)


def require_usual(blocks: Iterable[nn.Module], what: str, advice: str) -> None:
    """Raise `UnsupportedSurgery` unless the states of blocks are laid out as (batch, tokens, features)."""
    for layout in {layout_of(block) for block in blocks} - {USUAL}:
        raise UnsupportedSurgery(
            f"{what}: its states are laid out as ({', '.join(layout.split())}). Expected (batch, tokens, features). "
            f"{advice}"
        )


def by_token(state: Tensor, block: nn.Module) -> Tensor:
    """Return a block's state as (batch, tokens, features), with its streams concatenated along the features.

    A state of the usual layout is returned itself; a state without a batch axis becomes a batch of one.
    """
    layout = layout_of(block)
    if layout == USUAL:
        return state[None] if state.ndim == 2 else state
    axes = layout.split()
    wanted = [axis for axis in ("batch", "tokens", "streams", "features") if axis in axes]
    return state.permute([axes.index(axis) for axis in wanted]).flatten(2)
