"""Rank the windows of a pretrained model by name, on text from named sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamline_hooks.checkpoint import LoadingConfig, task_of_pretrained
from streamline_hooks.core import (
    DistributedStep,
    Processes,
    StreamlineError,
    check_writable,
    get_logger,
)
from streamline_hooks.data import (
    PARTS,
    BatchSplit,
    TokenSplit,
    check_tokenizer,
    contains_image_texts,
    smallest_part,
    split_documents,
)
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline.apply import is_trainable
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.job import JobData, load_for_data, refuse_unused_sizes
from streamline_hooks.pipeline.plan import estimate_ranking
from streamline_hooks.pipeline.prepare import SourceText, batches_by_step, require_positions, split_sizes
from streamline_hooks.pipeline.stage_times import CostEstimate
from streamline_hooks.selection import Ranking, Target, protected_blocks, rank_windows, require_target_free
from streamline_hooks.statistics import Profile, check_profile, profile

logger = get_logger(__name__)


AFTER_RANKING = (
    "distillation",
    "evaluation",
    "hardware.autocast",
    "hardware.state_",
    "train_until",
    "at_most",
    "delta",
)
"""Prefixes of the fields of `CompressionConfig` whose values only steps after the ranking use."""


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
        The windows are those of `compress` with this config. ``search.shortlist`` is the number of rows.
    target : Target, optional
        The target that the windows must reach. By default windows of every length are ranked.
    data : JobData
        Sources of the data. The calibration part is that of `compress` with the same config and data.
    loading : LoadingConfig
        Options for loading the model.
    profile : Profile, optional
        A saved profile. By default it is measured.
    save : Path, optional
        A file to save the profile to.
    flags : mapping of str to str
        Names of the options and the fields of a config file that were set, by path: ``--seed``, or ``seed in FILE``.
    """

    model: str | None
    config: CompressionConfig
    target: Target | None = None
    data: JobData = field(default_factory=JobData)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    profile: Profile | None = None
    save: Path | None = None
    flags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._loaded: Any = None
        self._batches: Any = None

    @property
    def _runs_model(self) -> bool:
        """Whether the search or the criterion runs the model in addition to the profile."""
        search = self.config.search
        return search.runs_model or search.resolved_criterion.needs == "model"

    def check(self, *, dry_run: bool = False) -> None:
        """Raise if the settings contradict each other; nothing is loaded."""
        config, special = self.config, self.data.sources.special
        if self.target is None:
            require_target_free(config.search)
        else:
            config.search.check(self.target, replacement=config.repair)
        if config.rounds > 1:
            raise StreamlineError(
                f"rounds={config.rounds} ranks the repaired model again in each round, which a ranking cannot. "
                "Expected one round. Remove rounds from the config, or run compress."
            )
        if self.save is not None:
            if not self.save.resolve().parent.is_dir():
                raise StreamlineError(
                    f"--save {self.save}: there is no folder {self.save.parent}. Expected a file in an existing "
                    "folder. Create the folder first."
                )
            check_writable(self.save)
        if self.model is None and self.profile is None:
            raise StreamlineError(
                "Neither a model nor a profile was given. Expected one of them. Name a model, or a profile saved with "
                "--save (--profile FILE)."
            )
        if dry_run and self.data.sources.generated:
            raise StreamlineError(
                f"{special} was given with --dry-run, which generates no text. Expected existing sources. Leave it "
                "out, or run without --dry-run."
            )
        later = [path for path in self.flags if path.startswith(AFTER_RANKING)]
        if later:
            logger.info(f"after      the ranking: {', '.join(later)} of the config, which it does not depend on")

    def prepare(self) -> None:
        """Load the model and the data, as far as they are needed."""
        stack, data = self.config.stack, self.data
        if self.model is not None:
            task = self.config.task or task_of_pretrained(self.model, self.loading)
            self.config = replace(self.config, task=task)
            if not task.is_causal_lm and data.sources.special:
                raise StreamlineError(
                    f"{data.sources.special} is for models that generate text, and {self.model} is for {task}. "
                    "Expected files or folders. Change the source."
                )
            if not contains_image_texts(data.sources.names):
                refuse_unused_sizes(task, self.flags)
            self._loaded, processor, takes_text = load_for_data(self.model, task, data, self.loading, self.flags)
            stack = find_stack(self._loaded, stack).path
            self.config = replace(self.config, stack=stack)
            if self.profile is None or self._runs_model:
                self._batches = self._text(processor) if takes_text else self._task_batches(processor)
        if self.profile is not None and self._loaded is not None:
            check_profile(self.profile, self._loaded, stack)
        elif self.profile is not None and stack is not None and stack != self.profile.about.get("stack"):
            raise StreamlineError(
                f"--stack {stack} differs from the stack {self.profile.about.get('stack')} of the profile. Expected "
                "the stack of the profile. Leave --stack out."
            )

    def _task_batches(self, processor: Any) -> list[dict[str, Any]]:
        """Return the calibration batches of a model that is not given documents."""
        config, task = self.config, self.config.task
        assert task is not None
        if config.data.fitting_tokens is not None:
            raise StreamlineError(
                f"fitting_tokens={config.data.fitting_tokens} applies to text, and the inputs of a model for {task} "
                "are batches. Expected None. Remove data.fitting_tokens from the config."
            )
        if config.data.repeated_context:
            logger.info(f"repeated   nothing: data.repeated_context does not apply to a model for {task}")
        parts = self.data.task_batches(self._loaded, processor, task, config)
        return BatchSplit.of(parts, task).calibration if set(parts) == set(PARTS) else parts["calibration"]

    def _text(self, processor: Any) -> list[dict[str, Any]]:
        """Return the calibration batches of a model that is given documents."""
        model, config, sources = self._loaded, self.config, self.data.sources
        length = config.data.sequence_length
        require_positions(model, length)
        sizes: dict[str, Any] = split_sizes(config)
        if set(self.data.parts) == {"calibration"}:
            unused = smallest_part(sources.shares, length) if sources.shares else length
            sizes |= {"validation_tokens": unused, "test_tokens": unused}
        source = SourceText(sources, sizes)
        cache = None if self.save is None else self.save.resolve().parent
        source.generate(model, processor, cache, DistributedStep("rank", Processes()))
        split, _ = source.divided(processor)
        if not isinstance(split, TokenSplit):
            split = split_documents(split, processor, **sizes)
        check_tokenizer(processor, model.get_input_embeddings().num_embeddings, split)
        assert config.stack is not None
        split, batches = batches_by_step(model, split, config, stack=config.stack)
        if split.notes:
            logger.info(f"text       {split.describe()}")
        return batches[0]

    def estimate(self) -> CostEstimate | None:
        """Estimate the cost of the profile, or return None if a profile was given."""
        estimate = None
        if self.profile is not None:
            logger.info("The profile was loaded from a file and is not measured.")
        else:
            estimate = estimate_ranking(self._loaded, self._batches, stack=self.config.stack)
        if self._runs_model:
            search = self.config.search
            logger.info(f"The search {search.kind} by {search.resolved_criterion.name} runs the model in addition.")
        return estimate

    def run(self) -> Ranking:
        """Measure the profile unless it was given, save it, and rank the windows."""
        search, stack = self.config.search, self.config.stack
        blocks = self.profile.length if self.profile else len(find_stack(self._loaded, stack))
        protected = protected_blocks(search.protect, blocks)
        measured = self.profile or profile(self._loaded, self._batches, protect=protected, stack=stack)
        if self.save is not None:
            measured.save(self.save)
        return rank_windows(
            measured,
            search,
            self.target,
            model=self._loaded,
            batches=self._batches,
            task=self.config.task,
            replacement=self.config.repair,
            is_allowed=self._is_trainable if self.config.distillation is not None else None,
        )

    def _is_trainable(self, windows: Sequence[range]) -> bool:
        """Whether `compress` can train something after the removal of windows."""
        if self._loaded is None:
            raise StreamlineError(
                "The config has a distillation, and which windows it can train depends on the model. Expected a model "
                "with the profile. Name the model, or remove distillation from the config."
            )
        stack = find_stack(self._loaded, self.config.stack)
        parameters = self.config.repair.size(stack, windows[0]).parameters
        return is_trainable(len(stack), parameters, self.config.healing, windows)
