"""Whether a model is one that reasons before it answers, and what is known of such models with fewer blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from streamline_hooks.evaluation.writing import WritingScores, Written

# What thoughts are written between, of several families; compared without regard to case.
_MARKS = (
    *("<think>", "</think>", "<|think|>", "<thinking>", "<thought>", "<reasoning>", "<seed:think>", "[THINK]"),
    *("<|channel|>analysis", "<|channel>thought", "<|START_THINKING|>", "<|begin_of_thought|>"),
)
_SWITCHES = ("enable_thinking", "thinking_budget", "reasoning_effort", "detailed thinking")  # of templates alone
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_KNOWN = (
    "Long chains of thought lose most when blocks go: one or two can be too many, perplexity and short tasks hardly "
    "show it, and fine-tuning on text did not bring them back (arXiv 2510.22228)."
)
_ADVICE = (
    "Remove fewer blocks, train it on what it generates itself (examples/on_policy_distillation.py), and let it solve "
    "long problems of your own (evaluate --suite) before you use it."
)


def sign_of_reasoning(tokenizer: Any) -> str:
    """What speaks for a reasoning model in its tokenizer.

    The chat template decides: it names the marks between which thoughts stand, or a switch for them. Where there is no
    template, the tokens that were added to the vocabulary decide. An instruction-tuned model that shares the vocabulary
    of a reasoning one, and has a template of its own, is none.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase

    Returns
    -------
    str
        In words; empty where nothing does.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> sign_of_reasoning(SimpleNamespace(chat_template="{{ '<|assistant|>' }}{% if enable_thinking %}..."))
    'its chat template has enable_thinking'
    >>> sign_of_reasoning(SimpleNamespace(chat_template="{{ '<|assistant|>' }}"))
    ''
    """
    template = getattr(tokenizer, "chat_template", None)
    if template:
        several = template.values() if isinstance(template, dict) else [template]
        text = _COMMENT.sub("", "\n".join(map(str, several)))
        found = _first(text, (*_MARKS, *_SWITCHES))
        return f"its chat template has {found}" if found else ""
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    special = getattr(tokenizer, "all_special_tokens", ())
    found = _first("\n".join([*map(str, added), *map(str, special)]), _MARKS)
    return f"its vocabulary has the token {found}" if found else ""


def sign_in_writing(text: str) -> str:
    """What speaks for a reasoning model in what it writes.

    Parameters
    ----------
    text : str
        The beginning of an answer, special tokens included.

    Returns
    -------
    str
        In words; empty where nothing does.

    Examples
    --------
    >>> sign_in_writing("<think>Okay, the farmer has")
    'it answers with <think>'
    """
    found = _first(text, _MARKS)
    return f"it answers with {found}" if found else ""


def reasoning_in_words(sign: str, before: Sequence[Written] = (), after: Sequence[Written] = (), limit: int = 0) -> str:
    """What to know of a reasoning model with fewer blocks, with how long its answers are.

    Parameters
    ----------
    sign : str
        As `sign_of_reasoning` gives it.
    before, after : sequence of Written
        What original and changed model wrote to the same problems; without them it is said that nothing was measured.
    limit : int
        The most tokens that each was let write.

    Returns
    -------
    str
        Empty without a sign.

    Examples
    --------
    >>> texts = [Written("", "", (1, 2, 3, 4, 5), ended=True)]
    >>> said = reasoning_in_words("it answers with <think>", texts, texts, limit=64)
    >>> "Of 1 problems, with at most 64 tokens, the original brings 1 to an end and writes 5 tokens" in said
    True
    """
    if not sign:
        return ""
    first = f"This is a reasoning model ({sign})."
    if not before or not after:
        return f"{first} {_KNOWN} How long its answers are was not measured. {_ADVICE}"
    theirs, mine = WritingScores(tuple(before)), WritingScores(tuple(after))
    told = (
        f"Of {len(before)} problems, with at most {limit} tokens, the original brings "
        f"{sum(text.ended for text in before)} to an end and writes {theirs.length:.0f} tokens each, with "
        f"{_share(theirs.repetition)} of the runs of four tokens repeated; the compressed model "
        f"{sum(text.ended for text in after)}, {mine.length:.0f} tokens and {_share(mine.repetition)}."
    )
    return f"{first} {told} {_KNOWN} {_ADVICE}"


def unmeasured_reasoning(tokenizer: Any) -> list[str]:
    """The warnings of a compression in which nothing was written, by the tokenizer alone.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> unmeasured_reasoning(SimpleNamespace(chat_template="{{ '<|assistant|>' }}"))
    []
    """
    text = reasoning_in_words(sign_of_reasoning(tokenizer))
    return [text] if text else []


def _share(value: float) -> str:
    return f"{value:.0%}" if not math.isnan(value) else "none"


def _first(text: str, marks: Sequence[str]) -> str:
    """The first of several marks that a text has."""
    lower = text.lower()
    return next((mark for mark in marks if mark.lower() in lower), "")
