"""Plan a compression that is trained for a time allowed, from what its stages take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamline_hooks.batch import device_of, tokens_of
from streamline_hooks.calibration import split_documents
from streamline_hooks.calibration.split import PARTS
from streamline_hooks.collapse_watch import CollapseWatch
from streamline_hooks.core.hardware_config import HardwareConfig, Precision
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import Pace, measure_pace
from streamline_hooks.evaluation.speed import wait_for
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.planning.rates import write_rate
from streamline_hooks.planning.training_budget import BudgetPlan, Given, Paces, Sizes, plan_in
from streamline_hooks.preparation import Preparation, prepare_compression
from streamline_hooks.repair import solve, student_of
from streamline_hooks.repair.training_pace import TrainingPace, measure_training_pace
from streamline_hooks.result import most_attempts
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


def plan_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    budget: float,
    config: CompressionConfig | None = None,
    *,
    validation_tokens: int | None = None,
    test_tokens: int | None = None,
    test_texts: Sequence[str] | None = None,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.perf_counter,
) -> BudgetPlan:
    """Find how much text `compress` can be given to take about as long as allowed, from here to the folder.

    A profile of a few tokens shows which windows are likely; the pace of the blocks, one solution, a few real training
    steps (of a student that is discarded, in the weights' precision and, if a matrix product is not slower in it, in
    bfloat16, of which the faster is taken) and a generated text show what each stage takes. The model is afterwards
    what it was.

    Parameters
    ----------
    model, tokenizer, texts, test_texts
        As in `compress`, which is to be given the same.
    budget : float
        Seconds, those of the planning included.
    config : CompressionConfig, optional
        With a distillation, in one round; by default ``CompressionConfig.preset("best")`` with a batch size of 1. The
        plan decides its token numbers, epochs, validations and autocast. If blocks behind the window are healed, the
        last block is kept.
    validation_tokens, test_tokens : int, optional
        By default they follow from the budget.
    output : str or Path, optional
        Where the model is going to be saved.
    say : callable
        Receives lines about the target.
    clock : callable
        Returns seconds.

    Returns
    -------
    BudgetPlan
        ``compress(model, tokenizer, texts, plan.config)`` carries it out.

    Raises
    ------
    StreamlineError
        If the budget does not suffice for the least that is worth doing, the config trains nothing, on what the model
        generates, or in rounds, or the text is too short for anything.
    """
    began = clock()
    chosen = config or CompressionConfig.preset("best", hardware=HardwareConfig(batch_size=1))
    if chosen.distillation is None:
        raise StreamlineError(
            "plan_training: the config trains nothing, so that a budget decides nothing. Expected a distillation. Give "
            "CompressionConfig.preset('best'), or leave the budget out."
        )
    if chosen.rounds > 1:
        raise StreamlineError(
            f"plan_training: the config has {chosen.rounds} rounds, and a budget plans one. Set rounds=1, or leave the "
            "budget out."
        )
    limits = {"train_until": chosen.train_until, "distillation.max_minutes": chosen.distillation.max_minutes}
    if given_limits := [name for name, limit in limits.items() if limit is not None]:
        raise StreamlineError(
            f"plan_training: the config sets {' and '.join(given_limits)}, which the plan decides. Expected None. "
            "Leave it out, or the budget."
        )
    if chosen.task not in (None, Task("causal-lm")):
        raise StreamlineError(
            f"plan_training: the config has task={chosen.task}, and a budget is planned for causal language models. "
            "Leave the task out, or the budget."
        )
    behind = chosen.healing is not None and chosen.healing.where == "after"
    keep = chosen.search.keep
    kept = tuple(dict.fromkeys((*keep, -1))) if behind else tuple(keep)
    chosen = replace(chosen, search=replace(chosen.search, keep=kept))
    sequence_length, batch_size = chosen.data.sequence_length, chosen.hardware.batch_size
    given = Given(
        sequence_length,
        batch_size,
        validation_tokens,
        test_tokens,
        kept,
        shortlist=chosen.search.shortlist,
    )
    least = given.sizes(max(4, -(-_SAMPLE // sequence_length), _STEPS * batch_size))
    split: dict[str, Any] = {
        "seed": chosen.seed, "sequence_length": sequence_length, "test_documents": test_texts,
    }  # fmt: skip
    few = replace(chosen, data=replace(chosen.data, fitting_tokens=None, **_tokens(least)))
    ready = prepare_compression(model, tokenizer, texts, few, task=Task("causal-lm"), test_texts=test_texts, say=say)
    preparing = clock() - began
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        paces = _paces(ready, tokenizer, texts, output, clock)
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
    runs_each = ready.config.search.resolved_criterion.runs_per_window
    search = replace(ready.config.search, criterion=None) if runs_each else ready.config.search
    selections = search.find(ready.problem(profile=measured, criterion=search.resolved_criterion))
    windows = selections[0].windows
    firsts = [selection.windows[0] for selection in selections]
    pace = measure_pace(model, ready.calibration[0], stack=stack)
    with torch.device("meta"):
        module = ready.kind.make(ready.stack, windows[0])
    fit = pace.fit(ready.calibration, firsts)  # all in one pass, and each later window of a selection in one of its own
    later = [pace.fit(ready.calibration, [window]) for one in selections for window in one.windows[1:]]
    whole = len(windows) > 1 or bool(ready.kind.slots or ready.kind.fit)
    stand_in = module if isinstance(module, nn.Module) else None
    judge = pace.judge(ready.judging, firsts, replacement=stand_in, whole=whole)
    searching = 0.0
    if runs_each:
        alone = [range(k, k + 1) for k in range(len(ready.stack)) if k not in ready.protected]
        each = alone if search.kind == "one-shot" else ready.candidates
        costs = pace.judge(ready.calibration, each)
        searching = max(RANKED, *(tokens_of(batch) for batch in ready.calibration[:1])) * costs.seconds / costs.tokens
    solving = _solving(ready, windows[0], timed)
    tried = [_training(ready, windows, dtype) for dtype in precisions_to_time(model, timed)]
    (first, trained), *others = sorted(tried, key=lambda one: one[0].step)
    sample = "".join(texts[:_DOCUMENTS])[:_CHARACTERS]
    encoding, encoded = timed(lambda: tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
    writing = watching = 0.0
    evaluation = ready.config.evaluation
    if evaluation.speed or evaluation.generation:
        writing, _ = timed(lambda: SideBySide(model, tokenizer, ready.test, lambda line: None))
    if evaluation.generation:
        watching, _ = timed(lambda: CollapseWatch(model, tokenizer, ready.test, lambda line: None))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Paces(
        plan=0.0,
        prepare=0.0,
        encode=encoding / max(1, len(encoded)),
        rank=ranking / sum(map(tokens_of, ready.calibration)),
        fit=(fit.seconds + sum(cost.seconds for cost in later)) / fit.tokens,
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


def _training(ready: Preparation, windows: Sequence[range], autocast: Precision | None) -> tuple[TrainingPace, int]:
    """The pace of the training in one precision, and the bytes that are kept of it."""
    config, healing = ready.config.distillation, ready.config.healing
    assert config is not None
    hardware = replace(ready.config.hardware, autocast=autocast)
    pairs = [(window, ready.kind.build(ready.stack, window)) for window in windows]
    student = student_of(ready.stack, pairs, healing, seed=ready.config.seed, task=ready.task)
    # In float32 each weight that is trained, two numbers of AdamW, and the best so far.
    kept = 4 * 4 * sum(p.numel() for p in student.parameters().values())
    pace = measure_training_pace(student, ready.calibration[:_STEPS], ready.validation[0], config, hardware=hardware)
    return pace, kept


def precisions_to_time(model: nn.Module, timed: Callable[..., tuple[float, Any]]) -> list[Precision | None]:
    """What the training is timed in; not in bfloat16 where a processor computes in it by emulation, 20 times slower."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    tokens, features = _PRODUCT
    seconds = {}
    for dtype in (weight.dtype, torch.bfloat16):
        a, b = (torch.ones(rows, features, dtype=dtype, device=weight.device) for rows in (tokens, features))
        seconds[dtype] = min(timed(lambda a=a, b=b: a @ b)[0] for _ in range(3))
    faster = seconds[torch.bfloat16] <= seconds[weight.dtype] and weight.dtype != torch.bfloat16
    return ["bfloat16", None] if faster else [None]


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
