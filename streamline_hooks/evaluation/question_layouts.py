r"""What a row of questions says, by its keys: one small function a layout, and a table of them.

A query stands in the layout's prompt, at ``{}``; the choices follow it, after a space. Texts and prompts are those
usual for the task (lm-eval's, EleutherAI's harness, but for its second space before a choice that begins with one); the
prompt can be changed. What a row holds beside these keys is left alone.

================  ==================================================  ====================================  ==========
layout            keys, the last one with the right answer            what is scored after what             prompt
================  ==================================================  ====================================  ==========
query             query, choices; gold from 0                         a choice after the query              ``{}``
contexts          context_options, continuation; gold from 0          the text after each context           ``{}``
minimal_pairs     sentence_good, sentence_bad                         a whole sentence; the better one      ``{}``
                                                                      stands first in every second pair
mmlu              subject, question, choices; answer or gold from 0   a letter after lettered choices       A
arc               question, choices {text, label}; answerKey,         a choice after the question           Q
                  one of the labels
commonsense_qa    question, question_concept, choices {text,          a letter after lettered choices       Q
                  label}; answerKey, one of the labels
openbookqa        question_stem, choices {text, label}; answerKey,    a choice after the stem               ``{}``
                  one of the labels
piqa              goal, sol1, sol2; label from 0                      a solution after the goal             Q
hellaswag         ctx, endings; label from 0. With them: ctx_a,       an ending after the context; markers  ``{}``
                  ctx_b, activity_label                               of the source's mark-up are removed
boolq             passage, question; answer true or false,            no or yes after both                  A
                  or label 1 or 0
winogrande        sentence, option1, option2; answer 1 or 2           the rest of the sentence, after the   ``{}``
                                                                      sentence up to each option
copa              premise, choice1, choice2, question ("cause" or     a choice after the premise and        ``{}``
                  "effect"); label from 0                             "because" or "therefore"
================  ==================================================  ====================================  ==========

Q is ``"Question: {}\nAnswer:"``, A is ``"{}\nAnswer:"``. A row of CommonsenseQA has the keys of ARC and one more; it
is the one with more. Without its question_concept it is read as ARC, whose choices are scored as texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Integral
from string import ascii_uppercase
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.asked import Layout, Read, Unfit

_ANSWER, _QUESTION = "{}\nAnswer:", "Question: {}\nAnswer:"


def find_layout(row: Mapping[str, Any], where: str) -> Layout:
    """The one layout whose keys a row has; of two, of which one's keys are among the other's, that one.

    Raises
    ------
    StreamlineError
        If none or several fit; the text lists them.

    Examples
    --------
    >>> find_layout({"goal": "Dry a cup", "sol1": "with a towel", "sol2": "with a hose", "label": 0}, "row 0").name
    'piqa'
    """
    fitting = [layout for layout in LAYOUTS.values() if layout.fits(row)]
    found = [one for one in fitting if not any(set(one.keys) < set(other.keys) for other in fitting)]
    if len(found) == 1:
        return found[0]
    given = f"{where} holds the keys {', '.join(map(str, row)) or 'none'}"
    if found:
        names = " and ".join(repr(layout.name) for layout in found)
        raise StreamlineError(f"{given}, which fit the layouts {names}. Say which is meant: layout={found[0].name!r}.")
    raise StreamlineError(f"{given}; expected one of {'; '.join(map(str, LAYOUTS.values()))}.")


def layout_named(name: str) -> Layout:
    """A layout by its name.

    Raises
    ------
    StreamlineError
        If there is none of that name; the text lists them.
    """
    if name not in LAYOUTS:
        raise StreamlineError(f"There is no layout {name!r} of questions; there are {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


# The layouts


def _query(row: Mapping[str, Any], answer: Any) -> Read:
    return _continued(row["query"], row["choices"], _number(answer))


def _contexts(row: Mapping[str, Any], answer: Any) -> Read:
    contexts = _texts(row, "context_options")
    return contexts, [row["continuation"]] * len(contexts), _number(answer)


def _minimal_pairs(row: Mapping[str, Any], answer: Any) -> Read:
    return ["", ""], [row["sentence_good"], row["sentence_bad"]], 0


def _mmlu(row: Mapping[str, Any], answer: Any) -> Read:
    _text(row, "subject")
    return _lettered(_text(row, "question"), _texts(row, "choices"), _number(answer))


def _arc(row: Mapping[str, Any], answer: Any) -> Read:
    texts, gold = _labelled(row, answer)
    return _continued(row["question"], texts, gold)


def _commonsense_qa(row: Mapping[str, Any], answer: Any) -> Read:
    return _lettered(_text(row, "question"), *_labelled(row, answer))


def _openbookqa(row: Mapping[str, Any], answer: Any) -> Read:
    texts, gold = _labelled(row, answer)
    return _continued(row["question_stem"], texts, gold)


def _piqa(row: Mapping[str, Any], answer: Any) -> Read:
    return _continued(row["goal"], [row["sol1"], row["sol2"]], _number(answer))


def _hellaswag(row: Mapping[str, Any], answer: Any) -> Read:
    if {"ctx_a", "ctx_b"} <= row.keys():  # the second may begin in the middle of a sentence that it does not continue
        context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    else:
        context = _text(row, "ctx")
    about = f"{_text(row, 'activity_label')}: " if "activity_label" in row else ""
    endings = [_without_markup(ending) for ending in _texts(row, "endings")]
    return _continued(_without_markup(about + context), endings, _number(answer))


def _boolq(row: Mapping[str, Any], answer: Any) -> Read:
    query = f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question').removesuffix('?')}?"
    gold = int(answer) if isinstance(answer, bool) else _number(answer)
    return _continued(query, ["no", "yes"], gold)


def _winogrande(row: Mapping[str, Any], answer: Any) -> Read:
    before, *after = _text(row, "sentence").split("_")
    if len(after) != 1:
        raise Unfit(f"has {len(after)} places '_' for an option in its sentence, not one")
    options = [_text(row, "option1"), _text(row, "option2")]
    gold = _number(answer)
    return [before + option for option in options], [after[0].strip()] * 2, None if gold is None else gold - 1


def _copa(row: Mapping[str, Any], answer: Any) -> Read:
    link = {"cause": "because", "effect": "therefore"}.get(row["question"])
    if link is None:
        raise Unfit(f"has the question {row['question']!r}, which is neither 'cause' nor 'effect'")
    premise = re.sub(r"\W$", "", _text(row, "premise").strip())
    choices = [_text(row, key) for key in ("choice1", "choice2")]
    return _continued(f"{premise} {link}", [text[:1].lower() + text[1:] for text in choices], _number(answer))


_FROM_0 = "the number of the right one, from 0"
_LABEL = "one of their labels"
_ABOUT = "The following are multiple choice questions (with answers) about {}.\n\n"

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("query", ("query", "choices"), ("gold",), _FROM_0, _query),
        Layout("contexts", ("context_options", "continuation"), ("gold",), _FROM_0, _contexts),
        Layout("minimal_pairs", ("sentence_good", "sentence_bad"), (), "", _minimal_pairs, alternate=True),
        Layout("mmlu", ("subject", "question", "choices"), ("answer", "gold"), _FROM_0, _mmlu, _ANSWER, _ABOUT),
        Layout("arc", ("question", "choices"), ("answerKey",), _LABEL, _arc, _QUESTION),
        Layout(
            "commonsense_qa", ("question", "question_concept", "choices"), ("answerKey",), _LABEL, _commonsense_qa,
            _QUESTION,
        ),
        Layout("openbookqa", ("question_stem", "choices"), ("answerKey",), _LABEL, _openbookqa),
        Layout("piqa", ("goal", "sol1", "sol2"), ("label",), _FROM_0, _piqa, _QUESTION),
        Layout("hellaswag", ("ctx", "endings"), ("label",), _FROM_0, _hellaswag),
        Layout("boolq", ("passage", "question"), ("answer", "label"), "true or false, 1 or 0", _boolq, _ANSWER),
        Layout("winogrande", ("sentence", "option1", "option2"), ("answer",), "1 or 2", _winogrande),
        Layout("copa", ("premise", "choice1", "choice2", "question"), ("label",), _FROM_0, _copa),
    )
}  # fmt: skip


# What they are made of


def _continued(query: Any, choices: Any, gold: int | None) -> Read:
    return [query] * len(choices) if isinstance(choices, list) else [], choices, gold


def _lettered(question: str, texts: list[str], gold: int | None) -> Read:
    if len(texts) > len(ascii_uppercase):
        raise Unfit(f"has {len(texts)} choices, more than there are letters")
    letters = list(ascii_uppercase[: len(texts)])
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    return _continued("\n".join([question.strip(), *lines]), letters, gold)


def _labelled(row: Mapping[str, Any], answer: Any) -> tuple[list[str], int | None]:
    choices = row["choices"]
    if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
        raise Unfit('has choices without the keys "text" and "label"')
    texts, labels = _texts(choices, "text"), _texts(choices, "label")
    if len(texts) != len(labels) or len(set(labels)) != len(labels):
        raise Unfit(f"has the labels {labels} for {len(texts)} choices")
    key = str(answer).strip()
    return texts, labels.index(key) if key in labels else None


def _without_markup(text: str) -> str:
    """Without the [header], [title], ... that WikiHow's pages have left in HellaSwag; a title ends a sentence."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _number(answer: Any) -> int | None:
    if isinstance(answer, bool):
        return None
    if isinstance(answer, str):
        return int(answer) if answer.strip().isdecimal() else None
    return int(answer) if isinstance(answer, Integral) else None


def _text(row: Mapping[str, Any], key: str) -> str:
    text = row[key]
    if isinstance(text, str):
        return text
    raise Unfit(f"has {key} {text!r}, which is no text")


def _texts(row: Mapping[str, Any], key: str) -> list[str]:
    texts = row[key]
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return texts
    raise Unfit(f"has {key} {texts!r}, which is no list of texts")
