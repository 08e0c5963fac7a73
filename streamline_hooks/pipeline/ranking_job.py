"""Rank the windows of a pretrained model by name, on text from named sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamline_hooks.checkpoint import LoadingConfig, load_processor, load_quietly, task_of_pretrained
from streamline_hooks.core import (
    DistributedStep,
    Processes,
    StreamlineError,
    check_writable,
    get_logger,
    split_into_batches,
)
from streamline_hooks.data import (
    PartSizes,
    TextSources,
    TokenSplit,
    accepted_modalities,
    check_tokenizer,
    contains_image_texts,
    smallest_part,
    split_documents,
    task_batches,
    with_repeated_passages,
)
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.job import EXAMPLES, refuse_unused_sizes, takes_documents
from streamline_hooks.pipeline.plan import estimate_ranking
from streamline_hooks.pipeline.prepare import SourceText, require_positions, split_sizes
from streamline_hooks.pipeline.stage_times import CostEstimate
from streamline_hooks.selection import Ranking, Target, protected_blocks, rank_windows, require_target_free
from streamline_hooks.statistics import Profile, check_profile, profile

logger = get_logger(__name__)


@dataclass
class RankingJob:
    """Rank the windows of a pretrained model, or of a saved profile.

    Call `check`, `prepare` and `run` in this order; `estimate` after `prepare`.

    Attributes
    ----------
    model : str, optional
        A folder, a model id on the Hugging Face Hub, or ``smollm2``. Not needed with a profile, unless the search runs
        the model.
    config : CompressionConfig
        Its search, data and task are used. ``search.shortlist`` is the number of rows.
    target : Target, optional
        The target that the windows must reach. By default windows of every length are ranked.
    profile_file, save : Path, optional
        A saved profile, and a file to save the profile to.
    sources : TextSources
        Sources of the calibration text.
    loading : LoadingConfig
        Options for loading the model.
    examples : int
        Number of images or text pairs to calibrate on.
    flags : mapping of str to str
        Command-line options that were set, by path, for error messages.
    """

    model: str | None
    config: CompressionConfig
    target: Target | None = None
    profile_file: Path | None = None
    save: Path | None = None
    sources: TextSources = field(default_factory=TextSources)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    examples: int = EXAMPLES["calibration"]
    flags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._loaded: Any = None
        self._batches: Any = None
        self._profile: Profile | None = None

    @property
    def _runs_model(self) -> bool:
        """Whether the search or the criterion runs the model in addition to the profile."""
        search = self.config.search
        return search.runs_model or search.resolved_criterion.needs == "model"

    def check(self, *, dry_run: bool = False) -> None:
        """Raise if the settings contradict each other; nothing is loaded."""
        if self.target is None:
            require_target_free(self.config.search)
        else:
            self.config.search.check(self.target)
        if self.save is not None:
            if not self.save.resolve().parent.is_dir():
                raise StreamlineError(
                    f"--save {self.save}: there is no folder {self.save.parent}. Expected a file in an existing "
                    "folder. Create the folder first."
                )
            check_writable(self.save)
        if self.model is None and self.profile_file is None:
            raise StreamlineError(
                "Neither a model nor a profile was given. Expected one of them. Name a model, or a profile saved with "
                "--save (--profile FILE)."
            )
        if dry_run and self.sources.generated:
            raise StreamlineError(
                f"{self.sources.special} was given with --dry-run, which generates no text. Expected existing sources. "
                "Leave it out, or run without --dry-run."
            )

    def prepare(self) -> None:
        """Load the model, the text and the profile, as far as they are needed."""
        stack = self.config.stack
        if self.model is not None:
            task = self.config.task or task_of_pretrained(self.model, self.loading)
            self.config = replace(self.config, task=task)
            if not task.is_causal_lm and self.sources.special:
                raise StreamlineError(
                    f"{self.sources.special} is for models that generate text, and {self.model} is for {task}. "
                    "Expected files or folders. Change the source."
                )
            if not contains_image_texts(self.sources.names):
                refuse_unused_sizes(task, [*self.flags.values()])
            self._loaded, processor = load_quietly(self.model, task, self.loading)
            if takes_documents(self._loaded, task, self.sources) or not task.is_causal_lm:
                refuse_unused_sizes(task, [*self.flags.values()], self._loaded)
            if all(accepted_modalities(self._loaded)) and not takes_documents(self._loaded, task, self.sources):
                processor = load_processor(self.model, self.loading)
            stack = find_stack(self._loaded, stack).path
            self.config = replace(self.config, stack=stack)
            if self.profile_file is None or self._runs_model:
                cache = None if self.save is None else self.save.resolve().parent
                self._batches = calibration_batches(
                    self._loaded, processor, self.config, self.sources, cache, self.examples
                )
        if self.profile_file is not None:
            self._profile = Profile.load(self.profile_file)
            if self._loaded is not None:
                check_profile(self._profile, self._loaded, stack)
            elif stack is not None and stack != self._profile.about.get("stack"):
                raise StreamlineError(
                    f"--stack {stack} differs from the stack {self._profile.about.get('stack')} of "
                    f"{self.profile_file}. Expected the stack of the profile. Leave --stack out."
                )

    def estimate(self) -> CostEstimate | None:
        """Estimate the cost of the profile, or return None if it was loaded from a file."""
        estimate = None
        if self._profile is not None:
            logger.info("The profile was loaded from a file and is not measured.")
        else:
            estimate = estimate_ranking(self._loaded, self._batches, stack=self.config.stack)
        if self._runs_model:
            search = self.config.search
            logger.info(f"The search {search.kind} by {search.resolved_criterion.name} runs the model in addition.")
        return estimate

    def run(self) -> Ranking:
        """Measure the profile unless it was loaded, save it, and rank the windows."""
        search, stack = self.config.search, self.config.stack
        blocks = self._profile.length if self._profile else len(find_stack(self._loaded, stack))
        protected = protected_blocks(search.protect, blocks)
        if self._profile is None:
            self._profile = profile(self._loaded, self._batches, protect=protected, stack=stack)
        if self.save is not None:
            self._profile.save(self.save)
        arguments: dict[str, Any] = {"model": self._loaded, "batches": self._batches, "task": self.config.task}
        return rank_windows(self._profile, search, self.target, **arguments)


def calibration_batches(
    model: Any, processor: Any, config: CompressionConfig, sources: TextSources, cache: Path | None, examples: int
) -> Any:
    """Return the calibration batches for ranking the windows of a model."""
    data, batch_size = config.data, config.hardware.batch_size
    task = config.task or Task.of(model)
    if not takes_documents(model, task, sources):
        if data.repeated_context:
            logger.info(f"repeated   nothing: data.repeated_context does not apply to a model for {task}")
        sizes = {"calibration": data.calibration_tokens}, {"calibration": examples}
        amounts = PartSizes(*sizes, data.sequence_length, batch_size, config.seed)
        names = None if sources == TextSources() else list(sources.names)
        return task_batches(model, processor, task, names, amounts)["calibration"]
    require_positions(model, data.sequence_length)
    length = data.sequence_length
    unused = smallest_part(sources.shares, length) if sources.shares else length
    source = SourceText(sources, {**split_sizes(config), "validation_tokens": unused, "test_tokens": unused})
    source.generate(model, processor, cache, DistributedStep("rank", Processes()))
    split, _ = source.divided(processor)
    if not isinstance(split, TokenSplit):
        split = split_documents(split, processor, **source.sizes)
    elif split.notes:
        logger.info(f"text       {split.describe()}")
    if data.repeated_context:
        split = with_repeated_passages(split, data.repeated_context)
        logger.info(f"repeated   the second half of {data.repeated_context:.0%} of the sequences repeats the first")
    check_tokenizer(processor, model.get_input_embeddings().num_embeddings, split)
    return split_into_batches(split.calibration, batch_size)
