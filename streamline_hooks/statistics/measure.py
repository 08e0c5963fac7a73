"""Measure profiles and window moments over batches, running only the blocks that they need."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    Batches,
    DistributedStep,
    StreamlineError,
    batches_digest,
    block_indices,
    device_of,
    distributed_step,
    float64_device,
    refuse_wrapped,
    structure_digest,
    tensor_bytes,
    validate_arguments,
)
from streamline_hooks.modeling import (
    BlockStack,
    StateSource,
    check_windows,
    closing_generator,
    find_stack,
    require_default_layout,
    saved_weights,
)
from streamline_hooks.statistics.bootstrap import poisson_weights, sequence_contents
from streamline_hooks.statistics.moments import WindowMoments
from streamline_hooks.statistics.profile import Profile
from streamline_hooks.surgery import as_state_source


@distributed_step("profile")
@validate_arguments(skip=0, replicates=0)
def profile(
    model: nn.Module | StateSource,
    batches: Sequence[Batch | Tensor],
    *,
    tokens: Literal["all", "last"] | Sequence[Tensor] = "all",
    skip: int = 0,
    protect: Iterable[int] = (),
    replicates: int = 100,
    stack: str | None = None,
    shard: bool = True,
) -> Profile:
    """Compare the hidden states at every two boundaries of the blocks in one pass.

    The pass stops after the last block that may be removed. The state at a boundary is the input of the following
    block's computation: if an earlier surgery inserted a module between two blocks, it is the output of that module.

    Parameters
    ----------
    model : torch.nn.Module or StateSource
    batches : sequence of mapping or torch.Tensor
        The inputs of the model's forward.
    tokens : {"all", "last"} or sequence of torch.Tensor
        The tokens to count: all real tokens, the last real token of each sequence, or the real tokens selected by one
        boolean mask of shape (batch, tokens) per batch. The angular distance of the last real token is always measured.
    skip : int
        Number of real tokens to exclude at the beginning of each sequence, which may be attention sinks.
    protect : iterable of int
        Blocks that must not be removed; negative indices count from the end. Protected blocks at the end of the stack
        are not run, and the profile does not cover windows that contain them.
    replicates : int
        Number of bootstrap resamples of the sequences for confidence intervals; 0 for none.
    stack : str, optional
        Path of the stack, see `find_stack`.
    shard : bool
        In a distributed run, whether every rank receives all batches and runs its share of them (default), or each rank
        receives different batches. Every rank returns the profile of all batches. See also
        `streamline_hooks.core.single_process`.

    Returns
    -------
    Profile
        The statistics of L + 1 boundaries, or fewer if blocks at the end are protected. The last boundary is the output
        of the last block, before the model's final norm.

    Raises
    ------
    StreamlineError
        If an argument does not match the model or the batches, or a state is not finite. In a distributed run every
        rank raises if one rank raises or if the ranks have different models or options.

    References
    ----------
    The cosine similarity of windows is the importance of LLM-Streamline (arXiv 2403.19135), the angular distance that
    of Gromov et al. (arXiv 2403.17887).

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> measured = profile(tiny_model("llama"), [torch.arange(3, 43).view(4, 10)], protect=[-1])
    >>> measured.num_boundaries, measured.length, measured.tokens
    (8, 8, 40)
    """
    with distributed_step("profile") as work:
        batches = list(batches)
        selection, masks = token_selection(tokens, len(batches))
        source = as_state_source(model, stack)
        block_stack = source.stack
        num_blocks = num_blocks_to_run(protect, len(block_stack))
        items = list(zip(batches, masks, strict=True))
        options: dict[str, Any] = {
            "blocks to run": num_blocks,
            "tokens": selection,
            "skip": skip,
            "replicates": replicates,
        }
        rank_items = _rank_batches(work, source, items, shard, **options)
        about = {**model_identity(block_stack, source.saved_weights()), "tokens": selection, "skip": skip}
        part = _ProfilePart(source, num_blocks, selection, skip, replicates, about, f"profile{_share_note(work)}")
        groups = source.groups([batch for batch, _ in rank_items], num_blocks)
        if len(groups) == 1:
            result = part.of(rank_items)
        else:
            result = Profile(num_blocks + 1, replicates=replicates, about=about)
            for number, group in enumerate(groups):
                chosen_items = [rank_items[k] for k in group]
                make = partial(part.of, chosen_items, f", part {number + 1} of {len(groups)}")
                inputs = [batch for batch, _ in chosen_items]
                digest = batches_digest([*inputs, *(mask for _, mask in chosen_items if mask is not None)])
                name = f"part_{number:04d}_{digest}"
                result.merge(source.cached(name, make, Profile.save, Profile.load, each_rank=True))
        if work.processes.count > 1:
            parts = result.sums.state_dict()
            merged = {name: work.all_reduce(v, "MAX" if name == "largest" else "SUM") for name, v in parts.items()}
            result.sums.load_state_dict(merged)
        return result


@dataclass(frozen=True)
class _ProfilePart:
    """The options of a profile, applied to some of its batches."""

    source: StateSource
    blocks: int
    tokens: str
    skip: int
    replicates: int
    about: dict[str, Any]
    desc: str

    def of(self, items: Sequence[tuple[Batch | Tensor, Tensor | None]], suffix: str = "") -> Profile:
        """Return the profile of batches, each with its mask of tokens to count."""
        result = Profile(self.blocks + 1, replicates=self.replicates, about=self.about)
        batches = [batch for batch, _ in items]
        with self.source.boundary_states(batches, self.blocks, self.desc + suffix) as groups:
            for group in groups:
                batch, mask = items[group.number]
                counted = counted_tokens(group.real, self.tokens, self.skip, mask)
                weights = None
                if self.replicates:
                    contents = sequence_contents(self.source.stack, batch, group.real)
                    weights = poisson_weights(contents, self.replicates)[group.rows]
                result.update(group.states, counted[group.rows], real=group.real[group.rows], weights=weights)
        return result


@distributed_step("measure_moments")
@validate_arguments()
def measure_moments(
    model: nn.Module | StateSource,
    batches: Sequence[Batch | Tensor],
    windows: Sequence[range],
    *,
    stack: str | None = None,
    weighted: bool = True,
    desc: str = "moments",
    shard: bool = True,
) -> list[WindowMoments]:
    """Sum the second moments of several windows in one pass.

    The pass stops after the last block of the windows.

    Parameters
    ----------
    model : torch.nn.Module or StateSource
    batches : sequence of mapping or torch.Tensor
        The inputs of the model's forward.
    windows : sequence of range
        Ranges of consecutive blocks.
    stack : str, optional
        Path of the stack, see `find_stack`.
    weighted : bool
        Weight tokens by 1/‖y‖², see `WindowMoments`.
    desc : str
        Label of the progress bar.
    shard : bool
        See `profile`.

    Returns
    -------
    list of WindowMoments
        The moments of each window.

    Raises
    ------
    UnsupportedSurgery
        If the states do not have the layout (batch, tokens, features).
    StreamlineError
        If a window is not a range of consecutive blocks, or a state is not finite. In a distributed run, see `profile`.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = [torch.arange(3, 43).view(4, 10)]
    >>> [moments] = measure_moments(tiny_model("llama"), batches, [range(2, 4)])
    >>> moments.tokens, tuple(moments.xx.shape)
    (40, (32, 32))
    """
    source = as_state_source(model, stack)
    check_windows(source.stack, windows)
    results: list[WindowMoments | None] = [None] * len(windows)
    with moments_by_window(source, [(desc, batches)], windows, weighted=weighted, shard=shard) as measured:
        for number, (moments,) in measured:
            results[number] = moments
    return [moments for moments in results if moments is not None]


@closing_generator
def moments_by_window(
    source: StateSource,
    parts: Sequence[tuple[str, Batches]],
    windows: Sequence[range],
    *,
    weighted: bool = True,
    shard: bool = True,
    make: Callable[[int, int], WindowMoments] | None = None,
    rerun: Sequence[int] | None = None,
) -> Generator[tuple[int, list[WindowMoments | None]], None, None]:
    """Sum the moments of windows on several parts of the text, and yield each window when it is complete.

    Parameters are those of `measure_moments` and `StateSource.window_sums`; `make` may return a subclass that takes the
    moments of other states. Yields the index of a window and its moments for each part, None for a part without
    batches. If the source runs block by block, the moments of only one window are in memory at a time.
    """
    stack = source.stack
    needed = {w.start for w in windows} | {w.stop - 1 for w in windows}
    advice = "Remove blocks without a repair, with LayerSurgeon."
    message = f"measure_moments: {type(stack.model).__name__}"
    require_default_layout((stack[k] for k in sorted(needed)), message, advice)
    with distributed_step("measure_moments") as work:
        rank_parts = [
            (
                label + _share_note(work),
                _rank_batches(work, source, part, shard, windows=list(windows), weighted=weighted),
            )
            for label, part in parts
        ]
        make = make or (lambda number, features: WindowMoments(features, weighted))
        with source.window_sums(rank_parts, windows, make, rerun=rerun) as window_sums:
            for number, sums in window_sums:
                # Keep no reference to the yielded moments: those of two windows may not fit into memory.
                yield number, [_sum_over_ranks(work, stack, sums.pop(0), weighted) for _ in parts]


def _sum_over_ranks(
    work: DistributedStep, stack: BlockStack, moments: WindowMoments | None, weighted: bool
) -> WindowMoments | None:
    if work.processes.count == 1:
        return moments
    width = max(work.all_gather_object(0 if moments is None else len(moments.xx)))
    if moments is None:
        if not width:
            return None
        moments, device = (
            WindowMoments(width, weighted),
            float64_device(device_of(stack.model)),
        )  # this rank has no batches
        moments.xx, moments.xd = moments.xx.to(device), moments.xd.to(device)
    moments.xx, moments.xd = work.all_reduce(moments.xx), work.all_reduce(moments.xd)
    counted = work.all_reduce(torch.tensor([moments.tokens, moments.dd], dtype=torch.float64))
    moments.tokens, moments.dd = int(counted[0]), float(counted[1])
    return moments


def _rank_batches(
    work: DistributedStep, source: StateSource, items: Sequence[Any], shard: bool, **settings: Any
) -> list[Any]:
    """Return the batches that this rank runs."""
    if work.processes.count == 1:
        return list(items)
    refuse_wrapped(source.model)  # forwards of a wrapped model synchronize ranks, but shares differ in length
    return work.shard(items, shard, **{**model_identity(source.stack, source.saved_weights()), **settings})


def _share_note(work: DistributedStep) -> str:
    count = work.processes.count
    return f", one of {count} shares" if count > 1 else ""


def token_selection(tokens: str | Sequence[Tensor], batches: int) -> tuple[str, Sequence[Tensor | None]]:
    """Return the token selection ("all", "last" or "mask"), and the mask (or None) of each batch."""
    if isinstance(tokens, str):
        return tokens, [None] * batches
    if len(tokens) != batches:
        raise StreamlineError(
            f"tokens has {len(tokens)} masks for {batches} batches. Expected one mask per batch. Pass {batches} masks."
        )
    return "mask", tokens


def num_blocks_to_run(protect: Iterable[int], length: int) -> int:
    """Return the number of blocks to run, which excludes protected blocks at the end."""
    free = set(range(length)) - set(block_indices(protect, length, "protect"))
    if not free:
        raise StreamlineError(
            f"protect contains all {length} blocks. Expected at least one other block to profile. Protect fewer."
        )
    return max(free) + 1


def counted_tokens(real: Tensor, tokens: str, skip: int, mask: Tensor | None) -> Tensor:
    """Return the boolean mask, of shape (batch, tokens), of the real tokens to count.

    The first `skip` real tokens of each sequence are excluded; ``tokens="last"`` selects only the last real token.
    """
    order = real.cumsum(dim=1)
    counted = real & (order > skip)
    if tokens == "last":
        counted &= order == order[:, -1:]
    if mask is not None:
        if mask.shape != real.shape:
            raise StreamlineError(
                f"A mask in tokens has the shape {tuple(mask.shape)}. Expected that of its batch, {tuple(real.shape)} "
                "(batch, tokens). Pass one entry per token."
            )
        counted &= mask.to(real.device).bool()
    return counted


_VALUES_PER_PARAMETER = 16
_SETTINGS_WITHOUT_EFFECT = (
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
)  # settings that do not change hidden states


def model_identity(stack: BlockStack, tensors: Iterable[tuple[str, Any]] | None = None) -> dict[str, Any]:
    """Return JSON values that identify the model of a stack: class, path, number of blocks, and a fingerprint.

    The fingerprint covers the modules, the configuration (`structure_digest`), and the name, shape, dtype and up to 16
    values of each weight. It distinguishes a finetuned, cast or spliced model from the original without reading all
    weights. Values of offloaded, sharded or quantized weights are not read. `tensors` are the named weights, by default
    those of the model, see `StateSource.saved_weights`.
    """
    return {
        "model": type(stack.model).__name__,
        "stack": stack.path,
        "blocks": len(stack),
        "fingerprint": _fingerprint(stack.model, saved_weights(stack.model) if tensors is None else tensors),
    }


def check_profile(profile: Profile, model: nn.Module, stack: str | None = None) -> None:
    """Raise unless a profile belongs to a model.

    Parameters
    ----------
    profile : Profile
    model : torch.nn.Module
    stack : str, optional
        Path of the stack, see `find_stack`.

    Raises
    ------
    StreamlineError
        If the profile is of another model. The message lists the differences.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.statistics import profile
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> measured = profile(model, [torch.arange(3, 43).view(4, 10)], replicates=0)
    >>> check_profile(measured, model)
    """
    differences = [
        f"{name} is {value} in the model and {profile.about.get(name, 'unknown')} in the profile"
        for name, value in model_identity(find_stack(model, stack)).items()
        if value != profile.about.get(name)
    ]
    if differences:
        raise StreamlineError(
            f"The profile is of another model: {'; '.join(differences)}. Expected a profile of this model. Profile it."
        )


def _fingerprint(model: nn.Module, tensors: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256(structure_digest(model, but=_SETTINGS_WITHOUT_EFFECT).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        values = tensor.detach()
        if type(values) is Tensor and not values.is_meta and values.layout == torch.strided:
            flat = values.reshape(-1)
            sample = flat[:: max(1, len(flat) // _VALUES_PER_PARAMETER)][:_VALUES_PER_PARAMETER]
            digest.update(tensor_bytes(sample))
    return digest.hexdigest()[:16]
