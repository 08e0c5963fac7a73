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
from streamline_hooks.statistics import Profile

logger = get_logger(__name__)

EXAMPLES = {"calibration": 256, "validation": 64, "test": 256}
"""Default numbers of images, or pairs of texts, in each part."""
EVALUATION_TOKENS = 20_000
"""Default number of tokens on which an encoder is evaluated."""
PLANNED = (
    "repair", "healing", "rounds", "search", "search.criterion", "data.calibration_tokens", "data.fitting_tokens",
    "data.repeated_context", "hardware.autocast",
)  # fmt: skip
"""The fields that a time budget sets, in addition to those of the distillation."""


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
    sources : TextSources
        Sources of the calibration text, or files of images or pairs.
    loading : LoadingConfig
    options : RunOptions
        Its `profile` and `test_texts` are replaced by those of `profile_file` and `test`.
    profile_file : Path, optional
        File of a saved profile. By default the profile is measured.
    test : sequence of str
        Sources of the test part. By default it is a part of `sources`.
    pack : bool
        Whether whole documents are packed into the sequences.
    examples : mapping of str to int
        Number of images or pairs in each part, by its name. By default see `EXAMPLES`.
    memory : int, optional
        Bytes of memory of this machine that may be used. By default the memory that is free.
    budget : float, optional
        Seconds for the whole compression, see `plan_training`.
    flags : mapping of str to str
        The options of the command line that were set, by the path of their field, for error messages.
    """

    model: str
    config: CompressionConfig
    output: Path
    sources: TextSources = field(default_factory=TextSources)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    options: RunOptions = field(default_factory=RunOptions)
    profile_file: Path | None = None
    test: Sequence[str] = ()
    pack: bool = False
    examples: Mapping[str, int] = field(default_factory=dict)
    memory: int | None = None
    budget: float | None = None
    flags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = replace(self.config, task=self.config.task or task_of_pretrained(self.model, self.loading))
        self.plan: TrainingPlan | None = None
        self._memory: int | None = None
        self._profile: Profile | None = None
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
        config, special = self.config, self.sources.special
        check_output_folder(self.output, self.options.overwrite)
        if self.budget is not None:
            self._refuse_planned()
        if dry_run and self.sources.generated:
            raise StreamlineError(
                f"{special} was given for an estimate, which generates no text. Expected sources that exist. Leave it "
                "out; compress without --dry-run generates the text."
            )
        if self.pack and (self.test or special):
            raise StreamlineError(
                f"--pack divides one text into all parts and does not go with {'--test' if self.test else special}. "
                "Expected one of the two. Leave one of them out."
            )
        if not self.task.is_causal_lm:
            for_text = {"--pack": self.pack, "--memory": self.memory, "--budget": self.budget}
            if special or any(for_text.values()):
                option = special or next(name for name, value in for_text.items() if value)
                raise StreamlineError(
                    f"{option} is for models that generate text, and {self.model} is for {self.task}. Expected a "
                    "causal language model. Leave it out."
                )
        if not contains_image_texts(self.sources.names):
            refuse_unused_sizes(self.task, [*self.flags.values()])
        if config.distillation is not None:
            config.distillation.objective.require_task(self.task)
        if "data.repeated_context" not in self.flags and config.data.repeated_context and not self._repeats:
            where = "packed rows" if self.pack else f"the inputs of a model for {self.task}"
            logger.info(f"repeated   nothing, in {where}, although the preset repeats passages")
            self.config = replace(config, data=replace(config.data, repeated_context=0.0))
        if self.budget is not None:
            check_plannable(self.config)

    @property
    def _repeats(self) -> bool:
        """Whether passages can be repeated in the text."""
        return self.task.is_causal_lm and not self.pack

    def _refuse_planned(self) -> None:
        """Raise if an option was given that a time budget sets or does not support."""
        planned = [flag for path, flag in self.flags.items() if path in PLANNED or path.startswith("distillation.")]
        unsupported = {
            "--resume": self.options.resume,
            "--pack": self.pack,
            "--profile": self.profile_file,
            "--memory": self.memory,
            self.sources.special: self.sources.special,
        }
        if refused := [*planned, *(name for name, value in unsupported.items() if value)]:
            raise StreamlineError(
                f"--budget does not go with {' and '.join(refused)}: it plans a training run on text that exists, from "
                "the beginning. Expected a recipe by --preset or --config. Leave it out, or give --calibration-tokens "
                "instead of --budget."
            )

    @cached_property
    def _source_text(self) -> SourceText:
        return SourceText(self.sources, split_sizes(self.config), self.pack, list(self.test) or None)

    def prepare(self, work: DistributedStep | None = None) -> None:
        """Load the model and the text, and plan within the budget; a model that does not fit is not loaded.

        With a budget, this sets `plan` and replaces `config` by that of the plan.
        """
        work = work or DistributedStep("prepare", Processes())
        self._profile = None if self.profile_file is None else Profile.load(self.profile_file)
        self._memory = work.broadcast_object(lambda: self._memory_for_blocks(processes_here(work.processes)))
        if self._memory is None:
            self.load(work)
            if self.budget is not None:
                self.plan = self._planned()
                self.config = self.plan.config

    def _memory_for_blocks(self, processes: int) -> int | None:
        """Return the bytes in which each process compresses the model block by block; None if it is loaded whole."""
        if not self.task.is_causal_lm or self.budget is not None:
            return None
        loading = self.loading
        in_memory_only = {
            "generated text": bool(self.sources.generated),
            "resuming a training run": self.options.resume,
            "a given profile": self.profile_file is not None,
            f"the device {loading.device}": loading.device not in ("auto", "cpu"),
            "a device map": loading.device_map is not None,
            "quantization": loading.load_in is not None,
            "running the code of a checkpoint": loading.trust_remote_code,
        }
        reasons = [
            *unsupported_fields(self.config).values(),
            *(name for name, holds in in_memory_only.items() if holds),
        ]
        return blockwise_memory(self.model, self.memory, reasons, loading.torch_dtype(), processes)

    def load(self, work: DistributedStep | None = None) -> tuple[Any, Any, Any]:
        """Load the model, its tokenizer or processor, and the data for `compress`."""
        config, sizes = self.config, split_sizes(self.config)
        model, processor = load_quietly(self.model, self.task, self.loading)
        is_text = takes_documents(model, self.task, self.sources)
        if is_text or not self.task.is_causal_lm:
            refuse_unused_sizes(self.task, [*self.flags.values()], model)
        if config.rounds > 1:
            by_round = blocks_by_round(len(find_stack(model, config.stack)), config)
            logger.info(f"rounds     {config.rounds}, of {', '.join(map(str, by_round))} blocks")
        if is_text:
            work = work or DistributedStep("load", Processes())
            self._source_text.generate(model, processor, self.output.parent, work)
            self._data, self._test_texts = self._source_text.divided(processor)
        else:
            processor = load_processor(self.model, self.loading) if all(accepted_modalities(model)) else processor
            tokens = {part: sizes[f"{part}_tokens"] for part in PARTS}
            examples = {part: self.examples.get(part, EXAMPLES[part]) for part in PARTS}
            batch = config.data.sequence_length, config.hardware.batch_size, config.seed
            names = None if self.sources == TextSources() else list(self.sources.names)
            amounts = PartSizes(tokens, examples, *batch)
            self._data = task_batches(model, processor, self.task, names, amounts, list(self.test) or None)
        self._loaded = model, processor
        return model, processor, self._data

    def _planned(self) -> TrainingPlan:
        assert self.budget is not None
        data, (model, tokenizer) = self.config.data, self._loaded
        return plan_training(
            model,
            self._source_text.documents["text"],
            self.budget,
            self.config if "hardware.batch_size" in self.flags else self.config.updated({"hardware.batch_size": 1}),
            tokenizer=tokenizer,
            sizes={p: getattr(data, f"{p}_tokens") for p in ("validation", "test") if f"data.{p}_tokens" in self.flags},
            test_texts=self._source_text.test_documents,
            output=self.output,
        )

    def estimate(self) -> CostEstimate | BlockwiseEstimate | None:
        """Estimate the time and memory on this machine; return None with a budget, whose plan has them."""
        if self._memory is not None:
            return estimate_in_blocks(self.model, self.config, self.output, self._memory, self.loading.torch_dtype())
        if self.plan is None:
            profiled, search = self.profile_file is not None, self.config.search
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
        options = replace(self.options, test_texts=self._test_texts, profile=self._profile)
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


def refuse_unused_sizes(task: Task, flags: Sequence[str], model: Any = None) -> None:
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
        unused, used = (f"--{part}-{unit}" for unit in (("examples", "tokens") if text else ("tokens", "examples")))
        if unused in flags:
            raise StreamlineError(f"{unused} has no effect on {of}. Expected {used}. Give {used} instead.")
    if images and "--sequence-length" in flags:
        raise StreamlineError("--sequence-length has no effect on a model for images. Expected none. Leave it out.")
