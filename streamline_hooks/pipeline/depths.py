"""Fit the replacements of several nested depths of one model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from streamline_hooks.core import (
    StreamlineError,
    UnsupportedSurgery,
    check_field_names,
    current_processes,
    describe_blocks,
    get_logger,
    validate_arguments,
)
from streamline_hooks.evaluation import (
    Guarantee,
    GuaranteeData,
    LossMeasure,
    TaskSettings,
    bound_losses,
    load_guarantee_data,
)
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.pipeline.apply import apply_selection, first_applicable
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.prepare import CompressionData, Preparation, parts_of, prepare_compression
from streamline_hooks.selection import Selection, Target, VerifiedSelection, verify_shortlist
from streamline_hooks.statistics import Profile
from streamline_hooks.statistics import profile as measure_profile
from streamline_hooks.surgery import DepthCut, LayerSurgeon, ModelSource, at_depth, depths_of, set_depths

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
    at_most : dict of str to float
        The limits. Only these hold for the chosen depth with the stated probability: the bounds in `statements` were
        used to choose it.
    delta : float
        Probability with which the chosen depth may exceed a limit.

    Examples
    --------
    >>> statement = Guarantee("disagreement", bound=0.12, losses=(0.1,) * 400, delta=0.05, fingerprint="8e1c")
    >>> print(ChosenDepth(7, {7: {"disagreement": statement}}, {}, {"disagreement": 0.15}))
    with probability 0.95: expected top-1 disagreement at most 0.15 (400 documents, mean 0.100, data 8e1c)
    """

    depth: int
    statements: Mapping[int, Mapping[LossMeasure, Guarantee]]
    required_units: Mapping[LossMeasure, int | None]
    at_most: Mapping[LossMeasure, float] = field(default_factory=dict)
    delta: float = 0.05

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values, without the losses of each unit."""
        statements = {
            str(depth): {measure: statement.to_dict() for measure, statement in tested.items()}
            for depth, tested in self.statements.items()
        }
        plain = {"at_most": dict(self.at_most), "required_units": dict(self.required_units), "delta": self.delta}
        return {"depth": self.depth, "statement": str(self), "statements": statements, **plain}

    def __str__(self) -> str:
        tested = self.statements.get(self.depth, {})
        losses = [f"expected {s.loss} at most {self.at_most[m]:g} ({s.sample})" for m, s in tested.items()]
        if not losses:
            return "no smaller depth is within the limits"
        return f"with probability {1 - self.delta:.10g}: {' and '.join(losses)}"


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
    full, *smaller = depths_of(model)
    units = load_data_by_measure(model, data, at_most, tokenizer, settings, "choose_depth: data")
    opened = {depth: partial(at_depth, model, depth) for depth in smaller}
    return _test_in_order(copy.deepcopy(model), model, full, opened, units, at_most, delta, clip)


def load_data_by_measure(
    model: nn.Module,
    data: Mapping[Any, Any],
    at_most: Mapping[LossMeasure, float],
    tokenizer: Any,
    settings: TaskSettings | None = None,
    argument: str = "compress: guarantee_data",
) -> dict[LossMeasure, GuaranteeData]:
    """Return the units of each measure; raise unless there are data for each measure and no other."""
    if not at_most or data.keys() != at_most.keys():
        raise StreamlineError(
            f"{argument} has {', '.join(data) or 'no measure'}, and at_most {', '.join(at_most) or 'none'}. Expected "
            "the same measures, at least one. Pass a dict with documents or tasks for each."
        )
    return {measure: load_guarantee_data(model, data[measure], measure, tokenizer, settings) for measure in at_most}


def _test_in_order(
    original: nn.Module,
    model: nn.Module,
    full: int,
    opened: Mapping[int, Callable[[], AbstractContextManager[Any]]],
    units: Mapping[LossMeasure, GuaranteeData],
    at_most: Mapping[LossMeasure, float],
    delta: float,
    clip: float = 1.0,
) -> ChosenDepth:
    """Bound the losses of one depth after another, until a bound is too large; `opened` gives the model its depth."""
    statements: dict[int, dict[LossMeasure, Guarantee]] = {}
    chosen = full
    for depth, open_depth in opened.items():
        with open_depth():
            tested = {
                measure: bound_losses(original, model, units[measure], measure, delta=delta, clip=clip)
                for measure in at_most
            }
        statements[depth] = tested
        failed = [measure for measure, statement in tested.items() if statement.bound > at_most[measure]]
        verdicts = ", ".join(f"{measure} {statement.bound:.3f}" for measure, statement in tested.items())
        logger.info(f"depth      {depth}: at most {verdicts}{': too much' if failed else ''}")
        if failed:
            required = {measure: tested[measure].required_units(at_most[measure]) for measure in failed}
            return ChosenDepth(chosen, statements, required, at_most, delta)
        chosen = depth
    return ChosenDepth(chosen, statements, {}, at_most, delta)


def largest_bounded(
    model: nn.Module,
    original: nn.Module | None,
    ready: Preparation,
    best: VerifiedSelection,
    units: Mapping[LossMeasure, GuaranteeData],
) -> tuple[VerifiedSelection, ChosenDepth]:
    """Return the largest window inside a verified one whose losses are at most ``ready.config.at_most``.

    The windows have all, half, a quarter, ... of the blocks, except numbers that cannot be removed. Each is the best of
    those inside the next larger one, by the verification text, and they are tested from the smallest to the largest.
    `original` is a copy of the model by default.

    Raises
    ------
    StreamlineError
        If the losses of the smallest window exceed the limits.
    """
    blocks, limits = len(ready.stack), cast("Mapping[LossMeasure, float]", ready.config.at_most)
    nested, count = [best], len(best.blocks) // 2
    while count > ready.kind.slots:
        outer = nested[-1].windows[0]
        windows = [range(start, start + count) for start in range(outer.start, outer.stop - count + 1)]
        try:
            verified = _verified(ready, [Selection((window,)) for window in windows])
            nested.append(first_applicable(model, verified, ready.stack.path))
        except UnsupportedSurgery as error:
            logger.info(f"skipped    windows of {count} blocks inside {outer.start}-{outer.stop - 1}: {error}")
        count //= 2
    by_depth = {blocks - len(s.blocks) + ready.kind.slots: s for s in reversed(nested)}
    opened = {depth: partial(_applied, model, ready.stack.path, selection) for depth, selection in by_depth.items()}
    original = copy.deepcopy(model) if original is None else original
    chosen = _test_in_order(original, model, blocks, opened, units, limits, ready.config.delta)
    if chosen.depth == blocks:
        first = nested[-1]
        ((_, tested),) = chosen.statements.items()
        needed = ", ".join(_describe_required(*item) for item in chosen.required_units.items())
        expected = ", ".join(f"{measure} {limit:g}" for measure, limit in limits.items())
        raise StreamlineError(
            f"compress: without {describe_blocks(first.windows[0])}, the smallest window, "
            f"{'; '.join(map(str, tested.values()))}. Expected at most {expected}. {needed}. Increase at_most, use a "
            "better replacement, or pass more units in guarantee_data; test again only on units that were not "
            "measured yet. The model is not changed."
        )
    logger.info(f"bounded    {by_depth[chosen.depth]} is removed, {chosen}")
    return by_depth[chosen.depth], chosen


def _describe_required(measure: str, units: int | None) -> str:
    if units is None:
        return f"For {measure}, more than a million units would be needed, or none is enough"
    return f"For {measure}, about {units:,} units would be enough"


@contextmanager
def _applied(model: nn.Module, stack: str, selection: VerifiedSelection) -> Iterator[None]:
    with LayerSurgeon(model, stack) as surgeon:
        apply_selection(surgeon, selection)
        yield


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
    target = replace(config, remove=Target(blocks=counts[0]), repair=config.repair.seeded(config.seed))
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
    if config.at_most is not None:
        raise StreamlineError(
            f"fit_depths: the config has at_most={dict(config.at_most)}. Expected none, because all depths are kept. "
            "Leave it out, and call `choose_depth` afterwards."
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
    verified = _verified(ready, list(chosen.values()))
    usable = [s for s in verified if not s.refused and math.isfinite(s.distance)]
    for selection in usable:
        module = selection.repairs[0].replacement_module if selection.repairs else None
        if module is not None and not isinstance(module, nn.Module):
            raise StreamlineError(
                f"fit_depths: the replacement {ready.kind.name!r} changes blocks around the window, which all depths "
                "share. Expected a module in place of the window. Use for example LinearConfig."
            )
    return usable


def _verified(ready: Preparation, selections: Sequence[Selection]) -> list[VerifiedSelection]:
    source, batches = ModelSource(ready.stack.model, ready.stack), (ready.fit, ready.held_out, ready.verification)
    return verify_shortlist(source, selections, *batches, replacement=ready.kind, task=ready.task)


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
