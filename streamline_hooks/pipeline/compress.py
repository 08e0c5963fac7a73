"""The whole way in one call: rank, shortlist, fit, judge, remove, measure, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, tokens_of
from streamline_hooks.calibration import PackedText, TokenSplit
from streamline_hooks.carrying_out import carry_out, first_that_can_go, how_repaired, puts_in
from streamline_hooks.checkpoint import require_free, save
from streamline_hooks.cli.short_forms import parse_replacement
from streamline_hooks.collapse_watch import CollapseWatch
from streamline_hooks.distributed import Together, failing_together, here
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import TaskScores
from streamline_hooks.evaluation.reasoning import unmeasured_reasoning
from streamline_hooks.preparation import prepare_compression, search_from_keywords
from streamline_hooks.repair import Healing, ReplacementConfig, Training
from streamline_hooks.repair.rollouts import require_writes
from streamline_hooks.result import LABELS, CompressionResult, attempts_to_measure, findings
from streamline_hooks.run_figures import Clock, peak_memory_of_process, sizes_of
from streamline_hooks.selection import Criterion, Target, VerifiedSelection
from streamline_hooks.sentence_folder import sentence_folder_of
from streamline_hooks.shared_steps import (
    perplexities_together,
    perplexity_together,
    prepared_alike,
    scores_together,
    verified_together,
)
from streamline_hooks.side_by_side import SideBySide
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import Profile, check_profile
from streamline_hooks.statistics import profile as measure_profile
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.task import Task
from streamline_hooks.trained_selection import (
    ending_in,
    kept_training,
    require_parameters,
    require_whole_blocks,
    train_selection,
    trainable,
    trainable_windows,
    training_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@failing_together("compress")
@checked(
    parts=1,
    batch_size=1,
    shortlist=1,
    repeated=0,
    sequence_length=1,
    calibration_tokens=1,
    fitting_tokens=1,
    validation_tokens=1,
    test_tokens=1,
)
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | TokenSplit | Mapping[str, PackedText] | Mapping[str, Sequence[Batch | Tensor]],
    *,
    task: Task | str | None = None,
    remove: Target | int | float = 0.25,
    kind: ReplacementConfig | str = "linear",
    training: Training | None = None,
    healing: Healing | str | None = None,
    teacher: PreTrainedModel | None = None,
    train_until: float | None = None,
    resume: bool = False,
    criterion: Criterion | str | None = None,
    search: str = "window",
    parts: int = 2,
    keep: Iterable[int] = (),
    profile: Profile | None = None,
    test_texts: Sequence[str] | None = None,
    sequence_length: int = 512,
    calibration_tokens: int = 41_000,
    fitting_tokens: int | None = None,
    repeated: float = 0.0,
    validation_tokens: int = 4_096,
    test_tokens: int = 12_288,
    batch_size: int = 4,
    shortlist: int = 8,
    seed: int = 0,
    stack: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    side_by_side: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> CompressionResult:
    """Give up the blocks whose loss is repaired best.

    One pass compares all states; a search by a criterion makes a shortlist; a second pass, stopped after the last
    block needed, sums the moments of all shortlisted windows; each is repaired by least squares and judged by how far
    what it says is from what the original says on validation text; the best is trained, if that is asked for,
    committed, and measured on text that played no part in any of this. Images, or whatever else a model takes, are
    given as batches.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It is changed; on an error it is as it was, unless the error comes after the surgery was committed, in measuring
        or saving: then it is compressed, and `save` can write it elsewhere.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        What is saved beside the model, and what documents are tokenised with. With batches it may be None, or an image
        processor.
    texts : sequence of str, TokenSplit, mapping of str to PackedText, or mapping of str to sequence of batches
        Documents, which calibration, validation and test text are split off without overlap; or text that is dealt out
        already, as by `mixed_split` from several sources in shares; or the three parts from `packed_text`, for text
        that is not to be read whole. Only a model that keeps the documents of a packed row apart is given them
        (`refuse_crossing`). Or the three parts as batches that the model takes, for any model, as `image_parts`,
        `text_parts` and `pair_parts` make them; a classifier's accuracy is told where the test part has ``labels``.
    task : Task or str, optional
        What the model is for, and so what is compared of what it says; by default what its class says, see `Task`.
    remove : Target, int or float
        Number of blocks, or a fraction below 1 of them (rounded half up), or a `Target` of parameters or latency.
    kind : ReplacementConfig or str
        What stands in a window's place, with its options, see `ReplacementConfig`: ``"linear"``, ``"linear:rank=64"``,
        ``"mlp"``, ``"swiglu:width=1536"``, ``"block"``, ``"silenced"``, ``"folded"``, ``"scale"``, ``"none"``, or one
        of your own (`register_kind`). Each starts where least squares brings it.
    training : Training, optional
        How the chosen repair is trained on the calibration text, with the validation text to choose the best weights
        by; by default it is not. `PRESETS` has kinds, trainings and healings: what we recommend, and what others
        published.
    healing : Healing or str, optional
        What is trained of the blocks that stay, beside the repair, see `Healing.parse`. Where no block is behind the
        window, nothing of those behind it is; windows that leave nothing to be trained, or none of the blocks that are
        to be healed, are not looked at.
    teacher : transformers.PreTrainedModel, optional
        The original, where earlier surgery made the model from it: what it says is trained for, and the result is
        measured against it. By default the model itself. Candidates are judged against the model in any case. See
        `compress_iteratively`.
    train_until : float, optional
        Seconds after the beginning of this call at which the training is to end, wherever it is by then, with its best
        weights; by default it makes all its steps. What the original says to the text is taken to its end in any case,
        unless no time is left before it: then nothing is trained, and `CompressionResult.warnings` says so. See
        `plan_training`.
    resume : bool
        Go on with a training that was interrupted: the same call as before, and everything before the training is
        done again.
    criterion : Criterion or str, optional
        What speaks for giving a window up, see `CRITERIA`. By default cosine and relative magnitude together for
        single windows, and cosine for the other searches. One that runs the model without each window, ``"kl"`` or
        ``"perplexity"``, is measured on 4,096 tokens.
    search : {"window", "disjoint", "one-shot", "mixed", "greedy", "evolution", "attention", "mlp"}
        What the shortlist is made of: single windows, several disjoint ones, the best single blocks, the best of these
        three together (with more than a third of the blocks gone, several places may lose less than one), blocks one
        after the other, what an evolutionary search finds, which takes attentions and MLPs apart too, or as many
        attentions or MLPs alone. These are silenced; of the kind ``"linear"`` a linear map stands in the place of each.
    parts : int
        Windows a selection, where the search is for disjoint ones.
    keep : iterable of int
        Blocks that must stay; negative numbers count from the end.
    profile : Profile, optional
        Of this model, to be used instead of a pass.
    test_texts : sequence of str, optional
        Documents to score on instead of a part of `texts`, where that is documents; `mixed_split` takes some too.
    sequence_length, calibration_tokens, validation_tokens, test_tokens : int
        In tokens, of documents; text that is dealt out or packed has its own.
    fitting_tokens : int, optional
        Of the calibration text, those at its beginning that the window is chosen and its stand-in fitted on, where a
        training goes on with all of it; by default all are.
    repeated : float
        The share of the sequences whose second half repeats the first where blocks are ranked and candidates judged,
        see `with_repeated_passages`: blocks that a model needs to take something from its context are kept then. What
        is fitted and trained on stays as it is.
    batch_size : int
        Sequences at a time.
    shortlist : int
        How many selections are fitted and judged.
    seed : int
        Of the split, and of what is random in a named kind at first.
    stack : str, optional
        Path of the stack, see `find_stack`.
    output : str or Path, optional
        A folder to save to, with ``report.json``, of which `streamline_hooks.report.write_report` makes a page.
    overwrite : bool
        Replace a folder that `save` wrote, see there; any other one that is not empty is refused.
    side_by_side : bool
        Let the original and the compressed model write from the same beginnings, time both in turn, and let both
        solve small generated problems, so that a collapse is told in `CompressionResult.warnings`.
    say : callable
        Receives lines about what is planned and found.

    Returns
    -------
    CompressionResult

    Raises
    ------
    StreamlineError
        On anything that cannot work, before anything long is started where that can be known; of several processes in
        all of them.

    Notes
    -----
    Ctrl-C during a training run ends the run: the best weights so far are kept and saved, and
    ``CompressionResult.training.interrupted`` is True. The command line then exits with code 130. At any other time
    KeyboardInterrupt is raised.

    Several processes (an initialised `torch.distributed` group) each hold the whole model, are given the same, and
    end with the same model, to the bit. They share the profile, the moments, the judging, the training and the
    perplexities, each sequence of which one of them runs. What is searched for, and what least squares comes to, is
    taken from the first. It alone saves, reports, speaks and draws bars, and lets the models write and be timed, while
    the others wait.
    """
    work, began = Together("compress", here()), time.perf_counter()
    asked_for = Task.parse(task) if isinstance(task, str) else task or Task.of(model)
    if work.processes.rank:
        say = _nothing
    if output is not None:
        work.of_first(lambda: require_free(output, overwrite))
        sentence_folder_of(model)  # raises if it cannot be kept
    chosen = (parse_replacement(kind) if isinstance(kind, str) else kind).seeded(seed)
    healed = Healing.parse(healing) if isinstance(healing, str) else healing
    training = work.of_first(lambda: kept_training(training, healed, resume, output, train_until))
    if min(shortlist, batch_size, parts) < 1:
        raise StreamlineError(
            f"shortlist={shortlist}, batch_size={batch_size} and parts={parts} must be 1 or more each."
        )
    searching = search_from_keywords(search, criterion, parts=parts, keep=keep, shortlist=shortlist)
    searching.check(remove)
    named = criterion if isinstance(criterion, Criterion) else searching.resolved_criterion
    asked_for.require_fits(model)
    original = model if teacher is None else teacher
    if fitting_tokens is not None and training is None:
        raise StreamlineError(
            f"fitting_tokens={fitting_tokens} leaves the rest of the text to a training, and none was asked for. Give "
            "training=Training(), or fewer calibration_tokens."
        )
    if training is not None:
        training.objective.require_task(asked_for)
        require_whole_blocks(searching)
    if not asked_for.is_of_text and named.name in ("perplexity", "taylor"):
        raise StreamlineError(
            f"The criterion {named.name} is of the next token of a text, and {type(model).__name__} is for "
            f"{asked_for}. Choose another one, such as cosine or kl."
        )
    if profile is not None:
        check_profile(profile, model, find_stack(model, stack).path)
    clock = Clock()
    with clock("prepare"):
        ready = prepare_compression(
            model,
            tokenizer,
            texts,
            task=asked_for,
            remove=remove,
            kind=chosen,
            search=search,
            parts=parts,
            keep=keep,
            batch_size=batch_size,
            stack=stack,
            say=say,
            seed=seed,
            sequence_length=sequence_length,
            calibration_tokens=calibration_tokens,
            fitting_tokens=fitting_tokens,
            repeated=repeated,
            validation_tokens=validation_tokens,
            test_tokens=test_tokens,
            test_documents=test_texts,
        )
        ready = prepared_alike(work, ready)
        if training is not None:
            require_parameters(ready, healed)
            ready = trainable_windows(ready, healed, say) if searching.number_of_windows == 1 else ready
    if output is not None:
        ready.require_writable()
    if training is not None and training.on_policy is not None:
        require_writes(model, asked_for, training.on_policy, ready.training)
    for line in ready.announcement(search, named.name, shortlist):
        say(line)
    if repeated and profile is not None:
        say("repeated   where the shortlist is judged; it is made by the profile that was given, on the text of that")
    path = ready.stack.path
    with clock("rank"):
        measured = profile or measure_profile(model, ready.calibration, keep=ready.protected, stack=path)
        branches = training is None  # what stands in the place of half a block is not trained
        asked = ready.question(searching, criterion=named, profile=measured, seed=seed, branches=branches)
        searched = searching.find(asked)
        found = work.of_first(lambda: searched)
        found = found if training is None else trainable(found, ready, healed)
    with clock("verify"):
        judged = verified_together(work, model, found, ready)
    best = judged[work.of_first(lambda: _place_of(first_that_can_go(model, judged, path, say), judged))]
    for line in findings(judged, best, asked_for.distance):
        say(line)
    first = next(one for one in judged if (one.windows, one.silenced) == (found[0].windows, found[0].silenced))
    wanted = attempts_to_measure(best, first, trained=training is not None)
    board: TaskScores | None = None
    perplexities: dict[str, float] = {}
    scores: dict[str, dict[str, float]] = {}
    with clock("measure"):
        if asked_for.is_of_text:
            perplexities = perplexities_together(work, ready, wanted, teacher)
        else:
            board, scores = scores_together(work, ready, wanted, teacher)
            scores = {"original": board.original, **scores}
    student, trained, late = None, None, ""
    if training is not None:
        with clock("train"):
            left = work.of_first(lambda: train_until and train_until - (time.perf_counter() - began))
            if left is None or left > 0:
                student, trained = train_selection(ready, best, ending_in(training, left), healed, teacher, resume, say)
            else:
                late = f"Nothing was trained: what comes before it took all of the {train_until:.4g} seconds for both."
                say(f"trained    {late}")
    with clock("compare"):
        writes = side_by_side and work.processes.rank == 0 and asked_for.is_of_text and tokenizer is not None
        beside = SideBySide(original, tokenizer, ready.test, say) if writes else None
        change = partial(carry_out, selection=best)
        speed = work.of_first(lambda: None if beside is None else beside.speed(model, change, path))
        watch = CollapseWatch(original, tokenizer, ready.test, say) if beside is not None and beside.writes else None
    with clock("measure"):
        before = sizes_of(original)
        test, data, size = ready.test, {**ready.split.figures(), "seed": seed}, ready.size
        fitted = sum(map(tokens_of, (*ready.fit, *ready.held_out)))
        data |= {} if fitting_tokens is None else {"fitting_tokens": fitted}
        data |= {"repeated": repeated} if repeated else {}
        notes: dict[str, Any] = {} if trained is None else {"training": trained.report()}
        notes["repaired"] = how_repaired(best, chosen, trained)
        del ready, asked  # they hold the blocks that go
        with LayerSurgeon(model, path) as surgeon:
            carry_out(surgeon, best)
            plan = surgeon.commit(kind=chosen.name, calibration=data, **notes)
        if student is not None:
            student.settle()
        label = "trained" if trained is not None else "repaired" if puts_in(best) else "removed"
        if board is None:
            perplexities[label] = perplexity_together(work, model, test).value
        else:
            scores[label] = work.of_first(lambda: board.of(model, label))
    with clock("compare"):
        samples = work.of_first(lambda: [] if beside is None else beside.samples(model))
        told = work.of_first(lambda: unmeasured_reasoning(tokenizer) if watch is None else watch.warnings(model))
    after = sizes_of(model)
    result = CompressionResult(
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        kind=chosen.name,
        size=size,
        criterion=named.name,
        search=search,
        candidates=[best, *(one for one in judged if one is not best)],
        perplexities={name: perplexities[name] for name in LABELS if name in perplexities},
        task=asked_for,
        scores={name: scores[name] for name in LABELS if name in scores},
        parameters=(before[0], after[0]),
        size_in_bytes=(before[1], after[1]),
        seconds=work.of_first(lambda: clock.seconds),
        peak_memory=peak_memory_of_process(),
        data=data,
        profile=measured,
        training=trained,
        samples=samples,
        speed=speed,
        warnings=[*filter(None, [late, "" if trained is None else trained.in_vain]), *told],
    )
    if output is not None:
        with clock("save"):
            result.folder = work.of_first(lambda: _save(result, output, overwrite, training, say))
    return result


def _save(
    result: CompressionResult,
    output: str | Path,
    overwrite: bool,
    training: Training | None,
    say: Callable[[str], None],
) -> Path:
    """Write the model, and take away what a training was to be gone on from."""
    folder = save(result.model, output, tokenizer=result.tokenizer, report=result.report(), overwrite=overwrite)
    if training is not None and result.training is not None and training.keep_in == training_file(output):
        if result.training.interrupted and training.keep_in.is_file():
            say(f"{training.keep_in} is left to go on from, with resume and overwrite.")
        elif not result.training.interrupted:
            training.keep_in.unlink(missing_ok=True)  # the weights are in the folder now
    return folder


def _nothing(line: str) -> None:
    """Say nothing: the first process does."""


def _place_of(one: VerifiedSelection, judged: list[VerifiedSelection]) -> int:
    return next(k for k, other in enumerate(judged) if other is one)
