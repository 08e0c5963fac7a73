"""What a branch of a block is made of: the channels of an MLP, or the groups of heads of an attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks.block_call import BlockCall
from streamline_hooks.branches import BRANCHES, Branch, Branches
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.projections import last_projections
from streamline_hooks.stack import BlockStack


@dataclass(frozen=True)
class Channels:
    """What one branch of a block is made of: the channels of an MLP, or the heads of an attention that share keys.

    Attributes
    ----------
    branch : {"attention", "mlp"}
    readers : tuple of str
        The linear layers that work on what enters the branch, by their path below the block; each unit has rows of
        every one of them.
    writer : str
        The one that adds to the state; each unit has columns of it.
    count : int
        Units.
    """

    branch: Branch
    readers: tuple[str, ...]
    writer: str
    count: int

    def matrix(self, block: nn.Module) -> Tensor:
        """The writer's weights, of shape (features, columns)."""
        return matrix_of(linear_layer(block, self.writer)).detach()

    def columns(self, block: nn.Module) -> Tensor:
        """The writer's columns of each unit, of shape (units, columns)."""
        return torch.arange(self.matrix(block).shape[1]).view(self.count, -1)

    def rows(self, block: nn.Module, reader: str, parts: int) -> Tensor:
        """A reader's rows of each unit, of shape (units, rows), where its rows are so many layers on each other."""
        rows = torch.arange(len(matrix_of(linear_layer(block, reader))))
        return rows.view(parts, self.count, -1).transpose(0, 1).flatten(1)


def find_channels(stack: BlockStack, call: BlockCall, branches: Branches, branch: Branch) -> Channels:
    """Find the channels of one branch.

    Parameters
    ----------
    stack : BlockStack
    call : BlockCall
        Of one of its blocks, as for `find_branches`.
    branches : Branches
        Of that block.
    branch : {"attention", "mlp"}

    Raises
    ------
    UnsupportedSurgery
        If the branch is not made of linear layers that read what enters it, and one that writes.
    """
    block = call.block
    (writer, *more) = {name.rpartition(".")[0] for name in branches.writers[branch]}
    if more or not is_linear(linear_layer(block, writer)):
        refuse(block, branch, "several layers or experts add to the state, or what adds is no linear layer")
    readers = sorted({n.rpartition(".")[0] for n in _behind(call, branches, branch)} - {writer})
    readers = [path for path in readers if path and is_linear(linear_layer(block, path))]
    columns = matrix_of(linear_layer(block, writer)).shape[1]
    count = columns if branch == "mlp" else _heads_with_own_keys(stack)
    if not readers:
        refuse(block, branch, "nothing that reads what enters the branch is a linear layer")
    if count is None or columns % count:
        refuse(block, branch, f"its {columns} columns are not those of {count or 'a known number of'} heads")
    if odd := [path for path in readers if len(matrix_of(linear_layer(block, path))) % count]:
        refuse(block, branch, f"{odd[0]} has {len(matrix_of(linear_layer(block, odd[0])))} rows for {count} units")
    return Channels(branch, tuple(readers), writer, count)


def _behind(call: BlockCall, branches: Branches, branch: Branch) -> frozenset[str]:
    """The parameters that a branch's writers depend on, without those of the branch before it."""
    leaves = {n: p.detach().requires_grad_() for n, p in call.block.named_parameters() if p.is_floating_point()}
    state = call.state.detach().requires_grad_()
    with torch.enable_grad():
        projections, _ = last_projections(call.run(state, leaves), state, leaves)
    behind = {
        one: frozenset[str]().union(*(p.behind for p in projections if p.names & set(branches.writers[one])))
        for one in BRANCHES
    }
    if branches.first in (None, branch):
        return behind[branch]
    return behind[branch] - behind[branches.first] - frozenset(branches.writers[branches.first])


def _heads_with_own_keys(stack: BlockStack) -> int | None:
    """Groups of heads that share keys and values: all heads, where each has its own."""
    names = ("num_key_value_heads", "num_attention_heads")
    return next((n for name in names if isinstance(n := getattr(stack.config, name, None), int) and n > 0), None)


def linear_layer(block: nn.Module, path: str) -> Any:
    """A linear layer of a block."""
    return block.get_submodule(path)


def is_linear(module: Any) -> bool:
    """Whether a module is a plain linear layer in memory: no adapter, and no other one that computes otherwise."""
    return type(module) in (nn.Linear, Conv1D) and module.weight.is_floating_point() and not module.weight.is_meta


def matrix_of(layer: Any) -> Tensor:
    """The weights with a row for each output, as a view."""
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def refuse(block: nn.Module, branch: Branch, reason: str) -> NoReturn:
    """Say why blocks cannot be merged by their channels, and what to do."""
    raise UnsupportedSurgery(
        f"The {branch} of several {type(block).__name__} cannot be merged by its channels: {reason}. Choose another "
        f"window or kind, or merge the other branch alone (merged:channels={BRANCHES[1 - BRANCHES.index(branch)]}).",
        "merged",
    )
