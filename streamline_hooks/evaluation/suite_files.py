"""A suite from files: domains of text, tasks of questions and problems, and prompts from the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from streamline_hooks.arguments import checked
from streamline_hooks.calibration import read_documents
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.last_words import read_last_words
from streamline_hooks.evaluation.probes import STOP, probes
from streamline_hooks.evaluation.problems import read_problems
from streamline_hooks.evaluation.questions import questions_from
from streamline_hooks.evaluation.rows import read_rows
from streamline_hooks.evaluation.suite import ChoiceTask, ProblemTask, Suite

T = TypeVar("T")
_PROMPT_WORDS = 24
_SUFFIX = re.compile(r"(\.(jsonl|json|txt))?(\.(gz|zip))?$")
_PROBE_TOKENS = 32
_AFTER_PROBLEM = ("Question:", "\n\n\n")


@checked(probe_count=0, prompts=0, shots=0, samples=1, temperature=0, items=1, text_tokens=1)
def suite_from_files(
    tokenizer: Any,
    *,
    text: Sequence[str | Path] = (),
    questions: Sequence[str | Path] = (),
    last_words: Sequence[str | Path] = (),
    problems: Sequence[str | Path] = (),
    probe_count: int = 0,
    prompts: int | Sequence[str] = 8,
    normalised: Iterable[str] = (),
    examples: str | Path | None = None,
    shots: int = 0,
    problem_tokens: int = 256,
    samples: int = 1,
    temperature: float = 0.0,
    items: int | None = None,
    text_tokens: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Suite:
    """Make a suite of what is in files; a task or domain is called as its file.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    text : sequence of str or Path
        Each one domain, see `read_documents`.
    questions : sequence of str or Path
        See `read_rows` for the files, and `questions_from` for what is in them.
    last_words, problems : sequence of str or Path
        See `read_last_words` and `read_problems`.
    probe_count : int
        Generated problems of each sort, see `probes`; 0 for none.
    prompts : int or sequence of str
        Texts to be written on, or how many beginnings of documents to take for it, of all domains in turn.
    normalised : iterable of str
        Tasks of questions that are counted by likelihood a character.
    examples : str or Path, optional
        Rows to show before each question of a task with subjects (MMLU).
    shots : int
        How many of these; of problems, how many of a file's own first ones. Questions without `examples` have none.
    problem_tokens : int
        To be written after each problem at most.
    samples : int
        Tries a problem of a file; more than one, for pass@k, needs a temperature.
    temperature : float
        Of these tries; at 0 the likeliest token is taken each time.
    items : int, optional
        Questions, texts and problems a task at most, a seeded subset; all by default.
    text_tokens : int, optional
        Tokens a domain at most, roughly: whole documents in a seeded order, the last one cut; all by default.
    seed : int
        Of the subsets.
    **settings
        Of the `Suite`: `window`, `stride`, `new_tokens`, `timed`, ...

    Returns
    -------
    Suite

    Raises
    ------
    StreamlineError
        If a file cannot be read, two have one name, `normalised` names no task, or a setting is for what is not asked.
    """
    if samples > 1 and not temperature:
        raise StreamlineError(f"{samples} samples at temperature 0 are one text {samples} times; give a temperature.")
    if min(1 if items is None else items, 1 if text_tokens is None else text_tokens) < 1:
        raise StreamlineError(f"Got items={items}, text_tokens={text_tokens}; expected 1 or more, or None for all.")
    for given, said, needed, for_what in (
        (shots, f"shots={shots}", examples or problems, "examples to show, or for problems"),
        (examples, f"examples={str(examples)!r}", questions, "questions"),
        (samples > 1 or temperature, f"samples={samples}, temperature={temperature:g}", problems, "problems of a file"),
    ):
        if given and not needed:
            raise StreamlineError(f"{said} is for {for_what}, and there are none. Give them, or leave it out.")
    domains = {name: read_documents(path) for name, path in by_name(text).items()}
    domains = {name: _some(tokenizer, documents, text_tokens, f"{seed} {name}") for name, documents in domains.items()}
    choices, counted = {}, set(normalised)
    for name, path in by_name(questions).items():
        rows = sample(read_rows(path), items, f"{seed} {name}")
        shown = questions_from(rows, examples=examples, shots=0 if examples is None else shots)
        choices[name] = ChoiceTask(tuple(shown), name in counted)
    unknown = sorted(counted - set(choices))
    if unknown:
        raise StreamlineError(
            f"No task of questions is called {', '.join(unknown)}; there is {', '.join(choices) or 'none'}."
        )
    asked = {
        name: ProblemTask(
            tuple(sample(read_problems(path, shots=shots), items, f"{seed} {name}")),
            problem_tokens,
            samples,
            temperature,
            _AFTER_PROBLEM,
        )
        for name, path in by_name(problems).items()
    }
    if probe_count:
        made = probes(probe_count, seed=seed)
        if taken := sorted(asked.keys() & made.keys()):
            raise StreamlineError(f"A file of problems is called {', '.join(taken)}, as probes are; rename it.")
        asked |= {name: ProblemTask(tuple(several), _PROBE_TOKENS, stop=STOP) for name, several in made.items()}
    return Suite(
        tokenizer,
        text=domains,
        choices=choices,
        last_words={
            name: sample(read_last_words(path), items, f"{seed} {name}") for name, path in by_name(last_words).items()
        },
        problems=asked,
        prompts=_beginnings(domains, prompts) if isinstance(prompts, int) else list(prompts),
        **settings,
    )


def sample(given: Sequence[T], items: int | None, seed: str) -> list[T]:
    """A seeded subset in the order of the whole; of the same file, a smaller one is not a part of a larger."""
    if items is None or items >= len(given):
        return list(given)
    return [given[k] for k in sorted(Random(seed).sample(range(len(given)), items))]


def by_name(sources: Sequence[str | Path]) -> dict[str, str | Path]:
    """Each source by the name of its file, or of its data set."""
    found: dict[str, str | Path] = {}
    for source in sources:
        text = str(source)
        if text.startswith("hub:"):  # the data set, and its configuration where there is one
            name = "-".join([text.split(":")[1].split("/")[-1], *text.split(":")[2:-1]])
        else:
            name = _SUFFIX.sub("", Path(text).name)
        if name in found:
            raise StreamlineError(f"{found[name]} and {source} would both be called {name}; rename one of them.")
        found[name] = source
    return found


def _some(tokenizer: Any, documents: Sequence[str], tokens: int | None, seed: str) -> list[str]:
    """Documents of about so many tokens together."""
    if tokens is None:
        return list(documents)
    chosen, left = [], tokens
    for k in Random(seed).sample(range(len(documents)), len(documents)):
        count = len(tokenizer(documents[k], add_special_tokens=False)["input_ids"])
        chosen.append((k, documents[k] if count <= left else documents[k][: len(documents[k]) * left // count]))
        left -= count
        if left <= 0:
            break
    return [document for _, document in sorted(chosen) if document]


def _beginnings(domains: dict[str, list[str]], count: int) -> list[str]:
    """The first words of documents that go on after them, of each domain in turn."""
    long = [[d for d in documents if len(d.split()) > 2 * _PROMPT_WORDS] for documents in domains.values()]
    turns = [documents[k] for k in range(max(map(len, long), default=0)) for documents in long if k < len(documents)]
    return [" ".join(document.split()[:_PROMPT_WORDS]) for document in turns[:count]]
