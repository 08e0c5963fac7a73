"""What a model is evaluated on: text, tasks, problems, prompts and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Literal

from streamline_hooks.calibration import read_documents
from streamline_hooks.core.config import Config
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.probes import STOP, probes
from streamline_hooks.evaluation.problems import Problem, read_problems
from streamline_hooks.evaluation.rows import source_name, subset
from streamline_hooks.evaluation.sliding import window_and_stride
from streamline_hooks.evaluation.tasks import LoadedTask, TaskSettings, load_tasks
from streamline_hooks.evaluation.writing import require_writable

PROMPTS = "prompts"
_PROMPT_WORDS = 24
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Suite(Config):
    r"""What a model is evaluated on. Two models are compared on the same suite.

    Attributes
    ----------
    text : sequence of str, or mapping of str to sequence of str
        Text for perplexity and agreement: sources, each one domain, see `read_documents`; or documents by domain.
    text_tokens : int, optional
        Tokens of a domain at most, roughly: whole documents in a seeded order, the last one cut; all by default.
    tasks : sequence of str or mapping
        Tasks of lm-eval by name, and files, see `run_tasks`.
    metric : str
        See `TaskSettings.metric`.
    shots : int, optional
        Solved examples before each item of a task (by default what the task says) and before each problem of a file,
        whose first ones they are (by default none).
    problems : sequence of str, or mapping of str to sequence of Problem
        Files of problems that are to be solved in writing, see `read_problems`; or problems by task.
    probes : int
        Generated problems of each sort, see `probes`.
    items : int, optional
        Items of each task and problems of each file at most, a seeded subset; all by default.
    problem_tokens, samples, temperature, stop, chat
        How problems are solved, see `write_on`. Generated ones are solved greedily, in one line.
    prompts : int or sequence of str
        Texts to be continued greedily; or how many beginnings of the documents, of all domains in turn.
    new_tokens : int
        Generated after each prompt.
    window, stride, first
        See `sliding_perplexity`.
    add_bos : bool, optional
        Whether the texts of tasks begin with BOS; by default what the tokenizer does.
    timed : tuple of int, optional
        Tokens of a prompt (fewer if a model has fewer positions), tokens after it, and rounds, for `measure_speed`;
        None to skip it.
    batch_size, seed : int

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
    text: Sequence[str] | Mapping[str, Sequence[str]] = ()
    text_tokens: int | None = None
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
        require_writable(self.new_tokens)
        require_writable(self.problem_tokens, self.samples, self.temperature)
        window_and_stride([], self.window, self.stride)
        if self.timed is not None and min(self.timed[0], self.timed[1] + 1, self.timed[2]) < 1:
            raise StreamlineError(
                f"Suite: timed={self.timed}. Expected tokens of a prompt >= 1, tokens after it >= 0, rounds >= 1. Give "
                "timed=None to skip it."
            )
        asked = [self.text, self.tasks, self.problems, self.probes, self.timed]
        if not any(asked) and (isinstance(self.prompts, int) or not self.prompts):
            raise StreamlineError(
                "The suite is empty. Expected text, tasks, problems, probes, prompts or timed. Give one."
            )

    def read(self, tokenizer: Any) -> Content:
        """Read the files and data sets.

        Raises
        ------
        StreamlineError
            If one cannot be read or is empty, or two parts have one name.
        """
        content = Content(_texts(self, tokenizer), self._tasks(), self._problems())
        if isinstance(self.prompts, int):
            content.prompts += _beginnings(content.text, self.prompts)
        else:
            content.prompts += self.prompts
        parts = [*content.text.items(), *content.tasks.items(), *content.problems.items()]
        names = [name for name, _ in parts] + [PROMPTS] * bool(content.prompts)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise StreamlineError(
                f"Two domains or tasks are named {', '.join(twice)}. Expected distinct names. Rename a file."
            )
        sizes = {**content.text, **{name: one for name, (one, _) in content.problems.items()}}
        if empty := [name for name, items in sizes.items() if not items]:
            raise StreamlineError(
                f"There is nothing in {', '.join(empty)}. Expected an item. Give one or leave it out."
            )
        return content

    def _tasks(self) -> dict[str, LoadedTask]:
        settings = TaskSettings(self.items, self.shots, self.metric, self.add_bos, self.batch_size, self.seed)
        return load_tasks(self.tasks, settings) if self.tasks else {}

    def _problems(self) -> dict[str, tuple[list[Problem], dict[str, Any]]]:
        """Return the problems of each task, and how they are solved."""
        given = {"new_tokens": self.problem_tokens, "stop": self.stop}
        given |= {"samples": self.samples, "temperature": self.temperature, "chat": self.chat}
        if isinstance(self.problems, Mapping):
            found = {name: (list(several), given) for name, several in self.problems.items()}
        else:
            files = {name: read_problems(path, shots=self.shots or 0) for name, path in _by_name(self.problems).items()}
            found = {name: (subset(one, self.items, f"{self.seed} {name}"), given) for name, one in files.items()}
        if self.probes:
            for name, several in probes(self.probes, seed=self.seed).items():
                if name in found:
                    raise StreamlineError(f"A file of problems is named {name}, as a sort of probes is. Rename it.")
                found[name] = several, {"new_tokens": _PROBE_TOKENS, "stop": STOP}
        return found


@dataclass
class Content:
    """What is in a suite's files, by name."""

    text: dict[str, list[str]]
    tasks: dict[str, LoadedTask]
    problems: dict[str, tuple[list[Problem], dict[str, Any]]]
    prompts: list[str] = field(default_factory=list)


def _texts(suite: Suite, tokenizer: Any) -> dict[str, list[str]]:
    if isinstance(suite.text, Mapping):
        domains = {name: list(documents) for name, documents in suite.text.items()}
    else:
        domains = {name: list(read_documents(source)) for name, source in _by_name(suite.text).items()}
    if suite.text_tokens is None:
        return domains
    return {
        name: _some(tokenizer, documents, suite.text_tokens, f"{suite.seed} {name}")
        for name, documents in domains.items()
    }


def _by_name(sources: Sequence[str]) -> dict[str, str]:
    """Return each source by the name of its file or data set."""
    found: dict[str, str] = {}
    for source in sources:
        name = source_name(source)
        if name in found:
            raise StreamlineError(
                f"{found[name]} and {source} are both named {name}. Expected distinct names. Rename one."
            )
        found[name] = source
    return found


def _some(tokenizer: Any, documents: Sequence[str], tokens: int, seed: str) -> list[str]:
    """Return documents of about so many tokens together."""
    chosen, left = [], tokens
    for k in Random(seed).sample(range(len(documents)), len(documents)):
        count = len(tokenizer(documents[k], add_special_tokens=False)["input_ids"])
        chosen.append((k, documents[k] if count <= left else documents[k][: len(documents[k]) * left // count]))
        left -= count
        if left <= 0:
            break
    return [document for _, document in sorted(chosen) if document]


def _beginnings(domains: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """Return the first words of documents that are longer, of each domain in turn."""
    long = [[d for d in documents if len(d.split()) > 2 * _PROMPT_WORDS] for documents in domains.values()]
    turns = [documents[k] for k in range(max(map(len, long), default=0)) for documents in long if k < len(documents)]
    return [" ".join(document.split()[:_PROMPT_WORDS]) for document in turns[:count]]
