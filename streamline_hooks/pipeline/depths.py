"""Fit the replacements of several nested depths of one model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from streamline_hooks.core import (
    StreamlineError,
    UnsupportedSurgery,
    check_field_names,
    current_processes,
    get_logger,
    validate_arguments,
)
from streamline_hooks.evaluation import Guarantee, LossMeasure, TaskSettings, guarantee
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.prepare import CompressionData, Preparation, parts_of, prepare_compression
from streamline_hooks.selection import Selection, Target, VerifiedSelection, verify_shortlist
from streamline_hooks.statistics import Profile
from streamline_hooks.statistics import profile as measure_profile
from streamline_hooks.surgery import DepthCut, ModelSource, at_depth, depths_of, set_depths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)


@dataclass(frozen=True)
class FittedDepth:
    """A depth that `fit_depths` chose.

    Attributes
    ----------
    depth : int
        Number of blocks.
    window : range
        Blocks that are left out.
    distance : float
        Distance from the full model on the validation text: KL in nats per token, or 1 − cosine for embedding models.
    best_distance : float
        The same for the best window of this length, which need not be nested with those of the other depths.

    Examples
    --------
    >>> FittedDepth(6, range(2, 4), distance=0.31, best_distance=0.29).window
    range(2, 4)
    """

    depth: int
    window: range
    distance: float
    best_distance: float


@dataclass(frozen=True)
class ChosenDepth:
    """Result of `choose_depth`.

    Attributes
    ----------
    depth : int
        The smallest depth whose losses are bounded as required; the full depth if there is none.
    statements : dict of int to dict of str to Guarantee
        For each tested depth, the bound of each measure.
    required_units : dict of str to (int or None)
        For each measure that the last tested depth did not pass, the estimated number of units with which it would;
        None if no number is enough, or more than a million. Empty if every depth passed.

    Examples
    --------
    >>> ChosenDepth(7, {}, {"disagreement": 900}).required_units
    {'disagreement': 900}
    """

    depth: int
    statements: Mapping[int, Mapping[LossMeasure, Guarantee]]
    required_units: Mapping[LossMeasure, int | None]


@validate_arguments(delta="(0, 1)", clip=0)
def choose_depth(
    model: nn.Module,
    data: Mapping[LossMeasure, Sequence[Any]],
    at_most: Mapping[LossMeasure, float],
    *,
    delta: float = 0.05,
    clip: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: TaskSettings | None = None,
) -> ChosenDepth:
    """Choose the smallest depth of a model whose expected losses are at most given values.

    The depths are tested from the largest to the smallest, and the first that fails ends the test. In this order no
    correction for several tests is needed: with a probability of at most `delta`, the chosen depth has an expected loss
    above a value of `at_most` (fixed-sequence testing; Angelopoulos et al., arXiv 2110.01052).

    Parameters
    ----------
    model : torch.nn.Module
        A model with several depths, see `fit_depths`. It is copied once, to serve as the original.
    data : dict of str to sequence
        For each measure of `at_most` its documents or tasks, see `guarantee`; not those on which the depths were fitted
        or compared.
    at_most : dict of str to float
        Largest expected loss by measure, such as ``{"accuracy_drop": 0.02}``. All must hold.
    delta, clip, tokenizer, settings
        See `guarantee`.

    Returns
    -------
    ChosenDepth

    Raises
    ------
    StreamlineError
        If the model has one depth, the measures of `data` and `at_most` differ, or the data are invalid.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> batches = [torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(k)) for k in range(32)]
    >>> _ = fit_depths(model, batches[:12], [7, 4])
    >>> chosen = choose_depth(model, {"disagreement": batches[12:]}, {"disagreement": 0.99})
    >>> chosen.depth, sorted(chosen.statements)
    (4, [4, 7])
    """
    if not at_most or data.keys() != at_most.keys():
        raise StreamlineError(
            f"choose_depth: data are given for {', '.join(data) or 'no measure'}, and at_most for "
            f"{', '.join(at_most) or 'none'}. Expected the same measures, at least one. Pass data for each."
        )
    full, *smaller = depths_of(model)
    original = copy.deepcopy(model)
    statements: dict[int, dict[LossMeasure, Guarantee]] = {}
    chosen = full
    options: dict[str, Any] = {"delta": delta, "clip": clip, "tokenizer": tokenizer, "settings": settings}
    for depth in smaller:
        with at_depth(model, depth):
            tested = {measure: guarantee(original, model, data[measure], measure, **options) for measure in at_most}
        statements[depth] = tested
        failed = [measure for measure, statement in tested.items() if statement.bound > at_most[measure]]
        verdicts = ", ".join(f"{measure} {statement.bound:.3f}" for measure, statement in tested.items())
        logger.info(f"depth      {depth}: at most {verdicts}{': too much' if failed else ''}")
        if failed:
            required = {measure: tested[measure].required_units(at_most[measure]) for measure in failed}
            return ChosenDepth(chosen, statements, required)
        chosen = depth
    return ChosenDepth(chosen, statements, {})


@validate_arguments()
def fit_depths(
    model: PreTrainedModel,
    data: CompressionData,
    depths: Sequence[int],
    /,
    config: CompressionConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **fields: Any,
) -> list[FittedDepth]:
    """Choose and repair nested windows, so that one model runs at several depths.

    The windows of all depths are ranked, repaired and verified as by `compress`. Of the combinations in which each
    window lies inside the next larger one, the one with the smallest product of the distances from the full model is
    chosen. The model and its weights do not change: `at_depth` runs it with fewer blocks, and `save_elastic` saves it
    with all depths.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    data : sequence of str, datasets.Dataset, TokenSplit, batches, or mapping of parts
        See `compress`. Its test part is not used.
    depths : sequence of int
        Numbers of blocks, each smaller than that of the model.
    config : CompressionConfig, optional
        Data, search and replacement; `remove` is not used. One window is left out at each depth, and its replacement
        is a module of its own or nothing. By default ``CompressionConfig()``, with a linear map.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Tokenizer for documents.
    **fields
        Fields of `CompressionConfig` (except `data`) that override those of `config`.

    Returns
    -------
    list of FittedDepth
        The depths, largest first.

    Raises
    ------
    UnsupportedSurgery
        If there is no combination of windows that can be removed.
    StreamlineError
        If the arguments are invalid, the replacement changes or copies blocks of the model, the config has a
        distillation, or there are several processes.

    Notes
    -----
    The cost is one profile and, for each depth, two verified shortlists.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks import at_depth, fit_depths
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> batches = [torch.randint(3, 60, (2, 8)) for _ in range(12)]
    >>> [fitted.depth for fitted in fit_depths(model, batches, [7, 5])]
    [7, 5]
    >>> with at_depth(model, 5):
    ...     len(model.model.layers)
    5
    """
    config = config or CompressionConfig()
    if fields:
        check_field_names(CompressionConfig, fields)
        config = replace(config, **fields)
    stack = find_stack(model, config.stack)
    counts = _checked_counts(depths, len(stack))
    _check_config(config)
    target = replace(config, remove=Target(blocks=counts[0]))
    task = config.task or Task.of(model)
    ready = prepare_compression(model, tokenizer, parts_of(data), target, task=task)
    profile = measure_profile(ModelSource(model, ready.stack), ready.calibration, protect=ready.protected)
    levels: list[list[VerifiedSelection]] = []
    for count in counts:
        levels.append(_verified_windows(ready, profile, count, levels[-1] if levels else None))
        logger.info(f"depth      {len(stack) - count}: {len(levels[-1])} windows of {count} blocks verified")
    chosen = _set_best_chain(model, ready.stack.path, levels)
    return [
        FittedDepth(len(stack) - len(best.blocks), best.windows[0], best.distance, min(s.distance for s in level))
        for best, level in sorted(zip(chosen, levels, strict=True), key=lambda pair: len(pair[0].blocks))
    ]


def _checked_counts(depths: Sequence[int], blocks: int) -> list[int]:
    """Return the numbers of blocks to leave out, largest first."""
    if not depths or len(set(depths)) < len(depths) or not all(0 < depth < blocks for depth in depths):
        raise StreamlineError(
            f"fit_depths: depths={list(depths)}. Expected different numbers of blocks from 1 to {blocks - 1}, because "
            f"the model has {blocks}. Leave out the full depth, which the model always has."
        )
    return sorted((blocks - depth for depth in depths), reverse=True)


def _check_config(config: CompressionConfig) -> None:
    if config.search.number_of_windows != 1 or config.search.zeroes_branches:
        raise StreamlineError(
            f"fit_depths: the search {config.search.kind!r} was given. Expected one window of blocks for each depth. "
            "Use WindowSearch."
        )
    if config.distillation is not None:
        raise StreamlineError(
            "fit_depths: the config has a distillation. Expected closed-form replacements, because training with "
            "healing would change the weights that all depths share. Leave it out."
        )
    if config.repair.slots:
        raise StreamlineError(
            f"fit_depths: the replacement {config.repair.name!r} takes a cache slot. Expected one without, because a "
            "depth counts blocks. Use for example LinearConfig."
        )
    if current_processes().count > 1:
        raise StreamlineError(
            f"fit_depths: {current_processes().count} processes were given. Expected one. Run it outside of torchrun."
        )


def _verified_windows(
    ready: Preparation, profile: Profile, count: int, larger: Sequence[VerifiedSelection] | None
) -> list[VerifiedSelection]:
    """Repair and verify the best windows of a length, and the best of those inside verified larger windows."""
    blocks, search = len(ready.stack), ready.config.search
    windows = [range(start, start + count) for start in range(blocks - count + 1)]
    at_length = replace(ready, candidates=[w for w in windows if not ready.protected.intersection(w)])
    ranked = search.find(replace(at_length.problem(profile=profile), best=len(windows)))
    nested = [s for s in ranked if larger is None or any(s.blocks < outer.blocks for outer in larger)]
    chosen: dict[Any, Selection] = {s.windows: s for s in (*ranked[: search.shortlist], *nested[: search.shortlist])}
    verified = verify_shortlist(
        ModelSource(ready.stack.model, ready.stack),
        list(chosen.values()),
        ready.fit,
        ready.held_out,
        ready.verification,
        replacement=ready.kind,
        task=ready.task,
    )
    usable = [s for s in verified if not s.refused and math.isfinite(s.distance)]
    for selection in usable:
        module = selection.repairs[0].replacement_module if selection.repairs else None
        if module is not None and not isinstance(module, nn.Module):
            raise StreamlineError(
                f"fit_depths: the replacement {ready.kind.name!r} changes blocks around the window, which all depths "
                "share. Expected a module in place of the window. Use for example LinearConfig."
            )
    return usable


def _set_best_chain(
    model: nn.Module, stack: str, levels: Sequence[Sequence[VerifiedSelection]]
) -> list[VerifiedSelection]:
    """Set the best nested windows that the model can leave out, and return them, the largest first."""
    remaining = [list(level) for level in levels]
    refusal: UnsupportedSurgery | None = None
    while chain := _best_chain(remaining):
        try:
            set_depths(model, [_cut_of(selection) for selection in chain], stack=stack)
            return chain
        except UnsupportedSurgery as error:
            refusal = error
        for level, selection in zip(remaining, chain, strict=True):
            try:
                set_depths(model, [_cut_of(selection)], stack=stack)
            except UnsupportedSurgery:
                level.remove(selection)
        set_depths(model, [], stack=stack)
    if refusal is not None:
        raise refusal
    raise UnsupportedSurgery(
        "fit_depths: no verified windows of the depths lie inside each other. Expected at least one combination. Use a "
        "longer shortlist, or fewer depths.",
        "nested",
    )


def _best_chain(levels: Sequence[Sequence[VerifiedSelection]]) -> list[VerifiedSelection]:
    """Return one window of each level, each inside the one before, with the smallest product of distances, or []."""
    chains: list[tuple[float, list[VerifiedSelection]]] = [(0.0, [])]
    for level in levels:
        longer = []
        for selection in level:
            outer = [chain for chain in chains if not chain[1] or selection.blocks < chain[1][-1].blocks]
            if outer:
                cost, chain = min(outer, key=lambda pair: pair[0])
                longer.append((cost + math.log(max(selection.distance, 1e-12)), [*chain, selection]))
        chains = longer
    return min(chains, key=lambda pair: pair[0])[1] if chains else []


def _cut_of(selection: VerifiedSelection) -> DepthCut:
    modules = tuple(cast("nn.Module | None", repair.replacement_module) for repair in selection.repairs)
    return DepthCut(selection.windows, modules or (None,) * len(selection.windows))
