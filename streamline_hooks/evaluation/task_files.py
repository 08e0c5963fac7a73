r"""Read JSONL files, and create lm-eval tasks from files and data sets in the layouts of known benchmarks.

The fields of the rows determine the layout. `ROW_LAYOUTS` has the templates of lm-eval's task for each layout.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import fsspec

from streamline_hooks.core import StreamlineError

_METRIC_SETTINGS = {"perplexity": {"aggregation": "perplexity", "higher_is_better": False}}
_SUFFIX = re.compile(r"(\.(jsonl?|txt))?(\.(gz|bz2|xz|zst|zip))?$")
_HIDDEN = (None, "", -1, "-1")
_LETTERS = "'ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
_LETTERED = "{%% for text in %s %%}{{%s[loop.index0]}}. {{text}}\n{%% endfor %%}Answer:"
_CLEAN = (  # removes the markup of WikiHow
    "map('trim')|map('replace', ' [title]', '. ')|map('regex_replace', '\\\\[.*?\\\\]', '')|map('replace', '  ', ' ')"
)
_ABOUT = "The following are multiple choice questions (with answers) about {{subject|replace('_', ' ')}}.\n\n"
_LABEL = "{{choices.label.index(answerKey|trim)}}"


@dataclass(frozen=True)
class RowLayout:
    """Templates of a row layout: lm-eval's doc_to_text, doc_to_choice, doc_to_target, metrics and settings.

    The last field contains the answer. The first metric is used to compare models.
    """

    fields: tuple[str, ...]
    text: str
    choice: str | list[str] | None
    target: str | int
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    settings: Mapping[str, Any] = field(default_factory=dict)


_COPA_CHOICE = "{{[' ' ~ choice1[0]|lower ~ choice1[1:], ' ' ~ choice2[0]|lower ~ choice2[1:]]}}"
_NO_OR_YES = ["no", "yes"]
_BEFORE, _AFTER = "sentence.split('_')[0]", "sentence.split('_')[1]"

ROW_LAYOUTS = {
    "query": RowLayout(("query", "choices", "gold"), "query", "choices", "{{gold}}"),
    "contexts": RowLayout(
        ("context_options", "continuation", "gold"), "{{gold}}", "context_options", "continuation", ("acc",)
    ),
    "minimal_pairs": RowLayout(
        ("sentence_good", "sentence_bad"), "", "{{[sentence_good, sentence_bad]}}", 0, ("acc",), {"num_fewshot": 0}
    ),
    "last_words": RowLayout(
        ("context", "continuation"), "context", None, " {{continuation}}", ("acc", "perplexity"),
        {"output_type": "loglikelihood"},
    ),
    "mmlu": (mmlu := RowLayout(
        ("subject", "question", "choices", "answer"),
        "{{question.strip()}}\n" + _LETTERED % ("choices", _LETTERS),
        f"{{{{{_LETTERS}[:choices|length]|list}}}}",
        "{{answer}}",
        ("acc",),
        {"description": _ABOUT},
    )),
    "mmlu, gold": replace(mmlu, fields=(*mmlu.fields[:-1], "gold"), target="{{gold}}"),
    "arc": RowLayout(
        ("question", "choices", "answerKey"), "Question: {{question}}\nAnswer:", "{{choices.text}}", _LABEL
    ),
    "commonsense_qa": RowLayout(
        ("question", "question_concept", "choices", "answerKey"),
        "Question: {{question.strip()}}\n" + _LETTERED % ("choices.text", "choices.label"),
        "{{choices.label}}",
        _LABEL,
        ("acc",),
    ),
    "openbookqa": RowLayout(("question_stem", "choices", "answerKey"), "question_stem", "{{choices.text}}", _LABEL),
    "piqa": RowLayout(
        ("goal", "sol1", "sol2", "label"), "Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}", "{{label}}"
    ),
    "hellaswag": (hellaswag := RowLayout(
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        f"{{{{[activity_label ~ ': ' ~ ctx_a ~ ' ' ~ ctx_b.capitalize()]|{_CLEAN}|first}}}}",
        f"{{{{endings|{_CLEAN}|list}}}}",
        "{{label}}",
    )),
    "hellaswag, ctx": replace(hellaswag, fields=("ctx", "endings", "label"), text=f"{{{{[ctx]|{_CLEAN}|first}}}}"),
    "boolq": (boolq := RowLayout(
        ("passage", "question", "answer"), "{{passage}}\nQuestion: {{question}}?\nAnswer:", _NO_OR_YES,
        "{{answer|int}}", ("acc",),
    )),
    "boolq, label": replace(boolq, fields=("passage", "question", "label"), target="{{label|int}}"),
    "winogrande": RowLayout(
        ("sentence", "option1", "option2", "answer"),
        "{{answer|int - 1}}",
        f"{{{{[{_BEFORE} ~ option1, {_BEFORE} ~ option2]}}}}",
        f"{{{{{_AFTER}.strip()}}}}",
        ("acc",),
    ),
    "copa": RowLayout(
        ("premise", "choice1", "choice2", "question", "label"),
        "{{premise.strip()[:-1]}} {{'because' if question == 'cause' else 'therefore'}}",
        _COPA_CHOICE,
        "{{label}}",
        ("acc",),
    ),
}  # fmt: skip


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file.

    Parameters
    ----------
    path : str or Path
        File with one JSON object per line, in UTF-8: plain, compressed (``.gz``, ``.bz2``, ``.xz``; ``.zst`` with the
        package zstandard), or a ``.zip`` archive of such files, which are read in the order of their names.

    Returns
    -------
    list of dict

    Raises
    ------
    StreamlineError
        If the file cannot be read or is empty, or a line is not a JSON object.
    """
    try:
        texts = list(_texts(Path(path).expanduser()))
    except (OSError, EOFError, ValueError, ImportError, zipfile.BadZipFile) as error:
        raise StreamlineError(
            f"{path} cannot be read: {error}. Expected JSONL in UTF-8, plain, compressed or in a .zip. Check the file."
        ) from error
    rows = [row for where, text in texts for row in parse_rows(text, where)]
    if not rows:
        raise StreamlineError(f"{path} is empty. Expected a JSON object on each line. Check the file.")
    return rows


def source_name(source: str) -> str:
    """Return the name of a file without suffixes, or of a data set (hub:...) with its configuration."""
    if source.startswith("hub:"):
        name, *config = source.removeprefix("hub:").split(":")
        return "-".join([name.split("/")[-1], *config[:-1]])
    return _SUFFIX.sub("", Path(source).name)


def parse_rows(text: str, where: str) -> list[dict[str, Any]]:
    """Parse the text of a JSONL file; `where` names it in error messages."""
    lines = enumerate(text.split("\n"), start=1)  # not splitlines, because JSON strings may contain U+2028
    return [_row(line, f"{where}, line {number}") for number, line in lines if line.strip()]


def random_subset(items: list[Any], count: int | None, seed: str) -> list[Any]:
    """Return a random subset in the original order; all items if `count` is None or too large."""
    if count is None or count >= len(items):
        return items
    return [items[k] for k in sorted(Random(seed).sample(range(len(items)), count))]


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and text of a file, or of each visible JSONL file in a zip archive."""
    sources = {str(path): str(path)}
    if path.suffix == ".zip":
        names = sorted(zipfile.ZipFile(path).namelist())
        visible = [name for name in names if not any(part.startswith((".", "__")) for part in name.split("/"))]
        sources = {f"{path}: {n}": f"zip://{n}::{path}" for n in visible if n.endswith((".jsonl", ".jsonl.gz"))}
    for name, url in sources.items():
        with fsspec.open(url, "rt", encoding="utf-8-sig", compression="infer") as file:
            yield name, file.read()


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise StreamlineError(
            f"{where} is not valid JSON ({error}). Expected one object per line. Correct the line."
        ) from error
    if not isinstance(row, dict):
        raise StreamlineError(f"{where} is a {type(row).__name__}. Expected a JSON object. Correct the line.")
    return row


def task_config_from_file(source: str, **settings: Any) -> dict[str, Any]:
    """Create an lm-eval task config from a file or data set.

    Parameters
    ----------
    source : str
        Path of a JSONL file (see `read_rows`), or ``hub:NAME:SPLIT`` or ``hub:NAME:CONFIG:SPLIT`` for a data set on the
        hub.
    **settings
        See `task_config_from_rows`.

    Returns
    -------
    dict
        The config, for `run_tasks`.

    Raises
    ------
    StreamlineError
        If the source cannot be read, or its rows have no known layout.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     _ = file.write('{"goal": "Dry a cup", "sol1": "Use a towel", "sol2": "Use a hose", "label": 0}')
    ...     file.flush()
    ...     task_config_from_file(file.name)["doc_to_choice"]
    '{{[sol1, sol2]}}'
    """
    if not source.startswith("hub:"):
        return task_config_from_rows(read_rows(source), source_name(source), **settings)
    name, *config = source.removeprefix("hub:").split(":")
    split = config.pop() if config else ""
    if not name or not split or len(config) > 1:
        raise StreamlineError(
            f"{source!r} is not a split of a data set. Expected hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT. Add the split."
        )
    import datasets

    try:
        rows = list(datasets.load_dataset(name, *config, split=split))
    except Exception as error:  # data set loaders raise many types
        raise StreamlineError(
            f"{source!r} cannot be loaded ({type(error).__name__}: {error}). Expected a data set on the hub. Check its "
            "name, configuration and split, and the network."
        ) from error
    return task_config_from_rows(rows, source_name(source), **settings)


def task_config_from_rows(rows: Sequence[Mapping[str, Any]], name: str, **settings: Any) -> dict[str, Any]:
    """Create an lm-eval task config from rows in one of the `ROW_LAYOUTS`.

    Parameters
    ----------
    rows : sequence of mapping
        The rows, all in the same layout. Other fields are ignored.
    name : str
        Name of the task.
    **settings
        Settings of the lm-eval task, such as `doc_to_text`, that override those of the layout.

    Returns
    -------
    dict
        The config, for `run_tasks`.

    Raises
    ------
    StreamlineError
        If the layout is unknown, a row lacks a field, an answer is hidden, or a field has several types.

    Examples
    --------
    >>> row = {"goal": "Dry a cup", "sol1": "Use a towel", "sol2": "Use a hose", "label": 0}
    >>> task_config_from_rows([row], "mine")["doc_to_choice"]
    '{{[sol1, sol2]}}'
    """
    layout = _layout_of(rows[0], name)
    for number, row in enumerate(rows):
        if missing := [field for field in layout.fields if field not in row]:
            raise StreamlineError(
                f"{name}: row {number} lacks {', '.join(missing)}. Expected the fields {', '.join(layout.fields)} of "
                "row 0. Correct the row, or create one task per layout."
            )
        if row[layout.fields[-1]] in _HIDDEN:
            raise StreamlineError(
                f"{name}: row {number} has {layout.fields[-1]}={row[layout.fields[-1]]!r}: its answer is hidden, as in "
                "test splits. Expected an answer. Use the validation split."
            )
    if layout.choice == _NO_OR_YES:
        answer = layout.fields[-1]
        rows = [{**row, answer: _as_bool(row[answer], f"{name}: row {number}")} for number, row in enumerate(rows)]
    from datasets import Dataset

    try:
        data = Dataset.from_list([{field: row[field] for field in layout.fields} for row in rows])
    except Exception as error:  # pyarrow raises several types
        raise StreamlineError(
            f"{name}: a field has values of different types ({error}). Expected one type per field. Correct the rows."
        ) from error
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": data},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": layout.text,
        "doc_to_target": layout.target,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True, **_METRIC_SETTINGS.get(name, {})}
            for name in layout.metrics
        ],
        "metadata": {"version": 1.0},
        **({} if layout.choice is None else {"doc_to_choice": layout.choice}),
        **layout.settings,
        **settings,
    }


def _as_bool(answer: Any, where: str) -> bool:
    for value, words in ((False, ("false", "no", "0")), (True, ("true", "yes", "1"))):
        if str(answer).strip().lower() in words:
            return value
    raise StreamlineError(
        f"{where} has the answer {answer!r}. Expected true or false, yes or no, or 1 or 0. Correct the row."
    )


def _layout_of(row: Mapping[str, Any], name: str) -> RowLayout:
    """Return the layout with the most fields among those that match a row."""
    fitting = [layout for layout in ROW_LAYOUTS.values() if row.keys() >= set(layout.fields)]
    if fitting:
        return max(fitting, key=lambda layout: len(layout.fields))
    known = "; ".join(f"{name} ({', '.join(layout.fields)})" for name, layout in ROW_LAYOUTS.items())
    raise StreamlineError(
        f"{name}: the fields {', '.join(map(str, row)) or 'none'} match no known layout. Expected the fields of one "
        f"of: {known}. Rename the fields, or write a task file (YAML) for lm-eval."
    )
