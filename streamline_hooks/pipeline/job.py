"""Compress a pretrained model, given by its name, on text from named sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from streamline_hooks.checkpoint import (
    LoadingConfig,
    check_output_folder,
    load_processor,
    load_quietly,
    task_of_pretrained,
)
from streamline_hooks.core import DistributedStep, Processes, StreamlineError, get_logger
from streamline_hooks.data import (
    PARTS,
    PartSizes,
    TextSources,
    accepted_modalities,
    contains_image_texts,
    task_batches,
)
from streamline_hooks.evaluation import Suite
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.pipeline.apply import training_file
from streamline_hooks.pipeline.compress import blocks_by_round, compress
from streamline_hooks.pipeline.compress_checkpoint import unsupported_fields
from streamline_hooks.pipeline.config import CompressionConfig, RunOptions
from streamline_hooks.pipeline.cost import (
    BlockwiseEstimate,
    blockwise_memory,
    compress_in_blocks,
    estimate_in_blocks,
    processes_here,
)
from streamline_hooks.pipeline.plan import TrainingPlan, check_plannable, estimate_cost, plan_training
from streamline_hooks.pipeline.prepare import SourceText, split_sizes
from streamline_hooks.pipeline.result import CompressionResult
from streamline_hooks.pipeline.stage_times import CostEstimate

logger = get_logger(__name__)

EXAMPLES = {"calibration": 256, "validation": 64, "test": 256}
"""Default numbers of images, or pairs of texts, in each part."""
EVALUATION_TOKENS = 20_000
"""Default number of tokens on which an encoder is evaluated."""
PLANNED = (
    "repair", "healing", "rounds", "search", "search.criterion", "data.calibration_tokens", "data.fitting_tokens",
    "data.repeated_context", "hardware.autocast",
)  # fmt: skip
"""The options that do not go with a time budget, in addition to those of the distillation."""
REPLACED = (
    "data.calibration_tokens", "data.fitting_tokens", "distillation.epochs", "distillation.validations",
    "hardware.autocast",
)  # fmt: skip
"""The fields of a recipe that a time budget replaces."""


@dataclass(frozen=True)
class JobData:
    """The sources of the data of a job.

    Attributes
    ----------
    sources : TextSources
        Sources of the calibration text, or files of images or pairs.
    test : sequence of str
        Sources of the test part. By default it is a part of `sources`.
    pack : bool
        Whether whole documents are packed into the sequences.
    examples : mapping of str to int
        Number of images or pairs in each part, by its name. By default see `EXAMPLES`.
    parts : sequence of str
        The parts to read: all three by default, or ``calibration`` alone to rank on as little data as possible.

    Examples
    --------
    >>> from streamline_hooks.pipeline import JobData
    >>> JobData(examples={"calibration": 64}).sources.names
    ('pydoc',)
    """

    sources: TextSources = field(default_factory=TextSources)
    test: Sequence[str] = ()
    pack: bool = False
    examples: Mapping[str, int] = field(default_factory=dict)
    parts: Sequence[str] = PARTS

    def task_batches(
        self, model: Any, processor: Any, task: Task, config: CompressionConfig
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the batches of each part, for a model that is not given documents."""
        sizes = split_sizes(config)
        amounts = PartSizes(
            {part: sizes[f"{part}_tokens"] for part in self.parts},
            {part: self.examples.get(part, EXAMPLES[part]) for part in self.parts},
            config.data.sequence_length,
            config.hardware.batch_size,
            config.seed,
        )
        names = None if self.sources == TextSources() else list(self.sources.names)
        return task_batches(model, processor, task, names, amounts, list(self.test) or None)


@dataclass(frozen=True)
class JobLimits:
    """The limits of a compression.

    Attributes
    ----------
    memory : int, optional
        Bytes of memory of this machine that may be used. By default the memory that is free.
    seconds : float, optional
        Time for the whole compression, see `plan_training`. By default it is not limited.
    stated : frozenset of str
        Paths of the fields that a config file contains; sizes among them are kept also if they are the default.
    """

    memory: int | None = None
    seconds: float | None = None
    stated: frozenset[str] = frozenset()


@dataclass
class CompressionJob:
    """Compress a pretrained model, given by its name, on text from named sources.

    Attributes
    ----------
    model : str
        A folder, the name of a model on the hub, or ``smollm2``.
    config : CompressionConfig
        If its `task` is None, the task follows from the model's class.
    output : Path
        Folder for the compressed model.
    data : JobData
    loading : LoadingConfig
    options : RunOptions
        Its `test_texts` are replaced by those of `data`.
    limits : JobLimits
    flags : mapping of str to str
        Names of the options and of the fields that a config file changes, by path: ``--seed``, or ``seed in FILE``.
    """

    model: str
    config: CompressionConfig
    output: Path
    data: JobData = field(default_factory=JobData)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    options: RunOptions = field(default_factory=RunOptions)
    limits: JobLimits = field(default_factory=JobLimits)
    flags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = replace(self.config, task=self.config.task or task_of_pretrained(self.model, self.loading))
        self.plan: TrainingPlan | None = None
        self._memory: int | None = None
        self._loaded: tuple[Any, Any] = (None, None)
        self._data: Any = None
        self._test_texts: list[str] | None = None

    @property
    def task(self) -> Task:
        """The task of the model."""
        assert self.config.task is not None
        return self.config.task

    def check(self, *, dry_run: bool = False) -> None:
        """Raise if settings contradict each other or have no effect. Nothing is loaded."""
        config, data, special = self.config, self.data, self.data.sources.special
        check_output_folder(self.output, self.options.overwrite)
        if self.limits.seconds is not None:
            self._refuse_planned()
        if dry_run and data.sources.generated:
            raise StreamlineError(
                f"{special} was given for an estimate, which generates no text. Expected sources that exist. Leave it "
                "out; compress without --dry-run generates the text."
            )
        if data.pack and (data.test or special):
            raise StreamlineError(
                f"--pack divides one text into all parts and does not go with {'--test' if data.test else special}. "
                "Expected one of the two. Leave one of them out."
            )
        if not self.task.is_causal_lm:
            for_text = {"--pack": data.pack, "--memory": self.limits.memory, "--budget": self.limits.seconds}
            if special or any(for_text.values()):
                option = special or next(name for name, value in for_text.items() if value)
                raise StreamlineError(
                    f"{option} is for models that generate text, and {self.model} is for {self.task}. Expected a "
                    "causal language model. Leave it out."
                )
        if not contains_image_texts(data.sources.names):
            refuse_unused_sizes(self.task, self.flags)
        if config.distillation is not None:
            config.distillation.objective.require_task(self.task)
        self._repeat_only_text()
        if self.limits.seconds is not None:
            check_plannable(self.config)

    def _repeat_only_text(self) -> None:
        """Repeat no passages if the config repeats them by default and the data are not sequences of text."""
        data = self.config.data
        has_images = contains_image_texts(self.data.sources.names)
        is_text = self.task.is_causal_lm and not self.data.pack and not has_images
        if is_text or not data.repeated_context or "data.repeated_context" in self.flags:
            return
        other = f"the inputs of a model for {self.task}" if not self.task.is_causal_lm else "images with texts"
        where = "packed rows" if self.data.pack else other
        logger.info(f"repeated   nothing, in {where}, although the preset repeats passages")
        self.config = replace(self.config, data=replace(data, repeated_context=0.0))

    def _refuse_planned(self) -> None:
        """Raise if an option was given that a time budget sets or does not support."""
        planned = [
            flag
            for path, flag in self.flags.items()
            if path in (PLANNED if flag.startswith("--") else REPLACED)
            or (flag.startswith("--") and path.startswith("distillation."))
        ]
        unsupported = {
            "--resume": self.options.resume,
            "--pack": self.data.pack,
            "--profile": self.options.profile,
            "--memory": self.limits.memory,
            self.data.sources.special: self.data.sources.special,
        }
        if refused := [*planned, *(name for name, value in unsupported.items() if value)]:
            raise StreamlineError(
                f"--budget does not go with {' and '.join(refused)}: it plans a training run on text that exists, from "
                "the beginning. Expected a recipe by --preset or --config. Leave it out, or give --calibration-tokens "
                "instead of --budget."
            )

    @cached_property
    def _source_text(self) -> SourceText:
        return SourceText(self.data.sources, split_sizes(self.config), self.data.pack, list(self.data.test) or None)

    def prepare(self, work: DistributedStep | None = None) -> None:
        """Load the model and the text, and plan within the budget; a model that does not fit is not loaded.

        With a budget, this sets `plan` and replaces `config` by that of the plan.
        """
        work = work or DistributedStep("prepare", Processes())
        self._memory = work.broadcast_object(lambda: self._memory_for_blocks(processes_here(work.processes)))
        if self._memory is None:
            self.load(work)
            if self.limits.seconds is not None:
                self.plan = self._planned()
                self.config = self.plan.config

    def _memory_for_blocks(self, processes: int) -> int | None:
        """Return the bytes in which each process compresses the model block by block; None if it is loaded whole."""
        if not self.task.is_causal_lm or self.limits.seconds is not None:
            return None
        loading = self.loading
        in_memory_only = {
            "generated text": bool(self.data.sources.generated),
            "resuming a training run": self.options.resume,
            "a given profile": self.options.profile is not None,
            f"the device {loading.device}": loading.device not in ("auto", "cpu"),
            "a device map": loading.device_map is not None,
            "quantization": loading.load_in is not None,
            "running the code of a checkpoint": loading.trust_remote_code,
        }
        reasons = [
            *unsupported_fields(self.config).values(),
            *(name for name, holds in in_memory_only.items() if holds),
        ]
        memory = blockwise_memory(self.model, self.limits.memory, reasons, loading.torch_dtype(), processes)
        if memory is not None and (flag := self.flags.get("hardware.state_memory")):
            raise StreamlineError(
                f"{flag} has no effect on a model that is compressed block by block, whose states take the rest of the "
                "memory limit. Expected --memory. Leave it out."
            )
        return memory

    def load(self, work: DistributedStep | None = None) -> tuple[Any, Any, Any]:
        """Load the model, its tokenizer or processor, and the data for `compress`."""
        self._repeat_only_text()
        config = self.config
        model, processor, is_text = load_for_data(self.model, self.task, self.data, self.loading, self.flags)
        if config.rounds > 1:
            by_round = blocks_by_round(len(find_stack(model, config.stack)), config)
            logger.info(f"rounds     {config.rounds}, of {', '.join(map(str, by_round))} blocks")
        if is_text:
            work = work or DistributedStep("load", Processes())
            self._source_text.generate(model, processor, self.output.parent, work)
            self._data, self._test_texts = self._source_text.divided(processor)
        else:
            self._data = self.data.task_batches(model, processor, self.task, config)
        self._loaded = model, processor
        return model, processor, self._data

    def _planned(self) -> TrainingPlan:
        assert self.limits.seconds is not None
        data, (model, tokenizer) = self.config.data, self._loaded
        stated = self.limits.stated.union(self.flags)
        return plan_training(
            model,
            self._source_text.documents["text"],
            self.limits.seconds,
            self.config if "hardware.batch_size" in stated else self.config.updated({"hardware.batch_size": 1}),
            tokenizer=tokenizer,
            sizes={p: getattr(data, f"{p}_tokens") for p in ("validation", "test") if f"data.{p}_tokens" in stated},
            test_texts=self._source_text.test_documents,
            output=self.output,
        )

    def estimate(self) -> CostEstimate | BlockwiseEstimate | None:
        """Estimate the time and memory on this machine; return None with a budget, whose plan has them."""
        if self._memory is not None:
            return estimate_in_blocks(self.model, self.config, self.output, self._memory, self.loading.torch_dtype())
        if self.plan is None:
            profiled, search = self.options.profile is not None, self.config.search
            estimate = estimate_cost(
                *self._loaded,
                self._data,
                self.config,
                profiled=profiled,
                test_texts=self._test_texts,
                output=self.output,
            )
            if search.runs_model or search.resolved_criterion.needs == "model":
                name = search.resolved_criterion.name
                logger.info(f"search     {search.kind} by {name} runs the model, which is not estimated")
            return estimate
        return None

    def run(self) -> CompressionResult:
        """Compress the model, and save it."""
        if self._memory is not None:
            text, overwrite, dtype = self._source_text.divided, self.options.overwrite, self.loading.torch_dtype()
            limits: dict[str, Any] = {"overwrite": overwrite, "dtype": dtype}
            return compress_in_blocks(self.model, text, self.output, self._memory, self.config, **limits)
        model, tokenizer = self._loaded
        options = replace(self.options, test_texts=self._test_texts)
        return compress(model, self._data, self.config, tokenizer=tokenizer, output=self.output, options=options)

    def time_taken(self, result: CompressionResult) -> str:
        """Return a line with the time that was taken and its share of the budget; empty without a budget."""
        if self.plan is None:
            return ""
        taken = sum(result.seconds.values()) + self.plan.estimate.stages[0].seconds
        return f"taken      {taken / 60:.1f} min, {taken / self.plan.budget:.0%} of the budget"

    def interruption(self, result: CompressionResult) -> str:
        """Return a line on how to resume an interrupted training run; empty if it was not interrupted."""
        training = result.training
        if training is None or not training.interrupted:
            return ""
        there = training_file(self.output).is_file()
        how = "Resume with the same command and --resume --overwrite." if there else "There is nothing to resume from."
        return f"Interrupted: {self.output} contains the best weights so far, those of step {training.best_step}. {how}"


def load_for_data(
    name: str, task: Task, data: JobData, loading: LoadingConfig, flags: Mapping[str, str]
) -> tuple[Any, Any, bool]:
    """Return a model, its tokenizer or processor for the data, and whether it is calibrated on documents.

    Raise if options set sizes that the model does not use, or only some of the sources have images.
    """
    model, processor = load_quietly(name, task, loading)
    is_text = takes_documents(model, task, data.sources)
    if is_text or not task.is_causal_lm:
        refuse_unused_sizes(task, flags, model)
    if not is_text and all(accepted_modalities(model)):
        processor = load_processor(name, loading)
    return model, processor, is_text


def takes_documents(model: Any, task: Task, sources: TextSources) -> bool:
    """Whether a model is calibrated on documents, and not on images with texts, images, pairs or examples.

    Raise if the model takes images with texts, and only some of the sources have images.
    """
    if not (task.is_causal_lm and all(accepted_modalities(model))):
        return task.is_causal_lm
    with_images = [str(source) for source in sources.names if contains_image_texts(source)]
    others = [str(source) for source in sources.names if str(source) not in with_images]
    if with_images and others:
        raise StreamlineError(
            f"{', '.join(with_images)} has images with texts, and {', '.join(others)} has text without images. "
            f"Expected sources of one of the two for a {type(model).__name__}. Leave the others out."
        )
    return not with_images


def suite_for_model(
    name: str | Path, model: Any, processor: Any, suite: Suite, task: Task, loading: LoadingConfig | None = None
) -> Suite:
    """Return a suite with batches instead of text sources, for models that are not given documents.

    Parameters
    ----------
    name : str or Path
        The folder or the hub name of the model. Its processor is loaded for images with texts.
    model : torch.nn.Module
    processor : transformers.PreTrainedTokenizerBase or image processor
        The processor that `load_pretrained` returned with the model.
    suite : Suite
        Its `text` has the sources: files of images, of images with texts, of pairs, or of text. Its `text_tokens`,
        `items` and `window` determine the sizes of the batches.
    task : Task
        The task of the model.
    loading : LoadingConfig, optional
        The config that the model was loaded with. Its `revision` and `trust_remote_code` are used for the processor.

    Returns
    -------
    Suite
        `suite` itself if the model is a causal language model that is evaluated on documents.

    Raises
    ------
    StreamlineError
        If a source cannot be read as inputs of the model, or there is no processor for images with texts.
    """
    if isinstance(suite.text, Mapping):  # documents
        return suite
    sources = [str(source) for source in suite.text]
    if takes_documents(model, task, TextSources(tuple(sources))):
        return suite
    if all(accepted_modalities(model)):
        processor = load_processor(name, loading)
    amounts = PartSizes(
        {"test": suite.text_tokens or EVALUATION_TOKENS},
        {"test": suite.items or EXAMPLES["test"]},
        suite.window or 512,
        suite.batch_size,
        suite.seed,
    )
    batches = {
        source: task_batches(model, processor, task, None if source == "pydoc" else [source], amounts)["test"]
        for source in sources
    }
    return replace(suite, text=(), batches=batches, task=task)


def refuse_unused_sizes(task: Task, flags: Mapping[str, str], model: Any = None) -> None:
    """Raise if options set sizes that a model for a task does not use.

    An embedding model is checked only if it is given as `model`, since its task does not determine its inputs.
    """
    images = task.name == "image-classification"
    text = task.is_causal_lm or task.name in ("masked-lm", "text-classification")
    if model is not None and task.name == "embedding":
        text, images = accepted_modalities(model)
    if text == images and task.name != "seq2seq":  # an embedding model that is not loaded, or takes both
        return
    of = f"a model for {task}" + f" of {'images' if images else 'text'}" * (task.name == "embedding")
    for part in PARTS:
        paths = (f"examples.{part}", f"data.{part}_tokens")
        options = (f"--{part}-examples", f"--{part}-tokens")
        unused, used = (paths[0], options[1]) if text else (paths[1], options[0])
        if unused in flags:
            raise StreamlineError(f"{flags[unused]} has no effect on {of}. Expected {used}. Give {used} instead.")
    if images and "data.sequence_length" in flags:
        raise StreamlineError(
            f"{flags['data.sequence_length']} has no effect on a model for images. Expected none. Leave it out."
        )
