"""Fold a map or a factor into the output projections of residual branches, without a new parameter.

A branch that ends in linear projections and adds m to the state adds mT after T is multiplied into the output side of
the projections, including biases and all experts. Which axis of a weight is the output side, and whether only sums and
uniform scales follow it, is tested instead of inferred from the module's class: with random weights in the projections,
the block must add mQ after Q is multiplied into them. Q permutes the features, negates some, and halves or doubles
others. No norm, per-feature scale or other function of m commutes with Q, and the product is exact in every precision.

Multiplying the state before block k by a factor α is equivalent to dividing the output of each later branch by α, if
every branch and the head read the state through a norm, which ignores a uniform factor. Nothing before block k changes,
so the embeddings may be tied to the head. The equivalence is verified on the model's logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    prepare_inputs,
    weights_in_memory,
    widest_float,
)
from streamline_hooks.modeling import (
    BRANCHES,
    BlockCall,
    BlockStack,
    Branch,
    Branches,
    choose_probe_inputs,
    isolated_inference,
    observe_blocks,
    parameter_pattern,
    probe_logits,
    read_input,
    read_output,
    sum_order_tolerance,
    write_input,
    write_output,
)
from streamline_hooks.surgery.probe import without_masks
from streamline_hooks.surgery.zeroed_branches import (
    Parameters,
    ParameterSwap,
    computed_parameter,
    parameter_like,
    require_branches,
    require_unquantized,
    require_unshared,
)

_ROWS = 4096
# Relative to the largest logit. Wider dtypes use 1e-3, mostly because of the eps of norms.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


def run_branch(
    call: BlockCall, branches: Branches, branch: Branch, state: Tensor, values: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Run a block with its other branch zeroed, on a given state and with replaced values of some parameters."""
    other = BRANCHES[1 - BRANCHES.index(branch)]
    return call.run(state, {**_zeros(call.block, branches.writers[other]), **(values or {})})


class BranchProbe:
    """Run a branch on a random state, with random values in some output projections and zeros in the others.

    The model's own weights may be zero, and on its own states the output of the branch may be below rounding.
    """

    def __init__(self, call: BlockCall, branches: Branches, branch: Branch) -> None:
        self.call, self.branches, self.branch = call, branches, branch
        self._generator = torch.Generator().manual_seed(0)
        self.state = self._noise(call.state)
        precisions = {call.state.dtype} | {call.block.get_parameter(path).dtype for path in branches.writers[branch]}
        self.tolerance = max(map(sum_order_tolerance, precisions))

    def groups(self) -> list[list[str]]:
        """Group the branch's projections by their role; the projections of all experts form one group."""
        groups: dict[tuple[str, torch.Size], list[str]] = {}
        for path in self.branches.writers[self.branch]:
            shape = self.call.block.get_parameter(path).shape
            groups.setdefault((parameter_pattern(self.call.block, path), shape), []).append(path)
        return list(groups.values())

    def random(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """Return random values of projections, scaled so that the branch output is about as large as the state."""
        values = {path: self._noise(self.call.block.get_parameter(path)) for path in paths}
        added = float(self.added(values).float().square().mean().sqrt())
        if not (math.isfinite(added) and added > 0):
            return values
        return {path: value * 2.0 ** -round(math.log2(added)) for path, value in values.items()}

    def added(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the branch output with these values of projections and zeros in all other projections."""
        zeros = _zeros(self.call.block, self.branches.writers[self.branch])
        return run_branch(self.call, self.branches, self.branch, self.state, {**zeros, **values}) - self.state

    def equal(self, result: Tensor, expected: Tensor) -> bool:
        """Whether two results of `added` are equal up to rounding."""
        largest = max(float(self.state.abs().max()), float(expected.abs().max()))
        return bool((result - expected).abs().max() <= self.tolerance * largest)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator).to(like)


def _zeros(block: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    return {path: torch.zeros_like(block.get_parameter(path)) for path in paths}


def require_map(map_: Tensor) -> Tensor:
    """Return a map as float64 on the CPU, or raise if it is not square and finite."""
    if map_.ndim != 2 or map_.shape[0] != map_.shape[1]:
        raise StreamlineError(
            f"map_ has shape {tuple(map_.shape)}. Expected (features, features). Pass a square matrix."
        )
    map64 = map_.detach().to("cpu", torch.float64)
    if not torch.isfinite(map64).all():
        raise StreamlineError("map_ contains NaN or infinite values. Expected finite values. Fit the map again.")
    return map64


@dataclass(frozen=True)
class Folding:
    """A map multiplied into copies of a branch's output projections.

    `expected` is the block's output on the probe with the other branch zeroed and the map applied separately; `bound`
    is the largest difference that rounding explains.
    """

    parameters: Parameters
    branches: Branches
    expected: Tensor
    bound: float


def find_folding(stack: BlockStack, k: int, branch: Branch, map_: Tensor, batch: Batch | Tensor | None) -> Folding:
    """Multiply a map, as returned by `require_map`, into copies of a branch's output projections."""
    with observe_blocks(stack, [k], batch) as calls:
        call, branches, axes = _foldable(stack, k, branch, calls[k])
        state = call.state
        features = state.shape[-1]
        if len(map_) != features:
            raise StreamlineError(
                f"map_ has shape {tuple(map_.shape)}, but the state of block {k} has {features} features. Pass a map "
                f"of shape ({features}, {features})."
            )
        projections = {path: call.block.get_parameter(path) for path in axes}
        parameters = {path: parameter_like(p, multiply_axis(p, axes[path], map_)) for path, p in projections.items()}
        for path, p in parameters.items():
            if not torch.isfinite(p).all():
                raise UnsupportedSurgery(
                    f"{_refusal(branch, k)}: the product of {path} and the map does not fit into {p.dtype}. Use a "
                    "wider dtype, or a smaller map.",
                    "fold",
                )
        branch_state = run_branch(call, branches, branch, state)
        map_on_device = map_.to(state.device, widest_float(state.device))
        expected = (
            state.to(map_on_device.dtype)
            + (branch_state.to(map_on_device.dtype) - state.to(map_on_device.dtype)) @ map_on_device
        ).to(state.dtype)
        magnification = max(1.0, float(map_.norm(dim=0).max()))  # of rounding errors in m by T
        largest = max(float(s.abs().max()) for s in (state, branch_state, expected))
        bound = BranchProbe(call, branches, branch).tolerance * magnification * largest
        return Folding(parameters, branches, expected, bound)


def foldable(
    stack: BlockStack, blocks: Iterable[int], branch: Branch, batch: Batch | Tensor | None
) -> dict[int, Branches | UnsupportedSurgery]:
    """Find the branches of blocks, or the error with the reason why no map can be folded into a block."""
    results: dict[int, Branches | UnsupportedSurgery] = {}
    with observe_blocks(stack, blocks, batch) as calls:
        for k, call in calls.items():
            try:
                with weights_in_memory(stack[k]):
                    results[k] = _foldable(stack, k, branch, call)[1]
            except UnsupportedSurgery as error:
                results[k] = error
    return results


def _foldable(
    stack: BlockStack, k: int, branch: Branch, call: BlockCall | UnsupportedSurgery
) -> tuple[BlockCall, Branches, dict[str, int]]:
    """Return a block's call, its branches, and the output axis of each projection of one branch, by path."""
    call, branches = require_branches(call, _refusal(branch, k))
    require_foldable(stack, k, branches.writers[branch])
    probe = BranchProbe(call, branches, branch)
    axes: dict[str, int] = {}
    for paths in probe.groups():
        axes |= dict.fromkeys(paths, output_axis(probe, paths, _refusal(branch, k)))
    return call, branches, axes


def require_folded(stack: BlockStack, k: int, branch: Branch, folding: Folding, batch: Batch | Tensor | None) -> None:
    """Raise `UnsupportedSurgery` unless a branch with a folded map returns the expected output."""
    with observe_blocks(stack, [k], batch) as calls:
        call = calls[k]
        if isinstance(call, UnsupportedSurgery):
            raise call
        result = run_branch(call, folding.branches, branch, call.state)
        difference = float((result - folding.expected).abs().max())
    if not difference <= folding.bound:
        raise UnsupportedSurgery(
            f"{_refusal(branch, k)}: with the map multiplied into its output projections the output differs by "
            f"{difference:.2g} from the output with the map applied separately; the rounding of {call.state.dtype} "
            f"explains at most {folding.bound:.2g}. Use a wider dtype, or a smaller map.",
            "fold",
        )


def require_foldable(stack: BlockStack, k: int, paths: Iterable[str]) -> None:
    """Raise `UnsupportedSurgery` if projections of a block are shared, quantized, or of a too narrow dtype."""
    require_unshared(stack, k, paths, "folded")
    for path in paths:
        parameter = stack[k].get_parameter(path)
        require_unquantized(parameter, k, path, "A product", "Fold before quantizing.")
        if parameter.element_size() < 2:
            raise UnsupportedSurgery(
                f"{path} of block {k} has dtype {parameter.dtype}, which is too narrow for a product. Fold before "
                "quantizing."
            )


def multiply_axis(parameter: Tensor, axis: int, map_: Tensor) -> Tensor:
    """Multiply a map into one axis of a parameter, and return the product in the parameter's dtype.

    The product is computed in float64, or in float32 where the device has no float64, a few thousand rows at a time.
    """
    columns_last = parameter.detach().movedim(axis, -1)
    map_ = map_.to(parameter.device, widest_float(parameter.device))
    rows = [
        piece.to(map_.dtype).matmul(map_).to(parameter.dtype)
        for piece in columns_last.reshape(-1, len(map_)).split(_ROWS)
    ]
    return torch.cat(rows).reshape(columns_last.shape).movedim(-1, axis).contiguous()


def output_axis(probe: BranchProbe, paths: list[str], refusal: str) -> int:
    """Find the axis of a group of projections into which a map of the branch output is multiplied."""
    sizes, features = probe.call.block.get_parameter(paths[0]).shape, probe.state.shape[-1]
    map_, values = _probe_map(features), probe.random(paths)
    added = probe.added(values)
    if not added.any():
        raise UnsupportedSurgery(
            f"{refusal}: {paths[0]} adds nothing on the probe inputs, so its output axis cannot be determined. Choose "
            "another block.",
            "fold",
        )
    expected = added @ map_.to(added)
    output_axes = [
        axis
        for axis, size in enumerate(sizes)
        if size == features
        and probe.equal(probe.added({path: multiply_axis(v, axis, map_) for path, v in values.items()}), expected)
    ]
    if len(output_axes) != 1:
        raise UnsupportedSurgery(
            f"{refusal}: {paths[0]} of shape {tuple(sizes)} is followed by more than a sum (a norm, as in Gemma 2 and "
            "3, or a per-feature scale), so a map on one of its axes is not a map of the branch output. Choose another "
            "block.",
            "fold",
        )
    return output_axes[0]


def _probe_map(features: int) -> Tensor:
    """Return Q, with one entry of ±½, ±1 or ±2 in each row and column.

    It permutes all features in one cycle, so that no per-feature scale commutes with it.
    """
    generator = torch.Generator().manual_seed(0)
    cycle = torch.randperm(features, generator=generator)
    powers, signs = (torch.randint(low, 2, (features,), generator=generator) for low in (-1, 0))
    q = torch.zeros(features, features, dtype=torch.float64)
    q[cycle, cycle.roll(1)] = (2 * signs - 1) * torch.pow(2.0, powers.double())
    return q


def _refusal(branch: Branch, k: int) -> str:
    return f"The {branch} branch of block {k} cannot be folded"


Projections = Mapping[tuple[int, Branch], Parameters]
"""Output projections of branches, by block and branch."""


def find_projections(
    stack: BlockStack, blocks: Iterable[int], refusal: str, batch: Batch | Tensor | None
) -> Projections:
    """Find the output projections of all branches, and verify that the branch outputs are proportional to them.

    `refusal` is the first part of the text of an `UnsupportedSurgery`. One block is in memory at a time.
    """
    writers: dict[tuple[int, Branch], tuple[str, ...]] = {}
    with observe_blocks(stack, blocks, batch) as calls:
        for k, observed in calls.items():
            with weights_in_memory(stack[k]):
                call, branches = require_branches(observed, f"{refusal}: block {k} cannot be divided")
                for branch in BRANCHES:
                    require_foldable(stack, k, branches.writers[branch])
                    require_proportional(call, branches, branch, refusal, k)
                    writers[k, branch] = branches.writers[branch]
        # Outside of weights_in_memory, since the weights of all blocks may not fit into memory.
        return {key: {path: stack[key[0]].get_parameter(path) for path in paths} for key, paths in writers.items()}


def require_proportional(call: BlockCall, branches: Branches, branch: Branch, refusal: str, k: int) -> None:
    """Raise `UnsupportedSurgery` unless halving the output projections of a branch halves its output."""
    probe = BranchProbe(call, branches, branch)
    values = probe.random(branches.writers[branch])
    halves = {path: value / 2 for path, value in values.items()}
    if not probe.equal(2 * probe.added(halves), probe.added(values)):
        raise UnsupportedSurgery(
            f"{refusal}: halving the output projections of the {branch} branch of block {k} does not halve its output "
            "(a norm follows it, as in Gemma 2 and 3). Choose a later block.",
            "scale",
        )


def divided(projections: Projections, factor: float) -> dict[tuple[int, Branch], ParameterSwap]:
    """Divide output projections by a factor."""
    divide = partial(_divide, factor)
    return {
        key: ParameterSwap({path: computed_parameter(p, divide) for path, p in parameters.items()}, is_zero=False)
        for key, parameters in projections.items()
    }


def _divide(factor: float, values: Tensor) -> Tensor:
    return values / factor


def power_of_two_beyond(factor: float) -> float:
    """Return the power of two nearest to `factor` that is at least as far from 1, on the same side.

    A power of two changes a state without rounding.

    Examples
    --------
    >>> [power_of_two_beyond(factor) for factor in (1.3, 2, 2.1, 0.9, 0.3)]
    [2.0, 2.0, 4.0, 0.5, 0.25]
    """
    exponent = math.log2(factor)
    return 2.0 ** (math.ceil(exponent) if exponent > 0 else math.floor(exponent))


def scaled_logits(
    stack: BlockStack, batch: Batch | Tensor | None, factor: float = 1.0, before: nn.Module | None = None
) -> Tensor:
    """Return the logits on a batch or the probe inputs with a scaled block input or stack output."""
    model: Any = stack.model

    def enter(block: nn.Module, args: Any, kwargs: Any) -> Any:
        return write_input(args, kwargs, read_input(args, kwargs, block) * factor, block)

    def leave(block: nn.Module, args: Any, output: Any) -> Any:
        return write_output(output, read_output(output) * factor)

    if before is None:
        scaled = list(stack.container.children())[-1]
        register = partial(scaled.register_forward_hook, leave)
    else:
        scaled, register = before, partial(before.register_forward_pre_hook, enter, with_kwargs=True)
    with isolated_inference(model), register():
        if batch is not None:
            return read_output(model(**prepare_inputs(model, batch)))
        return probe_logits(model, choose_probe_inputs(model, scaled))


def scaled_logits_allclose(scaled: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal up to rounding and the eps of norms."""
    difference = torch.where(scaled == expected, 0.0, (scaled - expected).abs())
    return bool(difference.max() <= _TOLERANCE.get(expected.dtype, 1e-3) * without_masks(expected).abs().max())
