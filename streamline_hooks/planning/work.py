"""What a block costs to read and to run, from its shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import BlockStack

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk")


@dataclass(frozen=True)
class BlockWork:
    """A block's share of a pass.

    Attributes
    ----------
    parameters : int
    active : int
        Weights of the matrices that a token is multiplied with: of a mixture's experts those that are chosen.
    attended : int
        Numbers of a query, over all heads; 0 without attention.
    """

    parameters: int
    active: int
    attended: int

    def flops(self, sequence_length: int) -> float:
        """FLOPs a token of a forward: two a weight, and four for each number of each earlier token's key and value."""
        return 2 * self.active + 4 * self.attended * (sequence_length + 1) / 2


def work_of(stack: BlockStack) -> list[BlockWork]:
    """The work of every block.

    Parameters
    ----------
    stack : BlockStack
        Of a model on any device, that without memory included.

    Raises
    ------
    StreamlineError
        If a block holds experts, and the configuration does not say how many of them a token goes to.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> work_of(find_stack(tiny_model("llama")))[0].flops(1) == 2 * work_of(find_stack(tiny_model("llama")))[
    ...     0
    ... ].active + 4 * 32
    True
    """
    config: Any = stack.config
    found = []
    for block in stack.blocks:
        experts = list(_experts(block, _stated(config, _EXPERTS)))
        theirs = {id(parameter) for parameter, _ in experts}
        own = sum(p.numel() for p in block.parameters() if p.ndim > 1 and id(p) not in theirs)
        found.append(
            BlockWork(
                sum(p.numel() for p in block.parameters()),
                own + round(sum(p.numel() for p, _ in experts) * _share(stack, experts)),
                _attended(config) if _attends(block) else 0,
            )
        )
    return found


def _experts(block: nn.Module, stated: int | None) -> Iterator[tuple[Tensor, int]]:
    """The matrices of a block's experts, and how many experts there are."""
    for module in block.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len(module) == stated:
            yield from ((p, len(module)) for expert in module for p in expert.parameters() if p.ndim > 1)
        own = [p for p in module.parameters(recurse=False) if p.ndim > 2 and p.shape[0] == stated]
        yield from ((p, p.shape[0]) for p in own)


def _share(stack: BlockStack, experts: list[tuple[Tensor, int]]) -> float:
    """The share of the experts that a token goes to."""
    if not experts:
        return 0.0
    chosen = _stated(stack.config, _CHOSEN)
    if chosen is None:
        raise StreamlineError(
            f"The blocks of {type(stack.model).__name__} hold {experts[0][1]} experts, and its configuration does not "
            f"say how many a token goes to; expected one of {', '.join(_CHOSEN)}. Set it."
        )
    return min(1.0, chosen / experts[0][1])


def _stated(config: Any, names: tuple[str, ...]) -> int | None:
    places = (config, getattr(config, "ffn_config", None))
    found = (getattr(place, name, None) for place in places if place is not None for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _attends(block: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() or "attn" in name for name, module in block.named_modules())


def _attended(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", 0)
    heads = max(heads) if isinstance(heads, (list, tuple)) else heads
    wide = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    return heads * wide
