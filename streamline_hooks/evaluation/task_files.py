r"""Make lm-eval task configs of local files and data sets in the layouts of well-known benchmarks.

The fields of a file's rows tell its layout; `LAYOUTS` has the templates of each, which are those of lm-eval's own task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.rows import read_rows, source_name

_OTHER = {"perplexity": {"aggregation": "perplexity", "higher_is_better": False}}
_HIDDEN = (None, "", -1, "-1")
_LETTERS = "'ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
_LETTERED = "{%% for text in %s %%}{{%s[loop.index0]}}. {{text}}\n{%% endfor %%}Answer:"
_CLEAN = (  # remove the mark-up of WikiHow
    "map('trim')|map('replace', ' [title]', '. ')|map('regex_replace', '\\\\[.*?\\\\]', '')|map('replace', '  ', ' ')"
)
_LABEL = "{{choices.label.index(answerKey|trim)}}"


@dataclass(frozen=True)
class Layout:
    """Templates of one layout of rows.

    Attributes
    ----------
    fields : tuple of str
        What each row has; the last one holds the answer.
    text, choice, target : str, int or list of str
        lm-eval's doc_to_text, doc_to_choice and doc_to_target.
    metrics : tuple of str
        The first one is compared with the original's.
    settings : mapping
        Further settings of the task.
    """

    fields: tuple[str, ...]
    text: str
    choice: str | list[str] | None
    target: str | int
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    settings: Mapping[str, Any] = field(default_factory=dict)


def _mmlu(answer: str) -> Layout:
    about = "The following are multiple choice questions (with answers) about {{subject|replace('_', ' ')}}.\n\n"
    return Layout(
        ("subject", "question", "choices", answer),
        "{{question.strip()}}\n" + _LETTERED % ("choices", _LETTERS),
        f"{{{{{_LETTERS}[:choices|length]|list}}}}",
        f"{{{{{answer}}}}}",
        ("acc",),
        {"description": about},
    )


def _boolq(answer: str) -> Layout:
    text = "{{passage}}\nQuestion: {{question}}?\nAnswer:"
    return Layout(("passage", "question", answer), text, ["no", "yes"], f"{{{{{answer}|int}}}}", ("acc",))


def _hellaswag(fields: tuple[str, ...], context: str) -> Layout:
    text = f"{{{{[{context}]|{_CLEAN}|first}}}}"
    return Layout((*fields, "endings", "label"), text, f"{{{{endings|{_CLEAN}|list}}}}", "{{label}}")


_COPA_CHOICE = "{{[' ' ~ choice1[0]|lower ~ choice1[1:], ' ' ~ choice2[0]|lower ~ choice2[1:]]}}"
_BEFORE, _AFTER = "sentence.split('_')[0]", "sentence.split('_')[1]"

LAYOUTS = {
    "query": Layout(("query", "choices", "gold"), "query", "choices", "{{gold}}"),
    "contexts": Layout(
        ("context_options", "continuation", "gold"), "{{gold}}", "context_options", "continuation", ("acc",)
    ),
    "minimal_pairs": Layout(
        ("sentence_good", "sentence_bad"), "", "{{[sentence_good, sentence_bad]}}", 0, ("acc",), {"num_fewshot": 0}
    ),
    "last_words": Layout(
        ("context", "continuation"), "context", None, " {{continuation}}", ("acc", "perplexity"),
        {"output_type": "loglikelihood"},
    ),
    "mmlu": _mmlu("answer"),
    "mmlu, gold": _mmlu("gold"),
    "arc": Layout(("question", "choices", "answerKey"), "Question: {{question}}\nAnswer:", "{{choices.text}}", _LABEL),
    "commonsense_qa": Layout(
        ("question", "question_concept", "choices", "answerKey"),
        "Question: {{question.strip()}}\n" + _LETTERED % ("choices.text", "choices.label"),
        "{{choices.label}}",
        _LABEL,
        ("acc",),
    ),
    "openbookqa": Layout(("question_stem", "choices", "answerKey"), "question_stem", "{{choices.text}}", _LABEL),
    "piqa": Layout(("goal", "sol1", "sol2", "label"), "Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}", "{{label}}"),
    "hellaswag": _hellaswag(
        ("activity_label", "ctx_a", "ctx_b"), "activity_label ~ ': ' ~ ctx_a ~ ' ' ~ ctx_b.capitalize()"
    ),
    "hellaswag, ctx": _hellaswag(("ctx",), "ctx"),
    "boolq": _boolq("answer"),
    "boolq, label": _boolq("label"),
    "winogrande": Layout(
        ("sentence", "option1", "option2", "answer"),
        "{{answer|int - 1}}",
        f"{{{{[{_BEFORE} ~ option1, {_BEFORE} ~ option2]}}}}",
        f"{{{{{_AFTER}.strip()}}}}",
        ("acc",),
    ),
    "copa": Layout(
        ("premise", "choice1", "choice2", "question", "label"),
        "{{premise.strip()[:-1]}} {{'because' if question == 'cause' else 'therefore'}}",
        _COPA_CHOICE,
        "{{label}}",
        ("acc",),
    ),
}  # fmt: skip


def config_of_file(source: str, **settings: Any) -> dict[str, Any]:
    """Make an lm-eval task of a file or data set.

    Parameters
    ----------
    source : str
        A JSONL file, see `read_rows`, or ``hub:NAME:SPLIT`` or ``hub:NAME:CONFIG:SPLIT`` of a data set on the hub.
    **settings
        See `config_of_rows`.
    """
    if not source.startswith("hub:"):
        return config_of_rows(read_rows(source), source_name(source), **settings)
    name, *config = source.removeprefix("hub:").split(":")
    split = config.pop() if config else ""
    if not name or not split or len(config) > 1:
        raise StreamlineError(
            f"{source!r} names no split of a data set. Expected hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT. Change it."
        )
    import datasets

    try:
        rows = list(datasets.load_dataset(name, *config, split=split))
    except Exception as error:  # whatever a data set's loader raises
        raise StreamlineError(
            f"{source!r} cannot be loaded ({type(error).__name__}: {error}). Expected a data set on the hub. Check its "
            "name, configuration and split, and the network."
        ) from error
    return config_of_rows(rows, source_name(source), **settings)


def config_of_rows(rows: Sequence[Mapping[str, Any]], name: str, **settings: Any) -> dict[str, Any]:
    """Make an lm-eval task of rows in one of the `LAYOUTS`.

    Parameters
    ----------
    rows : sequence of mapping
        All of one layout; fields that it does not use are ignored.
    name : str
        Name of the task.
    **settings
        Further settings of the task, such as `doc_to_text`, instead of the layout's.

    Returns
    -------
    dict
        For ``TaskManager.load``.

    Raises
    ------
    StreamlineError
        If the layout is unknown, a row lacks a field, or an answer is hidden.

    Examples
    --------
    >>> row = {"goal": "Dry a cup", "sol1": "Use a towel", "sol2": "Use a hose", "label": 0}
    >>> config_of_rows([row], "mine")["doc_to_choice"]
    '{{[sol1, sol2]}}'
    """
    layout = _layout_of(rows[0], name)
    for number, row in enumerate(rows):
        if missing := [field for field in layout.fields if field not in row]:
            raise StreamlineError(
                f"{name}: row {number} lacks {', '.join(missing)}. Expected the fields {', '.join(layout.fields)} of "
                "row 0. Correct it, or make a task of each layout."
            )
        if row[layout.fields[-1]] in _HIDDEN:
            raise StreamlineError(
                f"{name}: row {number} has {layout.fields[-1]}={row[layout.fields[-1]]!r}, as in a test split with "
                "hidden answers. Expected an answer. Use the validation split."
            )
    from datasets import Dataset

    try:
        data = Dataset.from_list([{field: row[field] for field in layout.fields} for row in rows])
    except Exception as error:  # pyarrow has several
        raise StreamlineError(f"{name}: the rows differ in type ({error}). Expected one type a field.") from error
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": data},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": layout.text,
        "doc_to_target": layout.target,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True, **_OTHER.get(name, {})}
            for name in layout.metrics
        ],
        "metadata": {"version": 1.0},
        **({} if layout.choice is None else {"doc_to_choice": layout.choice}),
        **layout.settings,
        **settings,
    }


def _layout_of(row: Mapping[str, Any], name: str) -> Layout:
    """Return the layout with the most fields of those that a row fits."""
    fitting = [layout for layout in LAYOUTS.values() if row.keys() >= set(layout.fields)]
    if fitting:
        return max(fitting, key=lambda layout: len(layout.fields))
    known = "; ".join(f"{name} ({', '.join(layout.fields)})" for name, layout in LAYOUTS.items())
    raise StreamlineError(
        f"{name}: the fields {', '.join(map(str, row)) or 'none'} of its rows are no known layout. Expected those of "
        f"{known}. Rename them, or write a task file (YAML) for lm-eval."
    )
