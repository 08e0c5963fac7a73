"""`Suite`: the data and settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Literal

from streamline_hooks.core import Config, StreamlineError
from streamline_hooks.data import TextDataset, read_documents, text_column
from streamline_hooks.evaluation.lm_eval_tasks import LoadedTask, TaskSettings, load_tasks
from streamline_hooks.evaluation.samples import TextGenerationConfig
from streamline_hooks.evaluation.sliding_perplexity import window_and_stride
from streamline_hooks.evaluation.synthetic_tasks import ANSWER_STOP, Problem, read_problems, synthetic_problems
from streamline_hooks.evaluation.task_files import random_subset, source_name
from streamline_hooks.modeling import Task

PROMPTS = "prompts"
_PROMPT_WORDS = 24
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Suite(Config):
    r"""Data and settings of an evaluation. Compare two models on the same suite.

    Attributes
    ----------
    text : sequence of str, or mapping of str to sequence of str or datasets.Dataset
        Text for perplexity and agreement: sources (see `read_documents`), each of which is a domain; or documents by
        domain, as strings or as a data set with a column ``text``.
    text_tokens : int, optional
        Approximate maximum number of tokens per domain, a random subset of documents. By default all.
    batches : dict of str to sequence of batches
        Batches for the model's task by name, from `task_batches`, with labels as for `score_batches`. They replace text
        for encoders, encoder-decoders, vision and image-text models.
    task : Task, optional
        The model's task (see `Task.of`).
    tasks : sequence of str or mapping
        Names of lm-eval tasks, or files (see `run_tasks`).
    metric : str
        Metric to compare models by, for tasks that have it. By default the first metric of each task.
    shots : int, optional
        Number of few-shot examples. By default the task's number for lm-eval tasks, and 0 for problem files, whose
        first problems are the examples.
    problems : sequence of str, or mapping of str to sequence of Problem
        Files of problems to solve by generation (see `read_problems`), or problems by name.
    probes : int
        Number of synthetic problems of each sort (see `synthetic_problems`).
    items : int, optional
        Maximum number of items per task and of problems per file, a random subset. By default all.
    problem_tokens : int
        Maximum number of generated tokens per problem of a file.
    samples : int
        Number of attempts per problem of a file, for pass@k. More than one requires a `temperature` above 0.
    temperature : float
        Sampling temperature for problems of files; 0 is greedy. Synthetic problems are always solved greedily.
    stop : sequence of str
        Strings before which an answer to a problem of a file ends.
    chat : bool
        Whether to apply the chat template to problems of files.
    prompts : int or sequence of str
        Prompts to continue greedily, or the number of prompts to take from the beginnings of the documents.
    new_tokens : int
        Number of tokens generated per prompt.
    window : int, optional
        Number of input tokens for perplexity. By default 1,024, or the model's positions if fewer.
    stride : int, optional
        Number of tokens between two windows. By default half a window.
    first : {"bos", "eos"}, optional
        First token of a document (see `sliding_perplexity`).
    add_bos : bool, optional
        Whether texts of lm-eval tasks begin with BOS. By default the tokenizer decides.
    timed : tuple of int, optional
        Prompt tokens (limited by the model's positions), new tokens and rounds for `measure_speed`; None to skip it.
        Only causal language models are timed.
    batch_size : int
        Number of texts per forward pass.
    seed : int
        Seed of subsets and synthetic problems.

    Raises
    ------
    StreamlineError
        If a value is invalid or the suite is empty.

    Examples
    --------
    >>> Suite(prompts=["Once"], timed=None).prompts
    ('Once',)
    """

    bounds: ClassVar[Mapping[str, float]] = {
        "text_tokens": 1, "shots": 0, "probes": 0, "items": 1, "prompts": 0, "window": 1, "stride": 1,
        "batch_size": 1, "seed": 0,
    }  # fmt: skip
    text: Sequence[str] | Mapping[str, Sequence[str] | TextDataset] = ()
    text_tokens: int | None = None
    batches: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    task: Task | None = None
    tasks: Sequence[str | Mapping[str, Any]] = ()
    metric: str = ""
    shots: int | None = None
    problems: Sequence[str] | Mapping[str, Sequence[Problem]] = ()
    probes: int = 0
    items: int | None = None
    problem_tokens: int = 256
    samples: int = 1
    temperature: float = 0.0
    stop: Sequence[str] = ("Question:", "\n\n\n")
    chat: bool = False
    prompts: int | Sequence[str] = 0
    new_tokens: int = 64
    window: int | None = None
    stride: int | None = None
    first: Literal["bos", "eos"] | None = "bos"
    add_bos: bool | None = None
    timed: tuple[int, int, int] | None = (256, 16, 5)
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        TextGenerationConfig(self.new_tokens)
        TextGenerationConfig(self.problem_tokens, self.samples, self.temperature)
        window_and_stride([], self.window, self.stride)
        if self.timed is not None and min(self.timed[0], self.timed[1] + 1, self.timed[2]) < 1:
            raise StreamlineError(
                f"Suite: timed={self.timed} is out of range. Expected prompt tokens >= 1, new tokens >= 0, rounds >= "
                "1. Set timed=None to skip timing."
            )
        parts = [self.text, self.batches, self.tasks, self.problems, self.probes, self.timed]
        if not any(parts) and (isinstance(self.prompts, int) or not self.prompts):
            raise StreamlineError(
                "The suite is empty. Expected text, batches, tasks, problems, probes, prompts or timed. Set at least "
                "one."
            )

    def read(self, tokenizer: Any) -> SuiteContent:
        """Read the files and data sets.

        Raises StreamlineError if a source cannot be read or is empty, or two parts have the same name.
        """
        settings = TaskSettings(self.items, self.shots, self.metric, self.add_bos, self.batch_size, self.seed)
        text, tasks = self._texts(tokenizer), load_tasks(self.tasks, settings) if self.tasks else {}
        problems = self._problems()
        prompts = (
            _prompts_from_documents([d for _, d in text], self.prompts)
            if isinstance(self.prompts, int)
            else self.prompts
        )
        sizes = [(name, len(items)) for name, items in text] + [(name, len(items)) for name, items, _ in problems]
        sizes += [(name, len(batches)) for name, batches in self.batches.items()]
        names = [*(name for name, _ in sizes), *tasks, *[PROMPTS] * bool(prompts)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise StreamlineError(
                f"Two parts of the suite are named {', '.join(twice)}. Expected distinct names. Rename a file."
            )
        if empty := [name for name, size in sizes if not size]:
            raise StreamlineError(
                f"The parts {', '.join(empty)} of the suite are empty. Expected at least one item in each. Add items, "
                "or remove the part."
            )
        by_name = {name: (items, options) for name, items, options in problems}
        return SuiteContent(dict(text), tasks, by_name, list(prompts), dict(self.batches))

    def _texts(self, tokenizer: Any) -> list[tuple[str, list[str]]]:
        """Return the name and documents of each domain."""
        if isinstance(self.text, Mapping):
            domains = [
                (name, text_column(documents) if isinstance(documents, TextDataset) else list(documents))
                for name, documents in self.text.items()
            ]
        else:
            domains = [(source_name(source), list(read_documents(source))) for source in self.text]
        limit, seed = self.text_tokens, self.seed
        if limit is None:
            return domains
        return [(name, _sample_documents(tokenizer, documents, limit, f"{seed} {name}")) for name, documents in domains]

    def _problems(self) -> list[tuple[str, list[Problem], dict[str, Any]]]:
        """Return name, problems and generation settings of each set of problems."""
        options = {"new_tokens": self.problem_tokens, "stop": self.stop}
        options |= {"samples": self.samples, "temperature": self.temperature, "chat": self.chat}
        if isinstance(self.problems, Mapping):
            problem_sets = [(name, list(problems), options) for name, problems in self.problems.items()]
        else:
            files = [(source_name(path), read_problems(path, shots=self.shots or 0)) for path in self.problems]
            problem_sets = [
                (name, random_subset(problems, self.items, f"{self.seed} {name}"), options) for name, problems in files
            ]
        synthetic = synthetic_problems(self.probes, seed=self.seed) if self.probes else {}
        probe_options = {"new_tokens": _PROBE_TOKENS, "stop": ANSWER_STOP}
        return problem_sets + [(name, problems, dict(probe_options)) for name, problems in synthetic.items()]


@dataclass
class SuiteContent:
    """Content of the files of a suite by name, and the prompts."""

    text: dict[str, list[str]]
    tasks: dict[str, LoadedTask]
    problems: dict[str, tuple[list[Problem], dict[str, Any]]]
    prompts: list[str]
    batches: dict[str, Sequence[Any]]


def _sample_documents(tokenizer: Any, documents: Sequence[str], tokens: int, seed: str) -> list[str]:
    """Return a random subset of documents with about `tokens` tokens in total; the last document is truncated."""
    chosen, left = [], tokens
    for k in Random(seed).sample(range(len(documents)), len(documents)):
        count = len(tokenizer(documents[k], add_special_tokens=False)["input_ids"])
        chosen.append((k, documents[k] if count <= left else documents[k][: len(documents[k]) * left // count]))
        left -= count
        if left <= 0:
            break
    return [document for _, document in sorted(chosen) if document]


def _prompts_from_documents(domains: Sequence[Sequence[str]], count: int) -> list[str]:
    """Return the first words of long documents as prompts, cycling through the domains."""
    long = [[d for d in documents if len(d.split()) > 2 * _PROMPT_WORDS] for documents in domains]
    turns = [documents[k] for k in range(max(map(len, long), default=0)) for documents in long if k < len(documents)]
    return [" ".join(document.split()[:_PROMPT_WORDS]) for document in turns[:count]]
