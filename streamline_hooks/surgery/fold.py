"""Multiply a map onto what one residual branch of a block adds: no new parameter, and a plain checkpoint.

A branch that ends in linear projections and adds m can be made to add mT by multiplying T onto the output side of
these, biases and all experts included. Which axis of a weight that is, and that nothing but sums and common scales
follow it, is not read off the class of a module but tried: with random weights in the projections the block must add
mQ once Q is multiplied onto them. Q permutes the features, turns the signs of some, and halves or doubles others. No
norm, scale of single features or other function of m goes along with that, and it is exact in every precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.block_call import BlockCall
from streamline_hooks.branches import Branch, Branches
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.precision import widest
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.alone import BranchAlone, run_alone
from streamline_hooks.surgery.exchange import require_own, require_plain, stand_in_for
from streamline_hooks.surgery.silence import branches_in, called

_ROWS = 4096


def require_map(map_: Tensor) -> Tensor:
    """Return a map in float64, or raise if it is not square and finite."""
    if map_.ndim != 2 or map_.shape[0] != map_.shape[1]:
        raise StreamlineError(f"A map that is folded has the shape (features, features); got {tuple(map_.shape)}.")
    wide = map_.detach().to("cpu", torch.float64)
    if not torch.isfinite(wide).all():
        raise StreamlineError("The map that is to be folded holds NaN or infinite values.")
    return wide


@dataclass(frozen=True)
class Folding:
    """A map on its way into a branch.

    Attributes
    ----------
    parameters : mapping of str to torch.nn.Parameter
        What stands in the place of the branch's output projections, by their path below the block.
    found : Branches
        The block's.
    wanted : torch.Tensor
        The state that the block must then give on the probe while its other branch is silent: what entered plus mT,
        with the map apart.
    bound : float
        How far from it a number may be, by rounding.
    """

    parameters: Mapping[str, nn.Parameter]
    found: Branches
    wanted: Tensor
    bound: float


def find_folding(stack: BlockStack, k: int, branch: Branch, map_: Tensor, batch: Batch | Tensor | None) -> Folding:
    """Multiply a map onto a branch's output projections, so that it adds mT in the place of m.

    Parameters
    ----------
    stack : BlockStack
    k : int
        A block that is in the model now.
    branch : {"attention", "mlp"}
    map_ : torch.Tensor
        T, of shape (features, features), float64.
    batch : mapping or torch.Tensor, optional
        What to run a model on that cannot be probed otherwise, without padding.

    Returns
    -------
    Folding

    Raises
    ------
    UnsupportedSurgery
        If the block has not two branches, if something that is not linear follows the projections, or if one of them
        is shared with other parts of the model or quantised.
    StreamlineError
        If the map is not as wide as the state.
    """
    with called(stack, [k], batch) as calls:
        call = calls[k]
        found, axes = _foldable(stack, k, branch, call)
        assert isinstance(call, BlockCall)
        features = call.state.shape[-1]
        if len(map_) != features:
            raise StreamlineError(
                f"The map has the shape {tuple(map_.shape)}; the state of block {k} has {features} features. Give one "
                f"of shape ({features}, {features})."
            )
        held = {path: call.block.get_parameter(path) for path in axes}
        parameters = {path: stand_in_for(p, multiplied(p, axes[path], map_)) for path, p in held.items()}
        for path, p in parameters.items():
            if not torch.isfinite(p).all():
                raise UnsupportedSurgery(
                    f"{_what(branch, k)}: with the map multiplied onto it {path} does not fit into {p.dtype}. Use a "
                    "wider precision, or a smaller map.",
                    "fold",
                )
        state, after = call.state, run_alone(call, found, branch, call.state)
        apart = map_.to(state.device, widest(state.device))
        wanted = (state.to(apart.dtype) + (after.to(apart.dtype) - state.to(apart.dtype)) @ apart).to(state.dtype)
        stretch = max(1.0, float(map_.norm(dim=0).max()))  # by how much T enlarges a rounding of m
        largest = max(float(s.abs().max()) for s in (state, after, wanted))
        bound = BranchAlone(call, found, branch).tolerance * stretch * largest
        return Folding(parameters, found, wanted, bound)


def foldable(
    stack: BlockStack, blocks: Iterable[int], branch: Branch, batch: Batch | Tensor | None
) -> dict[int, Branches]:
    """Find the branches of blocks, and that a map can be folded into one of them.

    Parameters
    ----------
    stack, branch, batch
        As for `find_folding`.
    blocks : iterable of int
        Of those that are in the model now.

    Returns
    -------
    dict of int to Branches

    Raises
    ------
    UnsupportedSurgery
        As `find_folding`, for the first block for which it does.
    """
    with called(stack, blocks, batch) as calls:
        return {k: _foldable(stack, k, branch, call)[0] for k, call in calls.items()}


def _foldable(
    stack: BlockStack, k: int, branch: Branch, call: BlockCall | UnsupportedSurgery
) -> tuple[Branches, dict[str, int]]:
    """A block's branches, and the output axis of each of one branch's projections by its path."""
    found = branches_in(call)
    if isinstance(found, UnsupportedSurgery) or isinstance(call, UnsupportedSurgery):
        raise UnsupportedSurgery(f"{_what(branch, k)}: {found} Choose another block.", "branches")
    require_numbers(stack, k, found.writers[branch])
    probe = BranchAlone(call, found, branch)
    axes: dict[str, int] = {}
    for paths in probe.groups():
        axes |= dict.fromkeys(paths, output_axis(probe, paths, _what(branch, k)))
    return found, axes


def require_folded(stack: BlockStack, k: int, branch: Branch, folding: Folding, batch: Batch | Tensor | None) -> None:
    """Raise unless a branch, as it is in the model now, adds what it must.

    Parameters
    ----------
    stack, k, branch, batch
        As for `find_folding`.
    folding : Folding
        With its parameters in the block.

    Raises
    ------
    UnsupportedSurgery
    """
    with called(stack, [k], batch) as calls:
        call = calls[k]
        if isinstance(call, UnsupportedSurgery):
            raise call
        made = run_alone(call, folding.found, branch, call.state)
        off = float((made - folding.wanted).abs().max())
    if not off <= folding.bound:
        raise UnsupportedSurgery(
            f"{_what(branch, k)}: with the map multiplied onto its output projections it is {off:.2g} off what it adds "
            f"with the map apart; {call.state.dtype} rounds off {folding.bound:.2g} at most. Use a wider precision, or "
            "a smaller map.",
            "fold",
        )


def require_numbers(stack: BlockStack, k: int, paths: Iterable[str]) -> None:
    """Raise unless projections are a block's own, and hold numbers that can be multiplied."""
    require_own(stack, k, paths, "folded")
    for path in paths:
        held = stack[k].get_parameter(path)
        require_plain(held, k, path, "A product", "Fold before quantising.")
        if held.element_size() < 2:
            raise UnsupportedSurgery(
                f"{path} of block {k} is in {held.dtype}, too narrow for a product. Fold before quantising."
            )


def multiplied(held: Tensor, axis: int, map_: Tensor) -> Tensor:
    """A parameter with a map multiplied onto one of its axes, in the parameter's own precision.

    The product itself is taken in float64, or float32 where the device has no more, a few thousand rows at a time.
    """
    moved = held.detach().movedim(axis, -1)
    map_ = map_.to(held.device, widest(held.device))
    rows = [piece.to(map_.dtype).matmul(map_).to(held.dtype) for piece in moved.reshape(-1, len(map_)).split(_ROWS)]
    return torch.cat(rows).reshape(moved.shape).movedim(-1, axis).contiguous()


def output_axis(probe: BranchAlone, paths: list[str], what: str) -> int:
    """The axis of some projections that do the same onto which a map of what the branch adds is multiplied."""
    sizes, features = probe.call.block.get_parameter(paths[0]).shape, probe.state.shape[-1]
    map_, values = _probe_map(features), probe.random(paths)
    added = probe.added(values)
    if not added.any():
        reason = "adds nothing on what the model was run on, so that nothing shows its output axis"
        raise UnsupportedSurgery(f"{what}: {paths[0]} {reason}. Choose another block.", "fold")
    wanted = added @ map_.to(added)
    right = [
        axis
        for axis, size in enumerate(sizes)
        if size == features
        and probe.equal(probe.added({path: multiplied(v, axis, map_) for path, v in values.items()}), wanted)
    ]
    if len(right) != 1:
        raise UnsupportedSurgery(
            f"{what}: behind {paths[0]} of shape {tuple(sizes)} comes more than a sum, so that a map on an axis of it "
            "is no map of what the branch adds (a norm, as in Gemma 2 and 3, or a scale for each feature). Choose "
            "another block.",
            "fold",
        )
    return right[0]


def _probe_map(features: int) -> Tensor:
    """Q: one entry of ±½, ±1 or ±2 in each row and each column.

    It moves all features round in one cycle, so that no scale for each feature commutes with it.
    """
    generator = torch.Generator().manual_seed(0)
    cycle = torch.randperm(features, generator=generator)
    powers, signs = (torch.randint(low, 2, (features,), generator=generator) for low in (-1, 0))
    q = torch.zeros(features, features, dtype=torch.float64)
    q[cycle, cycle.roll(1)] = (2 * signs - 1) * torch.pow(2.0, powers.double())
    return q


def _what(branch: Branch, k: int) -> str:
    return f"The {branch} branch of block {k} cannot be folded"
