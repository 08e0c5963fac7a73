"""Plan a compression that is trained for a time allowed, from what its stages take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamline_hooks.batch import device_of, tokens_of
from streamline_hooks.calibration import split_documents
from streamline_hooks.calibration.split import PARTS
from streamline_hooks.collapse_watch import CollapseWatch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import Pace, measure_pace
from streamline_hooks.evaluation.speed import wait_for
from streamline_hooks.planning.rates import write_rate
from streamline_hooks.planning.training_budget import BudgetPlan, Given, Paces, Sizes, plan_in
from streamline_hooks.preparation import Preparation, prepare_compression, search_from_keywords
from streamline_hooks.repair import Preset, preset_named, solve, student_of
from streamline_hooks.repair.training_pace import TrainingPace, measure_training_pace
from streamline_hooks.result import most_attempts
from streamline_hooks.selection import CRITERIA, Target
from streamline_hooks.selection.search.problem import RANKED
from streamline_hooks.side_by_side import SideBySide
from streamline_hooks.statistics import measure_moments, profile
from streamline_hooks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLE = 2_048  # tokens that are looked at for which windows are likely
_STEPS = 3  # of a training that are timed, the first of which sets it up
_PRODUCT = (512, 1024)  # tokens and features of a product that is timed in two precisions
_DOCUMENTS, _CHARACTERS = 100, 200_000  # that are tokenised to time it
_WRITINGS = 4  # what writing and timing side by side takes, in the time that the original takes to write
_PARTS = 2  # windows of a selection, of a search for disjoint ones


def plan_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    budget: float,
    *,
    preset: Preset | str = "best",
    remove: Target | int | float = 0.25,
    keep: Iterable[int] = (),
    test_texts: Sequence[str] | None = None,
    sequence_length: int = 512,
    validation_tokens: int | None = None,
    test_tokens: int | None = None,
    batch_size: int = 1,
    shortlist: int = 8,
    seed: int = 0,
    stack: str | None = None,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.perf_counter,
) -> BudgetPlan:
    """Find how much text `compress` can be given for it to take about as long as allowed, from here to the folder.

    A profile of a few tokens says which windows are likely; the pace of the blocks, one solution, a few real steps of
    the training (of a student that is thrown away, in the weights' precision and, where a product of matrices is not
    slower in it, in bfloat16, of which the faster is taken) and a text that is written say what each stage takes. The
    model is afterwards what it was.

    Parameters
    ----------
    model, tokenizer, texts, remove, test_texts, sequence_length, seed, stack
        As in `compress`, which is to be given the same.
    keep : iterable of int
        Blocks that must stay. Where blocks behind the window are healed, the last one must too.
    budget : float
        Seconds, those of the planning among them.
    preset : Preset or str
        With a training.
    validation_tokens, test_tokens : int, optional
        By default they follow from the budget.
    batch_size : int
        Sequences a step.
    shortlist : int
        Selections that are fitted and judged.
    output : str or Path, optional
        Where the model is going to be saved.
    say : callable
        Receives lines about the target.
    clock : callable
        Returns seconds.

    Returns
    -------
    BudgetPlan
        ``compress(model, tokenizer, texts, **plan.arguments)`` carries it out.

    Raises
    ------
    StreamlineError
        If the budget does not suffice for the least that is worth doing, the preset trains nothing, on what the model
        writes, or in rounds, or the text is too short for anything.
    """
    began = clock()
    chosen = preset_named(preset) if isinstance(preset, str) else preset
    if chosen.training is None:
        raise StreamlineError(
            f"The preset {chosen.name!r} trains nothing, so that a budget decides nothing. Choose 'best', or leave the "
            "budget out."
        )
    if chosen.rounds > 1:
        raise StreamlineError(
            f"The preset {chosen.name!r} goes in {chosen.rounds} rounds, and a budget plans one. Choose 'best', or "
            "leave the budget out."
        )
    if chosen.training.on_policy is not None:
        raise StreamlineError(
            f"The preset {chosen.name!r} trains on what the model writes ({chosen.training.on_policy}), whose length a "
            "budget does not know beforehand. Leave on_policy out, or the budget."
        )
    behind = chosen.healing is not None and chosen.healing.where == "after"
    kept = tuple(dict.fromkeys((*keep, -1))) if behind else tuple(keep)
    given = Given(
        sequence_length,
        batch_size,
        validation_tokens,
        test_tokens,
        kept,
        shortlist=shortlist,
    )
    least = given.sizes(max(4, -(-_SAMPLE // sequence_length), _STEPS * batch_size))
    split: dict[str, Any] = {"seed": seed, "sequence_length": sequence_length, "test_documents": test_texts}
    ready = prepare_compression(
        model,
        tokenizer,
        texts,
        task=Task("causal-lm"),
        remove=remove,
        kind=chosen.kind,
        search=chosen.search,
        parts=_PARTS,
        keep=kept,
        batch_size=batch_size,
        stack=stack,
        say=say,
        repeated=chosen.repeated,
        **split,
        **_tokens(least),
    )
    preparing = clock() - began
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        paces = _paces(ready, tokenizer, texts, chosen, given.shortlist, output, clock)
    paces = replace(paces, plan=clock() - began, prepare=preparing)
    available: int | None = None
    while True:
        plan = plan_in(budget, paces, chosen, given, available)
        asked = plan.sizes
        there = split_documents(texts, tokenizer, **split, **_tokens(asked))
        found = (there.calibration.numel(), there.validation.numel(), there.test.numel())
        if found == (asked.calibration, asked.validation, asked.test):
            return plan
        given, available = shrink_to_text(given, asked, found, apart=test_texts is not None)


def shrink_to_text(given: Given, asked: Sizes, found: tuple[int, int, int], *, apart: bool) -> tuple[Given, int]:
    """What is left to train on where a text is less than was asked for, and all parts have shrunk by one ratio.

    The others are to be as large as they were meant to be, where that leaves the training half of the text; else a
    tenth and a fifth of it. Where the test has text of its own (`apart`), that has shrunk alone.
    """
    validation, test = asked.validation, found[2] if apart else asked.test
    total = found[0] + found[1] + (0 if apart else found[2])
    if validation + (0 if apart else test) > total // 2:
        validation = max(given.sequence_length, min(validation, total // 10))
        test = test if apart else max(given.sequence_length, min(test, total // 5))
    given = replace(given, validation=validation, test=test)
    sizes = given.sizes(1)
    return given, total - sizes.validation - (0 if apart else sizes.test)


def _tokens(sizes: Sizes) -> dict[str, Any]:
    return {f"{name}_tokens": getattr(sizes, name) for name in PARTS}


def _paces(
    ready: Preparation,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    preset: Preset,
    shortlist: int,
    output: str | Path | None,
    clock: Callable[[], float],
) -> Paces:
    """What each stage takes, as far as it can be told from a few tokens of each."""
    model: Any = ready.stack.model
    stack = ready.stack.path
    rate = write_rate(None if output is None else Path(output).absolute().parent)

    def timed(action: Callable[[], Any]) -> tuple[float, Any]:
        wait_for(model)
        started = clock()
        made = action()
        wait_for(model)
        return clock() - started, made

    ranking, measured = timed(lambda: profile(model, ready.calibration, keep=ready.protected, stack=stack))
    # Which are likely, a criterion of the profile tells for nothing, and how many windows they have.
    runs_each = bool(preset.criterion) and CRITERIA[preset.criterion].runs_per_window
    criterion = "" if runs_each else preset.criterion
    search = search_from_keywords(preset.search, criterion, parts=_PARTS, shortlist=shortlist)
    selections = search.find(ready.question(search, profile=measured))
    windows = selections[0].windows
    firsts = [selection.windows[0] for selection in selections]
    pace = measure_pace(model, ready.calibration[0], stack=stack)
    with torch.device("meta"):
        module = ready.kind.make(ready.stack, windows[0])
    fit = pace.fit(ready.calibration, firsts)  # all in one pass, and each later window of a selection in one of its own
    filled = pace.channels(ready.calibration, firsts).seconds if ready.kind.fill else 0.0
    later = [pace.fit(ready.calibration, [window]) for one in selections for window in one.windows[1:]]
    whole = len(windows) > 1 or bool(ready.kind.slots or ready.kind.fit)
    stand_in = module if isinstance(module, nn.Module) else None
    judge = pace.judge(ready.judging, firsts, replacement=stand_in, whole=whole)
    searching = 0.0
    if runs_each:
        alone = [range(k, k + 1) for k in range(len(ready.stack)) if k not in ready.protected]
        each = alone if preset.search == "one-shot" else ready.candidates
        costs = pace.judge(ready.calibration, each)
        searching = max(RANKED, *(tokens_of(batch) for batch in ready.calibration[:1])) * costs.seconds / costs.tokens
    solving = _solving(ready, windows[0], timed)
    tried = [_training(ready, preset, windows, dtype) for dtype in precisions_to_time(model, timed)]
    (first, trained), *others = sorted(tried, key=lambda one: one[0].step)
    sample = "".join(texts[:_DOCUMENTS])[:_CHARACTERS]
    encoding, encoded = timed(lambda: tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
    writing, _ = timed(lambda: SideBySide(model, tokenizer, ready.test, lambda line: None))
    watching, _ = timed(lambda: CollapseWatch(model, tokenizer, ready.test, lambda line: None))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Paces(
        plan=0.0,
        prepare=0.0,
        encode=encoding / max(1, len(encoded)),
        rank=ranking / sum(map(tokens_of, ready.calibration)),
        fit=(fit.seconds + filled + sum(cost.seconds for cost in later)) / fit.tokens,
        judge=judge.seconds / judge.tokens,
        score=scoring_passes(pace, windows, whole),
        search=searching,
        solve=sum(len(one.windows) for one in selections) * solving,
        training=first,
        compare=_WRITINGS * writing + 2 * watching,  # the original, and what is made of it
        save=size / rate,
        others=tuple(pace for pace, _ in others),
        keep=0.0 if output is None else trained / rate,
    )


def _solving(ready: Preparation, window: range, timed: Callable[..., tuple[float, Any]]) -> float:
    """Seconds of the least squares of one window."""
    batch = ready.calibration[:1]
    (moments,) = measure_moments(ready.stack.model, batch, [window], stack=ready.stack.path)
    return timed(lambda: solve(moments, moments))[0]


def _training(
    ready: Preparation, preset: Preset, windows: Sequence[range], autocast: torch.dtype | None
) -> tuple[TrainingPace, int]:
    """The pace of the training in one precision, and the bytes that are kept of it."""
    assert preset.training is not None
    settings = replace(preset.training, autocast=autocast)
    pairs = [(window, ready.kind.build(ready.stack, window)) for window in windows]
    student = student_of(ready.stack, pairs, preset.healing, seed=settings.seed, task=ready.task)
    # In float32 each weight that is trained, two numbers of AdamW, and the best so far.
    kept = 4 * 4 * sum(p.numel() for p in student.parameters().values())
    return measure_training_pace(student, ready.calibration[:_STEPS], ready.validation[0], settings), kept


def precisions_to_time(model: nn.Module, timed: Callable[..., tuple[float, Any]]) -> list[torch.dtype | None]:
    """What the training is timed in; not in bfloat16 where a processor computes in it by emulation, 20 times slower."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    tokens, features = _PRODUCT
    seconds = {}
    for dtype in (weight.dtype, torch.bfloat16):
        a, b = (torch.ones(rows, features, dtype=dtype, device=weight.device) for rows in (tokens, features))
        seconds[dtype] = min(timed(lambda a=a, b=b: a @ b)[0] for _ in range(3))
    faster = seconds[torch.bfloat16] <= seconds[weight.dtype] and weight.dtype != torch.bfloat16
    return [torch.bfloat16, None] if faster else [None]


def scoring_passes(pace: Pace, windows: Sequence[range], whole: bool) -> float:
    """Seconds a token of all perplexities: of the original, of what is compared with it, and of the result.

    What is compared with it is run behind the window alone, or whole.
    """
    gone = {block for window in windows for block in window}
    start, ends = windows[0].start, pace.after + pace.likelihood
    behind = sum(seconds for k, seconds in enumerate(pace.blocks) if k >= start and k not in gone)
    result = pace.before + sum(pace.blocks[:start]) + behind + ends
    compared = result if whole else pace.before + behind + ends
    return pace.before + sum(pace.blocks) + ends + most_attempts(trained=True) * compared + result
