"""Run one round of a compression: rank, shortlist, fit, verify, train, commit, measure, save."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from streamline_hooks.checkpoint import STAGE_LABELS, check_output_folder, check_packing_blockwise, save
from streamline_hooks.core import (
    DistributedStep,
    Processes,
    StepTimer,
    StreamlineError,
    UnsupportedSurgery,
    batches_digest,
    count_tokens,
    current_processes,
    exclusive_global_state,
    get_logger,
    model_size,
    peak_memory,
    select_rows,
    shard_rows,
    state_digest,
)
from streamline_hooks.data import check_packing
from streamline_hooks.distillation import Student, TrainingResult, refuse_float16
from streamline_hooks.evaluation import (
    CollapseCheck,
    GenerationComparison,
    LossMeasure,
    Perplexity,
    TaskScores,
    add_statement,
    perplexity,
    reasoning_warnings,
)
from streamline_hooks.modeling import StateSource, Task, find_stack, sentence_folder_of
from streamline_hooks.pipeline.apply import (
    apply_selection,
    describe_repair,
    first_applicable,
    has_replacement,
    require_committable,
    require_trainable,
    train_selection,
    trainable_selections,
    trainable_windows,
    training_checkpoint,
    training_file,
)
from streamline_hooks.pipeline.config import CompressionConfig, RunOptions
from streamline_hooks.pipeline.depths import ChosenDepth, largest_bounded, load_data_by_measure
from streamline_hooks.pipeline.prepare import Preparation, PreparedBatches, prepare_compression
from streamline_hooks.pipeline.result import CompressionResult, format_candidates, trials_to_measure
from streamline_hooks.pipeline.step_files import (
    read_perplexities,
    read_selections,
    read_verified,
    write_perplexities,
    write_selections,
    write_verified,
)
from streamline_hooks.selection import (
    Selection,
    Trial,
    VerifiedSelection,
    branch_writers,
    selection_applied,
    sort_verified,
    trial_perplexities,
    verify_shortlist,
)
from streamline_hooks.statistics import Profile, check_profile, model_identity
from streamline_hooks.statistics import profile as measure_profile
from streamline_hooks.surgery import LayerSurgeon, ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)


def compress_once(
    model: PreTrainedModel | StateSource,
    data: Any,
    config: CompressionConfig,
    *,
    recorded: CompressionConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    options: RunOptions,
    output: str | Path | None = None,
    **saving: Any,
) -> CompressionResult:
    """Compress in one round.

    Parameters are those of `compress`. `recorded` is the config to save, and `saving` are further arguments of `save`.
    """
    run = CompressionRun(model, config, tokenizer, options, output)
    run.prepare(data)
    profile = run.profile()
    selections = run.search(profile)
    verified = run.fit_and_verify(selections)
    best = run.bound_losses(run.choose(verified))
    run.measure_candidates(best, selections[0], verified)
    run.train(best)
    run.observe_original(best)
    run.commit(best, recorded)
    result = run.result(best, verified, profile, recorded)
    return result if output is None else run.save(result, **saving)


class CompressionRun:
    """The steps of one round of a compression, and the intermediate results that later steps use.

    The methods are called in the order of `compress_once`. In a distributed run every rank calls them; choices and
    solutions are taken from rank 0.
    """

    def __init__(
        self,
        model: PreTrainedModel | StateSource,
        config: CompressionConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        options: RunOptions,
        output: str | Path | None,
    ) -> None:
        self.work, self.clock = DistributedStep("compress", current_processes()), StepTimer()
        self.began = time.perf_counter()
        self.blockwise = model if isinstance(model, StateSource) and not model.in_memory else None
        self.model: Any = model.model if isinstance(model, StateSource) else model
        self.tokenizer, self.options, self.output = tokenizer, options, output
        self.task = config.task or Task.of(self.model)
        if output is not None:
            self.work.broadcast_object(lambda: check_output_folder(output, options.overwrite))
            sentence_folder_of(self.model)  # raises if the folder cannot be saved
        config = replace(config, repair=config.repair.seeded(config.seed))
        if config.distillation is not None:
            config = replace(config, distillation=config.distillation.seeded(config.seed))
        self.config, self.search_config = config, config.search
        self.training_file = self.work.broadcast_object(
            lambda: training_checkpoint(config, options.resume, output, options.checkpoint_file)
        )
        self.task.check_model(self.model)
        if config.distillation is not None:
            config.distillation.objective.require_task(self.task)
            refuse_float16([self.model], config.hardware)
        criterion = config.search.resolved_criterion
        if not self.task.is_causal_lm and criterion.name in ("perplexity", "taylor"):
            raise StreamlineError(
                f"The criterion {criterion.name} needs next-token predictions, but {type(self.model).__name__} is for "
                f"{self.task}. Choose another criterion, such as cosine or kl."
            )
        if options.profile is not None:
            check_profile(options.profile, self.model, find_stack(self.model, config.stack).path)
        self.perplexities: dict[str, float] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.task_scores: TaskScores | None = None
        self.student: Student | None = None
        self.trained: TrainingResult | None = None
        self.not_trained = ""
        self.bounded: ChosenDepth | None = None
        if config.at_most is not None:
            limits = cast("Mapping[LossMeasure, float]", config.at_most)
            if self.task != Task.of(self.model):
                raise StreamlineError(
                    f"compress: at_most was given with task={self.task}, but {type(self.model).__name__} is for "
                    f"{Task.of(self.model)}, which the losses are measured for. Leave task or at_most out."
                )
            self.units = load_data_by_measure(self.model, options.guarantee_data, limits, tokenizer)

    @property
    def original(self) -> Any:
        """The reference model of the measurements: the teacher if one was given, else the model."""
        return self.model if self.options.teacher is None else self.options.teacher

    def prepare(self, data: Any) -> None:
        """Split the data, and find the windows that reach the target."""
        config = self.config
        with self.clock("prepare"):
            check = check_packing_blockwise if self.blockwise else check_packing
            arguments: dict[str, Any] = {
                "task": self.task,
                "test_texts": self.options.test_texts,
                "refuse_crossing": check,
            }
            ready = prepare_compression(self.model, self.tokenizer, data, config, **arguments)
            ready = require_same_inputs(self.work, ready)
            self.source: StateSource = self.blockwise or ModelSource(self.model, ready.stack)
            if self.blockwise is not None:  # only block-by-block runs store results
                self.source.identify(run_identity(ready))
            require_committable(ready)
            if config.distillation is not None:
                require_trainable(ready, config.healing)
                one_window = config.search.number_of_windows == 1
                ready = trainable_windows(ready, config.healing) if one_window else ready
        if self.output is not None:
            ready.require_writable()
        for line in ready.announcement():
            logger.info(line)
        if config.data.repeated_context and self.options.profile is not None:
            logger.info("repeated   only in the text for verifying the shortlist, because a profile was given")
        self.ready, self.path, self.in_memory = ready, ready.stack.path, self.source.in_memory

    def profile(self) -> Profile:
        """Return the given profile, or compare the hidden states at all boundaries."""
        with self.clock("rank"):
            measure = partial(measure_profile, self.source, self.ready.calibration, protect=self.ready.protected)
            return self.options.profile or self.source.cached("profile", measure, Profile.save, Profile.load)

    def search(self, profile: Profile) -> list[Selection]:
        """Return the shortlist of selections."""
        with self.clock("rank"):
            problem = self.ready.problem(profile=profile)
            runs = self.search_config.runs_model
            if not self.in_memory:
                problem = replace(
                    problem, model=self.source if runs else None, batches=problem.batches if runs else None
                )
            find = partial(self.search_config.find, problem)
            searched = self.source.cached("search", find, write_selections, read_selections) if runs else find()
            shortlist = self.work.broadcast_object(lambda: searched)
            trains = self.config.distillation is not None
            return trainable_selections(shortlist, self.ready, self.config.healing) if trains else shortlist

    def fit_and_verify(self, selections: Sequence[Selection]) -> list[VerifiedSelection]:
        """Fit replacements for the shortlist, and compare the repaired models with the original."""
        with self.clock("verify"):
            verify = partial(distributed_verify, self.work, self.source, selections, self.ready)
            read = partial(read_verified, self.ready.stack, self.ready.kind)
            return self.source.cached("verify", verify, write_verified, read)

    def choose(self, verified: list[VerifiedSelection]) -> VerifiedSelection:
        """Return the best selection that can be applied."""
        with self.clock("choose"):
            applicable = partial(first_applicable, self.model, verified, self.path)
            chosen = self.work.broadcast_object(lambda: list(map(id, verified)).index(id(applicable())))
        for line in format_candidates(verified, verified[chosen], self.task.distance):
            logger.info(line)
        return verified[chosen]

    def bound_losses(self, best: VerifiedSelection) -> VerifiedSelection:
        """Return the largest part of a selection whose losses are bounded as the config requires."""
        if self.config.at_most is None:
            return best
        with self.clock("guarantee"):
            bounded, self.bounded = largest_bounded(self.model, self.options.teacher, self.ready, best, self.units)
        return bounded

    def measure_candidates(
        self, best: VerifiedSelection, first: Selection, verified: Sequence[VerifiedSelection]
    ) -> None:
        """Measure the original, the chosen and the first selection on the test data."""
        first = next(
            selection
            for selection in verified
            if (selection.windows, selection.zeroed) == (first.windows, first.zeroed)
        )
        if self.bounded is not None and len(first.blocks) != len(best.blocks):  # two lengths do not compare
            first = best
        trained = self.config.distillation is not None or not self.in_memory
        trials, teacher = trials_to_measure(best, first, trained=trained), self.options.teacher
        with self.clock("measure"):
            if self.task.is_causal_lm:
                measure = partial(distributed_perplexities, self.work, self.source, self.ready, trials, teacher)
                self.perplexities = self.source.cached("measure", measure, write_perplexities, read_perplexities)
            else:
                self.task_scores, scores = distributed_scores(self.work, self.ready, trials, teacher)
                self.scores = {"original": self.task_scores.original, **scores}

    def train(self, best: VerifiedSelection) -> None:
        """Train the replacements of a selection, if the config has a distillation and time is left."""
        config, limit = self.config, self.config.train_until
        if config.distillation is None:
            return
        with self.clock("train"):
            seconds_left = self.work.broadcast_object(lambda: limit and limit - (time.perf_counter() - self.began))
            if seconds_left is not None and seconds_left <= 0:
                self.not_trained = (
                    f"Nothing was trained: the steps before training took all of train_until={limit:.4g} seconds."
                )
                logger.info(f"trained    {self.not_trained}")
                return
            if seconds_left is not None:
                minutes = min(seconds_left / 60, config.distillation.max_minutes or math.inf)
                config = replace(config, distillation=replace(config.distillation, max_minutes=minutes))
            arguments: dict[str, Any] = {"resume": self.options.resume, "callbacks": self.options.callbacks}
            self.student, self.trained = train_selection(
                self.ready, best, config, cast("Any", self.options.teacher), self.training_file, **arguments
            )

    def observe_original(self, best: VerifiedSelection) -> None:
        """Generate with the original, and time both models, before the model is changed."""
        evaluation, ready = self.config.evaluation, self.ready
        with self.clock("compare"):
            compares = self.work.processes.rank == 0 and self.task.is_causal_lm and self.tokenizer is not None
            compares = compares and self.in_memory and (evaluation.speed or evaluation.generation)
            comparison = self.comparison = (
                GenerationComparison(self.original, self.tokenizer, ready.test, write=evaluation.generation)
                if compares
                else None
            )
            change = partial(apply_selection, selection=best)
            self.time_ratio = self.work.broadcast_object(partial(ready.target_windows.time_ratio, ready.stack, change))
            timed = comparison if evaluation.speed else None
            self.speed = self.work.broadcast_object(
                lambda: None if timed is None else timed.speed(self.model, change, self.path)
            )
            writes = comparison is not None and comparison.can_generate
            self.collapse = CollapseCheck(self.original, self.tokenizer, ready.test) if writes else None

    def commit(self, best: VerifiedSelection, recorded: CompressionConfig) -> None:
        """Apply a selection permanently, and measure the compressed model on the test data."""
        ready, config = self.ready, self.config
        with self.clock("measure"):
            self.before, self.unchanged = model_size(self.original), model_size(self.model)
            self.test, self.size, self.target_windows = ready.test, ready.size, ready.target_windows
            self.record = {**ready.split.report(), "seed": config.seed}
            if config.data.fitting_tokens is not None:
                self.record["fitting_tokens"] = sum(map(count_tokens, (*ready.fit, *ready.held_out)))
            if config.data.repeated_context:
                self.record["repeated"] = config.data.repeated_context
            notes: dict[str, Any] = {} if self.trained is None else {"training": self.trained.report()}
            notes["repaired"] = describe_repair(best, config.repair, self.trained)
            del ready, self.ready, self.source  # they hold the removed blocks
            # A block-by-block run verified the removal before.
            with LayerSurgeon(self.model, self.path, probe=self.in_memory) as surgeon:
                apply_selection(surgeon, best)
                self.plan = surgeon.commit(
                    kind=config.repair.name, calibration=self.record, config=recorded.to_dict(), **notes
                )
            if self.student is not None:
                self.student.copy_weights_to_model()
            if self.bounded is not None:
                reference = "the model before this change" if self.options.teacher is None else "the given teacher"
                add_statement(self.model, f"relative to {reference}, {self.bounded}", state_digest(self.model))
            label = "trained" if self.trained is not None else "repaired" if has_replacement(best) else "removed"
            scores = self.task_scores
            if scores is not None:
                self.scores[label] = self.work.broadcast_object(lambda: scores.of(self.model, label))
            elif self.in_memory:
                self.perplexities[label] = distributed_perplexity(self.work, self.model, self.test).value

    def result(
        self,
        best: VerifiedSelection,
        verified: Sequence[VerifiedSelection],
        profile: Profile,
        recorded: CompressionConfig,
    ) -> CompressionResult:
        """Generate with the compressed model, and collect the results."""
        comparison, collapse, trained, work = self.comparison, self.collapse, self.trained, self.work
        with self.clock("compare"):
            samples = work.broadcast_object(lambda: [] if comparison is None else comparison.samples(self.model))
            degeneration = work.broadcast_object(
                lambda: reasoning_warnings(self.tokenizer) if collapse is None else collapse.warnings(self.model)
            )
            windows = [repair.window for repair in best.repairs]
            outcome = partial(
                self.target_windows.outcome, windows, self.model, before=self.unchanged, ratio=self.time_ratio
            )
            target = work.broadcast_object(outcome)
        after = model_size(self.model)
        notices = ["" if trained is None else trained.warning, "" if target is None else target.warning]
        return CompressionResult(
            model=self.model,
            tokenizer=self.tokenizer,
            plan=self.plan,
            config=recorded,
            kind=self.config.repair.name,
            size=self.size,
            criterion=self.search_config.resolved_criterion.name,
            search=self.search_config.kind,
            candidates=[best, *(selection for selection in verified if selection is not best)],
            perplexities={name: self.perplexities[name] for name in STAGE_LABELS if name in self.perplexities},
            task=self.task,
            scores={name: self.scores[name] for name in STAGE_LABELS if name in self.scores},
            parameters=(self.before[0], after[0]),
            size_in_bytes=(self.before[1], after[1]),
            seconds=work.broadcast_object(lambda: self.clock.seconds),
            peak_memory=peak_memory(),
            data=self.record,
            profile=profile,
            training=trained,
            samples=samples,
            speed=self.speed,
            target=target,
            bounded=self.bounded,
            warnings=[*filter(None, [self.not_trained, *notices]), *degeneration],
        )

    def save(self, result: CompressionResult, **options: Any) -> CompressionResult:
        """Save the model on rank 0, and record its folder in the result."""
        assert self.output is not None
        output = self.output
        arguments: dict[str, Any] = {"overwrite": self.options.overwrite, "file": self.training_file, **options}
        with self.clock("save"):
            result.folder = self.work.broadcast_object(lambda: _save(result, output, **arguments))
        result.peak_memory = peak_memory()
        return result


def _save(
    result: CompressionResult,
    output: str | Path,
    overwrite: bool,
    file: Path | None,
    **options: Any,
) -> Path:
    """Save the model, and remove the default training checkpoint of a finished training run."""
    with exclusive_global_state(), warnings.catch_warnings():
        # The warning assumes files of 50 GB.
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        report = result.report()
        folder = save(result.model, output, tokenizer=result.tokenizer, report=report, overwrite=overwrite, **options)
    if result.training is not None and file is not None and file == training_file(output):
        if result.training.interrupted and file.is_file():
            logger.info(f"The training checkpoint {file} is kept. Continue with resume and overwrite.")
        elif not result.training.interrupted:
            file.unlink(missing_ok=True)  # the folder has the weights
    return folder


def require_same_inputs(work: DistributedStep, ready: Preparation) -> Preparation:
    """Check that all ranks have the same model, data and config, and use the candidate windows of rank 0.

    Candidates can depend on measured times. Only the hardware config may differ between ranks.
    """
    if work.processes.count > 1:
        batches: list[Any] = [*ready.calibration, *ready.verification]  # the caller may have passed tensors
        selection_inputs = [
            tensor for batch in batches for tensor in ([batch] if isinstance(batch, Tensor) else batch.values())
        ]
        config = {f"config.{name}": value for name, value in ready.config.to_dict().items() if name != "hardware"}
        work.shard([*ready.split.tensors, *selection_inputs], **model_identity(ready.stack), **config)
    candidates, windows = work.broadcast_object(lambda: (ready.candidates, ready.target_windows))
    return replace(ready, candidates=candidates, target_windows=windows)


def run_identity(ready: Preparation) -> dict[str, Any]:
    """Return the inputs, except the model, that must be equal to resume a compression."""
    config = ready.config
    seed = {"seed": ready.kind.seed} if ready.kind.seed else {}
    return {
        "batches": batches_digest([ready.calibration, ready.fit, ready.held_out, ready.verification, ready.test]),
        "target": str(config.target),
        "kind": ready.kind.name,
        "keep": sorted(ready.protected),
        "criterion": config.search.resolved_criterion.name,
        "shortlist": config.search.shortlist,
        "search": config.search.to_dict(),
        **seed,
    }


def distributed_verify(
    work: DistributedStep, source: StateSource, selections: Sequence[Selection], ready: Preparation
) -> list[VerifiedSelection]:
    """Fit and verify selections as `verify_shortlist` does, with the verification text divided between the ranks.

    Returns
    -------
    list of VerifiedSelection
        The best selection first. All ranks return the same list, with the solutions of rank 0.
    """
    options: dict[str, Any] = {"replacement": ready.kind, "task": ready.task}
    if work.processes.count == 1:
        return verify_shortlist(source, selections, ready.fit, ready.held_out, ready.verification, **options)
    rank_batches = _rank_batches(ready.verification, work.processes)
    # A rank without rows still takes part in fitting.
    verification_batches = rank_batches or [select_rows(ready.verification[0], slice(0, 1))]
    rank_verified = verify_shortlist(source, selections, ready.fit, ready.held_out, verification_batches, **options)
    verified = [
        next(candidate for candidate in rank_verified if _blocks_of(candidate) == _blocks_of(selection))
        for selection in selections
    ]
    rank_results = work.all_gather_object(
        (sum(map(ready.task.count, rank_batches)), [(candidate.distance, candidate.refused) for candidate in verified])
    )
    total = sum(count for count, _ in rank_results)
    for k, candidate in enumerate(verified):
        refused = next((outcomes[k][1] for _, outcomes in rank_results if outcomes[k][1]), "")
        distance = math.fsum(count * outcomes[k][0] for count, outcomes in rank_results if count) / total
        verified[k] = replace(candidate, distance=math.inf if refused else distance, refused=refused)
    if not any(math.isfinite(candidate.distance) for candidate in verified):
        raise StreamlineError(
            f"All {len(verified)} shortlisted selections give non-finite logits on part of the verification text. "
            "Expected at least one with finite logits. Remove less, protect other blocks, or use float32 or bfloat16."
        )
    return sort_verified(_broadcast_repairs(work, verified), ready.kind)


def distributed_perplexities(
    work: DistributedStep,
    source: StateSource,
    ready: Preparation,
    trials: Mapping[str, Trial],
    teacher: nn.Module | None = None,
) -> dict[str, float]:
    """Return the perplexity of the original and of the trials on the test text; see `trial_perplexities`.

    If a teacher is given, it is the original.
    """
    rank_batches = _rank_batches(ready.test, work.processes)
    perplexities = [Perplexity()] * (1 + len(trials))
    if rank_batches:
        desc = f"perplexity of the original and {len(trials)} others"
        original, trial_results = trial_perplexities(source, rank_batches, list(trials.values()), desc)
        perplexities = [original, *trial_results]
    values = (result.value for result in _sum_over_ranks(work, perplexities))
    by_name = dict(zip(["original", *trials], values, strict=True))
    if teacher is not None:
        by_name["original"] = distributed_perplexity(work, teacher, ready.test, "perplexity: original").value
    return by_name


def distributed_perplexity(
    work: DistributedStep, model: nn.Module, batches: PreparedBatches, desc: str = "perplexity"
) -> Perplexity:
    """Return the perplexity of a model, with the batches divided between the ranks."""
    rank_batches = _rank_batches(batches, work.processes)
    own = perplexity(model, rank_batches, desc) if rank_batches else Perplexity()  # more ranks than sequences
    return _sum_over_ranks(work, [own])[0]


def distributed_scores(
    work: DistributedStep, ready: Preparation, trials: Mapping[str, Trial], teacher: nn.Module | None = None
) -> tuple[TaskScores, dict[str, dict[str, float]]]:
    """Return the scorer with the outputs of the original, and the scores by trial and measure.

    Every rank measures all trials. If a teacher is given, it is the original.
    """
    model, stack = ready.stack.model, ready.stack
    scores = TaskScores(model if teacher is None else teacher, ready.test, ready.task)
    blocks = {k for trial in trials.values() for k, _ in trial.selection.zeroed}
    known = branch_writers(stack, sorted(blocks), ready.test[0]) if blocks else {}
    writers = {branch: paths for branch, paths in known.items() if not isinstance(paths, UnsupportedSurgery)}
    trial_scores = {}
    for name, trial in trials.items():
        with selection_applied(stack, trial, writers):
            trial_scores[name] = scores.of(model, name.replace("_", " "))
    return scores, work.broadcast_object(lambda: trial_scores)


def _rank_batches(batches: PreparedBatches, processes: Processes) -> PreparedBatches:
    if processes.count == 1:
        return batches
    shares = zip(batches, shard_rows(batches, processes), strict=True)
    return [select_rows(batch, rows) for batch, rows in shares if rows.start < rows.stop]


def _sum_over_ranks(work: DistributedStep, perplexities: Sequence[Perplexity]) -> list[Perplexity]:
    return [sum(parts, Perplexity()) for parts in zip(*work.all_gather_object(list(perplexities)), strict=True)]


def _blocks_of(selection: Selection) -> tuple[object, object]:
    return selection.windows, selection.zeroed


def _broadcast_repairs(work: DistributedStep, verified: Sequence[VerifiedSelection]) -> list[VerifiedSelection]:
    """Replace all fitted values by those of rank 0, bit for bit."""
    repairs = [repair for selection in verified for repair in selection.repairs]
    modules = [repair.replacement_module for repair in repairs if isinstance(repair.replacement_module, nn.Module)]
    tensors = [branch.map for selection in verified for branch in selection.maps]
    tensors += [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    kinds = [type(repair.replacement_module).__name__ for repair in repairs]
    layout = kinds, [(tuple(t.shape), str(t.dtype)) for t in tensors]
    if any(other != layout for other in work.all_gather_object(layout)):
        raise StreamlineError(
            "The ranks fitted different replacements for the same selections. Expected equal inputs on every rank. "
            "Pass the same model, arguments and data on every rank."
        )
    work.broadcast_(tensor for tensor in tensors if not tensor.is_meta)
    configs = [
        None if isinstance(repair.replacement_module, nn.Module) else repair.replacement_module for repair in repairs
    ]
    first = iter(work.broadcast_object(lambda: configs))
    return [
        replace(
            selection,
            repairs=tuple(
                replace(repair, replacement_module=next(first) or repair.replacement_module)
                for repair in selection.repairs
            ),
        )
        for selection in verified
    ]
