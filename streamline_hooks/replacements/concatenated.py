"""One block in a window's place that holds the most needed channels of all of its blocks, side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from streamline_hooks.block_call import BlockCall
from streamline_hooks.branches import BRANCHES, Branch, Branches, tolerance
from streamline_hooks.replacements.channels import Channels, is_linear, linear_layer, matrix_of, refuse
from streamline_hooks.surgery.renumber import INDEX_NAMES
from streamline_hooks.surgery.splice import AFTER, BEFORE

_TOLERANCE = tolerance(torch.float32)  # some norms and positions are computed in it, whatever the state is
HALVES = (1, 2, 3)  # of a layer's rows: as they are, gate and up in one layer, query, key and value in one


def concatenate(
    made: nn.Module,
    calls: Sequence[BlockCall],
    found: Sequence[Branches],
    channels: Mapping[Branch, Sequence[Channels]],
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
    calls, found : sequence of BlockCall and Branches
        Of each block.
    channels : mapping of branch to sequence of Channels
        For the branches to be merged, those of each block, as `find_channels` finds them; a branch that is not named
        stays the first block's.
    needs : mapping of branch to torch.Tensor
        For the same branches, how much each unit is needed, of shape (blocks, units).

    Raises
    ------
    UnsupportedSurgery
        If the blocks are not built alike, or the merged one does not add what its parts do.
    """
    for branch, need in needs.items():
        ChannelMerge(made, calls, found, channels[branch]).carry_out(need)


class ChannelMerge:
    """The merge of one branch of several blocks into one of them; all but the weights that come out is in float64."""

    def __init__(
        self, made: nn.Module, calls: Sequence[BlockCall], found: Sequence[Branches], several: Sequence[Channels]
    ) -> None:
        self.made, self.calls, self.channels, self.branch = made, calls, several[0], several[0].branch
        other, blocks = BRANCHES[1 - BRANCHES.index(self.branch)], [call.block for call in calls]
        shapes = [_shapes(block, self.channels) for block in blocks]
        if any(one != self.channels for one in several) or any(one != shapes[0] for one in shapes):
            self.refuse("the window's blocks are not built alike")
        if self.branch == "attention" and (name := _unlike(blocks)):
            self.refuse(f"the window's attentions are not of one kind: they differ in {name}")
        self.others = [one.writers[other] for one in found]
        self.device = calls[0].state.device
        self.first = self.widened(0)
        self.merged = replace(self.first, block=copy.deepcopy(self.first.block))
        state = self.first.state
        noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.states = (state, noise.to(state) * state.square().mean().sqrt())

    def refuse(self, reason: str) -> NoReturn:
        """Raise UnsupportedSurgery with a reason."""
        refuse(self.calls[0].block, self.branch, reason)

    def carry_out(self, need: Tensor) -> None:
        """Merge the most needed channels into the new block."""
        count = self.channels.count
        chosen = sorted(need.flatten().topk(count).indices.tolist())
        units = [(index // count, index % count) for index in chosen]
        norms = [self.norm_of(k) for k in range(len(self.calls))]
        for parts in HALVES:
            if all(
                len(matrix_of(linear_layer(self.made, path))) % (parts * count) == 0 for path in self.channels.readers
            ):
                self.write(units, norms, parts)
                if self.is_the_sum(units):
                    with torch.no_grad():
                        for path in (*self.channels.readers, self.channels.writer):
                            for name, wide in linear_layer(self.merged.block, path).named_parameters():
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
        """Run a block in float64 with other values of its branch."""
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

        handles = [linear_layer(call.block, p).register_forward_pre_hook(keep) for p in self.channels.readers]
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
                rows, target = channels.rows(made, path, parts), linear_layer(made, path)
                if target.bias is None and any(bool(norms[k][1].any()) for k in places):
                    self.refuse(f"the norms shift what they make, and {path} has no bias to hold it")
                for k, (slots, own) in places.items():
                    source, (factor, shift) = linear_layer(self.calls[k].block, path), norms[k]
                    there, here = rows[own].flatten(), rows[slots].flatten()
                    weight = wide(matrix_of(source)[there])
                    matrix_of(target)[here] = weight * factor
                    if target.bias is not None:
                        target.bias[here] = wide(source.bias[there]) + weight @ shift
            columns, target = channels.columns(made), linear_layer(made, channels.writer)
            for k, (slots, own) in places.items():
                there, here = columns[own].flatten(), columns[slots].flatten()
                matrix_of(target)[:, here] = wide(channels.matrix(self.calls[k].block)[:, there])
            if target.bias is not None:
                biases = [wide(linear_layer(call.block, channels.writer).bias) for call in self.calls]
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
        writer, columns = linear_layer(block, self.channels.writer), self.channels.columns(block)
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


def _shapes(block: nn.Module, channels: Channels) -> list[Any]:
    """Of the layers of a branch, and which of them have a bias; shorter where a block has not all of them."""
    found = []
    for path in (*channels.readers, channels.writer):
        try:
            layer = linear_layer(block, path)
        except AttributeError:
            continue
        found.append((tuple(matrix_of(layer).shape), layer.bias is None) if is_linear(layer) else None)
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
