"""One block in a window's place that holds the most needed channels of all of its blocks, side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from streamline_hooks.block_call import BlockCall
from streamline_hooks.branches import BRANCHES, Branch, Branches, tolerance
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.projections import last_projections
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.renumber import INDEX_NAMES
from streamline_hooks.surgery.splice import AFTER, BEFORE

_TOLERANCE = tolerance(torch.float32)  # some norms and positions are computed in it, whatever the state is
_HALVES = (1, 2, 3)  # of a layer's rows: as they are, gate and up in one layer, query, key and value in one


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
        return _matrix(_layer(block, self.writer)).detach()

    def columns(self, block: nn.Module) -> Tensor:
        """The writer's columns of each unit, of shape (units, columns)."""
        return torch.arange(self.matrix(block).shape[1]).view(self.count, -1)

    def rows(self, block: nn.Module, reader: str, parts: int) -> Tensor:
        """A reader's rows of each unit, of shape (units, rows), where its rows are so many layers on each other."""
        rows = torch.arange(len(_matrix(_layer(block, reader))))
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
    if more or not _is_linear(_layer(block, writer)):
        _refuse(block, branch, "several layers or experts add to the state, or what adds is no linear layer")
    readers = sorted({n.rpartition(".")[0] for n in _behind(call, branches, branch)} - {writer})
    readers = [path for path in readers if path and _is_linear(_layer(block, path))]
    columns = _matrix(_layer(block, writer)).shape[1]
    count = columns if branch == "mlp" else _heads_with_own_keys(stack)
    if not readers:
        _refuse(block, branch, "nothing that reads what enters the branch is a linear layer")
    if count is None or columns % count:
        _refuse(block, branch, f"its {columns} columns are not those of {count or 'a known number of'} heads")
    if odd := [path for path in readers if len(_matrix(_layer(block, path))) % count]:
        _refuse(block, branch, f"{odd[0]} has {len(_matrix(_layer(block, odd[0])))} rows for {count} units")
    return Channels(branch, tuple(readers), writer, count)


def concatenate(
    made: nn.Module,
    stack: BlockStack,
    calls: Sequence[BlockCall],
    found: Sequence[Branches],
    needs: Mapping[Branch, Tensor],
) -> None:
    """Put the units of several blocks that are needed most side by side in a copy of the first.

    Concatenation-based merging (CoMe, arXiv 2510.15304): of the n·m channels of an MLP, or groups of heads, m are kept,
    wherever they are from, with their rows and columns, so that each goes on doing what it did. A channel of another
    block expects that block's norm, which here is multiplied into its rows. That the merged branch adds what the
    chosen units add in their own blocks is shown on a few tokens, or it is refused.

    Parameters
    ----------
    made : torch.nn.Module
        The copy, which is changed.
    stack : BlockStack
    calls, found : sequence of BlockCall and Branches
        Of each block.
    needs : mapping of branch to torch.Tensor
        For the branches to be merged, how much each unit is needed, of shape (blocks, units); a branch that is not
        named stays the first block's.

    Raises
    ------
    UnsupportedSurgery
        If the blocks are not built alike, or the merged one does not add what its parts do.
    """
    for branch, need in needs.items():
        _Merge(made, calls, found, stack, branch).carry_out(need)


class _Merge:
    """The merge of one branch of several blocks into one of them; all but the weights that come out is in float64."""

    def __init__(
        self, made: nn.Module, calls: Sequence[BlockCall], found: Sequence[Branches], stack: BlockStack, branch: Branch
    ) -> None:
        self.made, self.calls, self.branch = made, calls, branch
        other = BRANCHES[1 - BRANCHES.index(branch)]
        several = [find_channels(stack, call, one, branch) for call, one in zip(calls, found, strict=True)]
        self.channels, blocks = several[0], [call.block for call in calls]
        shapes = [_shapes(block, self.channels) for block in blocks]
        if any(one != self.channels for one in several) or any(one != shapes[0] for one in shapes):
            self.refuse("the window's blocks are not built alike")
        if branch == "attention" and (name := _unlike(blocks)):
            self.refuse(f"the window's attentions are not of one kind: they differ in {name}")
        self.others = [one.writers[other] for one in found]
        self.device = calls[0].state.device
        self.first = self.widened(0)
        self.merged = replace(self.first, block=copy.deepcopy(self.first.block))
        state = self.first.state
        noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.states = (state, noise.to(state) * state.square().mean().sqrt())

    def refuse(self, reason: str) -> NoReturn:
        _refuse(self.calls[0].block, self.branch, reason)

    def carry_out(self, need: Tensor) -> None:
        count = self.channels.count
        chosen = sorted(need.flatten().topk(count).indices.tolist())
        units = [(index // count, index % count) for index in chosen]
        norms = [self.norm_of(k) for k in range(len(self.calls))]
        for parts in _HALVES:
            if all(len(_matrix(_layer(self.made, path))) % (parts * count) == 0 for path in self.channels.readers):
                self.write(units, norms, parts)
                if self.is_the_sum(units):
                    with torch.no_grad():
                        for path in (*self.channels.readers, self.channels.writer):
                            for name, wide in _layer(self.merged.block, path).named_parameters():
                                self.made.get_parameter(f"{path}.{name}").copy_(wide)
                    return
        self.refuse(
            "the merged branch does not add what its parts add in their own blocks (a norm on what it adds or on "
            "heads, a position that differs, or layers that are laid out otherwise)"
        )

    def widened(self, k: int) -> BlockCall:
        """The call of a block in float64, on the first one's device."""

        def wide(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, torch.float64 if tensor.is_floating_point() else tensor.dtype)

        call = self.calls[k]
        args, kwargs, output = tree_map_only(Tensor, wide, (call.args, call.kwargs, call.output))
        return BlockCall(copy.deepcopy(call.block).to(self.device, torch.float64), args, kwargs, output)

    def run(self, call: BlockCall, state: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        try:
            return call.run(state, values)
        except RuntimeError as error:
            self.refuse(f"a block cannot be run in float64, in which its parts are held against each other ({error})")

    def norm_of(self, k: int) -> tuple[Tensor, Tensor]:
        """D and e with D·f + e for what the branch works on in block k, where f is that in the first block.

        Found from a few states and held against them, so that it is of no matter what makes f of the state.
        """
        call = self.widened(k)
        first = torch.cat([self.entering(self.first, 0, state) for state in self.states])
        own = torch.cat([self.entering(call, k, state) for state in self.states])
        centred = first - first.mean(dim=0)
        spread = centred.square().sum(dim=0)
        factor = torch.where(spread > 0, (centred * own).sum(dim=0) / spread, 0.0)
        shift = own.mean(dim=0) - factor * first.mean(dim=0)
        bound = 2 * _TOLERANCE * float(own.abs().max())
        if not bool(((factor * first + shift - own).abs() <= bound).all()):
            self.refuse(
                "what the branch works on differs between the blocks by more than a factor and a shift of each feature"
            )
        return factor, torch.where(shift.abs() <= bound, 0.0, shift)

    def entering(self, call: BlockCall, k: int, state: Tensor) -> Tensor:
        """What the readers of block k are given when the other branch adds nothing, of shape (tokens, features)."""
        received: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            received.append(args[0].reshape(-1, args[0].shape[-1]))

        handles = [_layer(call.block, p).register_forward_pre_hook(keep) for p in self.channels.readers]
        try:
            self.run(call, state, self.silent(call.block, k))
        finally:
            for handle in handles:
                handle.remove()
        if len(received) != len(self.channels.readers) or any(not torch.equal(one, received[0]) for one in received):
            self.refuse("its layers do not all work once on what enters the branch")
        return received[0]

    def write(self, units: Sequence[tuple[int, int]], norms: Sequence[tuple[Tensor, Tensor]], parts: int) -> None:
        """Put the units into the merged block, in their order."""
        made, channels = self.merged.block, self.channels
        places: dict[int, tuple[list[int], list[int]]] = {k: ([], []) for k, _ in units}
        for slot, (k, unit) in enumerate(units):
            places[k][0].append(slot)
            places[k][1].append(unit)

        def wide(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self.device, torch.float64)

        with torch.no_grad():
            for path in channels.readers:
                rows, target = channels.rows(made, path, parts), _layer(made, path)
                if target.bias is None and any(bool(norms[k][1].any()) for k in places):
                    self.refuse(f"the norms shift what they make, and {path} has no bias to hold it")
                for k, (slots, own) in places.items():
                    source, (factor, shift) = _layer(self.calls[k].block, path), norms[k]
                    there, here = rows[own].flatten(), rows[slots].flatten()
                    weight = wide(_matrix(source)[there])
                    _matrix(target)[here] = weight * factor
                    if target.bias is not None:
                        target.bias[here] = wide(source.bias[there]) + weight @ shift
            columns, target = channels.columns(made), _layer(made, channels.writer)
            for k, (slots, own) in places.items():
                there, here = columns[own].flatten(), columns[slots].flatten()
                _matrix(target)[:, here] = wide(channels.matrix(self.calls[k].block)[:, there])
            if target.bias is not None:
                biases = [wide(_layer(call.block, channels.writer).bias) for call in self.calls]
                target.bias.copy_(torch.stack(biases).sum(dim=0))

    def is_the_sum(self, units: Sequence[tuple[int, int]]) -> bool:
        """Whether the merged branch adds what the chosen units add in their own blocks, all on one state."""
        scales = [self.scale(state) for state in self.states]
        sums = [torch.zeros_like(state) for state in self.states]
        for k in range(len(self.calls)):
            call, kept = self.widened(k), [unit for block, unit in units if block == k]
            for state, scale, parts in zip(self.states, scales, sums, strict=True):
                parts += self.run(call, state, self.alone(call.block, k, scale, kept)) - state
        every = range(self.channels.count)
        for state, scale, parts in zip(self.states, scales, sums, strict=True):
            added = self.run(self.merged, state, self.alone(self.merged.block, 0, scale, every)) - state
            bound = len(self.calls) * _TOLERANCE * float(max(state.abs().max(), parts.abs().max()))
            if not bool(((added - parts).abs() <= bound).all()):
                return False
        return True

    def alone(self, block: nn.Module, k: int, scale: float, units: Sequence[int]) -> dict[str, Tensor]:
        """Values with which block k adds, so many times, what some units of the branch add, and nothing else."""
        writer, columns = _layer(block, self.channels.writer), self.channels.columns(block)
        kept = torch.zeros(columns.numel(), dtype=torch.float64)
        kept[columns[list(units)].flatten()] = scale
        kept = kept.to(self.device)
        values = {"weight": writer.weight * (kept[:, None] if isinstance(writer, Conv1D) else kept)}
        if writer.bias is not None:
            values["bias"] = writer.bias * scale
        return {f"{self.channels.writer}.{name}": value for name, value in values.items()} | self.silent(block, k)

    def silent(self, block: nn.Module, k: int) -> dict[str, Tensor]:
        """Values with which the other branch of block k adds nothing."""
        return {name: torch.zeros_like(block.get_parameter(name)) for name in self.others[k]}

    def scale(self, state: Tensor) -> float:
        """By how much what the first block's branch adds is multiplied to be as large as the state."""
        every = range(self.channels.count)
        added = self.run(self.first, state, self.alone(self.first.block, 0, 1.0, every)) - state
        sizes = [float(one.square().mean().sqrt()) for one in (state, added)]
        return 2.0 ** round(math.log2(sizes[0] / sizes[1])) if min(sizes) > 0 else 1.0


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


def _layer(block: nn.Module, path: str) -> Any:
    """A linear layer of a block."""
    return block.get_submodule(path)


def _is_linear(module: Any) -> bool:
    """Whether a module is a plain linear layer in memory: no adapter, and no other one that computes otherwise."""
    return type(module) in (nn.Linear, Conv1D) and module.weight.is_floating_point() and not module.weight.is_meta


def _matrix(layer: Any) -> Tensor:
    """The weights with a row for each output, as a view."""
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def _shapes(block: nn.Module, channels: Channels) -> list[Any]:
    """Of the layers of a branch, and which of them have a bias; shorter where a block has not all of them."""
    found = []
    for path in (*channels.readers, channels.writer):
        try:
            layer = _layer(block, path)
        except AttributeError:
            continue
        found.append((tuple(_matrix(layer).shape), layer.bias is None) if _is_linear(layer) else None)
    return found


def _unlike(blocks: Sequence[nn.Module]) -> str:
    """What modules of blocks say of themselves and that differs: a sliding window, a kind of layer."""
    said = [dict(_sayings(block)) for block in blocks]
    names = dict.fromkeys(name for one in said for name in one)
    return next(
        (name for name in names if any(one.get(name, _NOTHING) != said[0].get(name, _NOTHING) for one in said)), ""
    )


_NOTHING = object()


def _sayings(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Numbers, names and lists of them that a block's own modules keep, but its number in the stack."""
    for path, module in block.named_modules():
        if path.partition(".")[0] in (BEFORE, AFTER):
            continue
        for name, value in vars(module).items():
            several = value if isinstance(value, (list, tuple)) else [value]
            if name.startswith("_") or name == "training" or name in INDEX_NAMES:
                continue
            if all(isinstance(one, (int, float, str, type(None))) for one in several):
                yield f"{path}.{name}".lstrip("."), value


def _refuse(block: nn.Module, branch: Branch, reason: str) -> NoReturn:
    raise UnsupportedSurgery(
        f"The {branch} of several {type(block).__name__} cannot be merged by its channels: {reason}. Choose another "
        f"window or kind, or merge the other branch alone (merged:channels={BRANCHES[1 - BRANCHES.index(branch)]}).",
        "merged",
    )
