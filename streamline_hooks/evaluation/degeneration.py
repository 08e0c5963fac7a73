"""Detect a collapse of generation (unsolved problems, repetition), and warn about reasoning models."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from streamline_hooks.core import Batch, get_logger, max_positions
from streamline_hooks.evaluation.samples import (
    GeneratedText,
    GenerationStatistics,
    TextGenerationConfig,
    generate_texts,
    sample_prompts,
)
from streamline_hooks.evaluation.synthetic_tasks import ANSWER_STOP, synthetic_problems

logger = get_logger(__name__)

_SIGNIFICANCE_LEVEL = 0.05
_MAX_SHARE_LEFT = 0.5  # no collapse if at least this fraction of the original's solved problems is solved
_MIN_REPETITION_INCREASE = 0.2  # of the fraction of repeated 4-grams
_MIN_TEXT_TOKENS = 4  # a shorter text has no 4-gram

# Delimiters of reasoning in several model families, compared case-insensitively.
_MARKS = (
    *("<think>", "</think>", "<|think|>", "<thinking>", "<thought>", "<reasoning>", "<seed:think>", "[THINK]"),
    *("<|channel|>analysis", "<|channel>thought", "<|START_THINKING|>", "<|begin_of_thought|>"),
)
_SWITCHES = ("enable_thinking", "thinking_budget", "reasoning_effort", "detailed thinking")  # in chat templates only
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_REASONING_BACKGROUND = (
    "Removing blocks harms long chains of thought most: one or two blocks can be too many, perplexity and short tasks "
    "hardly show it, and fine-tuning on text did not restore them (arXiv 2510.22228)."
)
_REASONING_ADVICE = (
    "Remove fewer blocks, train the model on its own generations (examples/on_policy_distillation.py), and test it on "
    "long problems of your own (evaluate --suite) before use."
)


def sign_test(lost: int, won: int) -> float:
    """Return the p-value of the one-sided exact sign test (McNemar's test) for lost and won pairs.

    Examples
    --------
    >>> sign_test(5, 0), sign_test(1, 1), sign_test(0, 0)
    (0.03125, 0.75, 1.0)
    """
    pairs = lost + won
    return float(sum(math.comb(pairs, k) for k in range(won + 1)) / 2**pairs)


def min_pairs_for_significance(sorts: int) -> int:
    """Return the number of problems that the original must solve for a collapse to be detectable.

    With ``sorts=0`` it is the number of texts.
    """
    return next(count for count in range(64) if sign_test(count, 0) < _SIGNIFICANCE_LEVEL / (sorts + 1))


def problem_collapse_warning(before: Mapping[str, Sequence[bool]], after: Mapping[str, Sequence[bool]]) -> str:
    """Return a warning if a changed model has lost problems that the original solves; else an empty string.

    A collapse means that less than half of the original's solved problems are solved, and that the loss is significant
    (`sign_test`). It is tested for all problems together and for each sort; the false-positive rate of all tests
    together is at most 5 %.
    """
    level = _SIGNIFICANCE_LEVEL / (len(before) + 1)
    all_before, all_after = (list(chain(*sorts.values())) for sorts in (before, after))
    counts = f"The compressed model solves {sum(all_after)} of {len(all_after)} synthetic problems, the original "
    counts += f"{sum(all_before)}"
    changes = {name: f"{name} {sum(before[name])} -> {sum(after[name])}" for name in before}
    advice = (
        "Perplexity does not show this. Remove fewer blocks or train the repair, and evaluate the model on your own "
        "tasks."
    )
    if _collapsed(all_before, all_after, level):
        return f"{counts} ({', '.join(changes.values())}). {advice}"
    lost = [changes[name] for name in before if _collapsed(before[name], after[name], level)]
    return f"{counts}, but no longer this sort: {', '.join(lost)}. {advice}" if lost else ""


def repetition_warning(before: Sequence[GeneratedText], after: Sequence[GeneratedText]) -> str:
    """Return a warning if the generations of a changed model are repetitive or almost empty; else an empty string.

    Generations are repetitive if the mean fraction of repeated 4-grams is 20 points above the original's, and higher in
    a significant number of texts (`sign_test`, 5 %). They are almost empty if significantly more texts than the
    original's have fewer than four tokens. Both sequences must have the same prompts in the same order.
    """
    warnings, pairs = list[str](), list(zip(before, after, strict=True))
    short = [tuple(len(text.tokens) < _MIN_TEXT_TOKENS for text in pair) for pair in pairs]
    if sign_test(sum(a < b for a, b in short), sum(a > b for a, b in short)) < _SIGNIFICANCE_LEVEL:
        warnings.append(
            f"The compressed model's generations are almost empty: {sum(b for _, b in short)} of {len(short)} texts "
            f"have fewer than four tokens, {sum(a for a, _ in short)} of the original's."
        )
    pairs = [pair for pair, ends in zip(pairs, short, strict=True) if not any(ends)]
    if pairs:
        original, changed = (GenerationStatistics(tuple(texts)).repetition for texts in zip(*pairs, strict=True))
        more = sum(b.repetition > a.repetition for a, b in pairs)
        less = sum(b.repetition < a.repetition for a, b in pairs)
        if changed - original >= _MIN_REPETITION_INCREASE and sign_test(more, less) < _SIGNIFICANCE_LEVEL:
            warnings.append(
                f"The compressed model's generations are repetitive: {changed:.0%} of the 4-grams are repeated, "
                f"{original:.0%} in the original's ({len(pairs)} texts)."
            )
    return " ".join([*warnings, "Remove fewer blocks, or train the repair."]) if warnings else ""


def _collapsed(before: Sequence[bool], after: Sequence[bool], level: float) -> bool:
    pairs = list(zip(before, after, strict=True))
    lost, won = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return sum(after) < _MAX_SHARE_LEFT * sum(before) and sign_test(lost, won) < level


def reasoning_marker(tokenizer: Any) -> str:
    """Describe the part of a tokenizer that identifies a reasoning model; empty if there is none.

    Added tokens are examined only without a chat template, because instruction-tuned models may share the vocabulary
    of a reasoning model.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template:
        templates = template.values() if isinstance(template, dict) else [template]
        text = _COMMENT.sub("", "\n".join(map(str, templates)))
        marker = _first_marker(text, (*_MARKS, *_SWITCHES))
        return f"its chat template has {marker}" if marker else ""
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    special = getattr(tokenizer, "all_special_tokens", ())
    marker = _first_marker("\n".join([*map(str, added), *map(str, special)]), _MARKS)
    return f"its vocabulary has the token {marker}" if marker else ""


def reasoning_marker_in_text(text: str) -> str:
    """Describe the delimiter of reasoning in a generated text (with special tokens); empty if there is none."""
    marker = _first_marker(text, _MARKS)
    return f"it answers with {marker}" if marker else ""


def reasoning_warning(
    sign: str, before: Sequence[GeneratedText] = (), after: Sequence[GeneratedText] = (), limit: int = 0
) -> str:
    """Return a warning about removing blocks of a reasoning model; empty if `sign` is empty (see `reasoning_marker`).

    `before` and `after` are the answers of the original and the changed model to the same problems, with at most
    `limit` tokens; empty if not measured.
    """
    if not sign:
        return ""
    first = f"This is a reasoning model ({sign})."
    if not before or not after:
        return f"{first} {_REASONING_BACKGROUND} The length of its answers was not measured. {_REASONING_ADVICE}"
    original, changed = GenerationStatistics(tuple(before)), GenerationStatistics(tuple(after))
    comparison = (
        f"With at most {limit} tokens, the original finishes {sum(text.ended for text in before)} of {len(before)} "
        f"problems, with {original.length:.0f} tokens on average and {_percent_or_none(original.repetition)} of the "
        f"4-grams repeated; the compressed model finishes {sum(text.ended for text in after)}, with "
        f"{changed.length:.0f} tokens and {_percent_or_none(changed.repetition)}."
    )
    return f"{first} {comparison} {_REASONING_BACKGROUND} {_REASONING_ADVICE}"


def reasoning_warnings(tokenizer: Any) -> list[str]:
    """Return the warnings about a reasoning model that the tokenizer alone justifies, without generation."""
    text = reasoning_warning(reasoning_marker(tokenizer))
    return [text] if text else []


def _percent_or_none(value: float) -> str:
    return f"{value:.0%}" if not math.isnan(value) else "none"


def _first_marker(text: str, marks: Sequence[str]) -> str:
    """Return the first of the marks that occurs in the text, or an empty string."""
    lower = text.lower()
    return next((mark for mark in marks if mark.lower() in lower), "")


_PROBLEMS, _SHOTS, _ANSWER_TOKENS = 8, 3, 24  # per sort
_TEXTS, _PROMPT_TOKENS, _TEXT_TOKENS = 8, 24, 48
_OPENING_TOKENS, _THOUGHT_TOKENS = 8, 256
_REASONING_QUESTIONS = (
    "A farmer has 17 sheep. All but 9 run away, and then he buys 4 more. How many sheep does he have?",
    "A train leaves at 9:40 and arrives at 13:05. It stands still for 25 minutes on its way. How long does it move?",
    "Three friends share 84 marbles. Ann gets twice as many as Ben, and Ben twice as many as Cem. What does Ben get?",
)


class CollapseCheck:
    """Compare generation before and after surgery, and warn if it has collapsed.

    The original solves 32 synthetic problems (see `synthetic_problems`), continues 8 texts, and, if it is a reasoning
    model, answers 3 questions in at most 256 tokens. The compressed model repeats the tasks on which a collapse can be
    detected. Tasks that fail on the original are skipped, and the reason is logged.
    """

    def __init__(self, model: Any, tokenizer: Any, batches: Sequence[Batch | Tensor]) -> None:
        self.tokenizer = tokenizer
        self._failures: list[str] = []
        self._half_positions = (max_positions(model.config) or 10**9) // 2
        length = min(_PROMPT_TOKENS, self._half_positions)
        self._prompts = sample_prompts(tokenizer, batches, count=_TEXTS, length=length)
        if 0 < len(self._prompts) < (required := min_pairs_for_significance(0)):
            logger.info(
                f"The text yields only {len(self._prompts)} prompts. Detecting repetition of the compressed model "
                f"takes {required}. Increase test_tokens."
            )
        self._problems = synthetic_problems(_PROBLEMS, shots=_SHOTS)
        self._min_solved = min_pairs_for_significance(len(self._problems))
        self._solved = self._solve(model, "original")
        self._solved_count = sum(map(sum, self._solved.values()))
        if self._solved and self._solved_count < self._min_solved:
            logger.info(
                f"The original solves {self._solved_count} of {_PROBLEMS * len(self._problems)} synthetic problems. "
                f"Detecting their loss in the compressed model takes {self._min_solved}."
            )
        self._continuations = self._continue_texts(model, "original")
        self._marker = reasoning_marker(tokenizer) or self._marker_in_answers(model)
        self._answers = self._answer_questions(model, "reasoning: original") if self._marker else []

    def warnings(self, model: Any) -> list[str]:
        """Return the warnings on a compressed model; empty if no collapse is detected."""
        warnings = []
        self._failures.clear()
        if self._solved_count >= self._min_solved and (solved := self._solve(model, "compressed")):
            warnings.append(problem_collapse_warning(self._solved, solved))
        if self._continuations and (texts := self._continue_texts(model, "compressed")):
            warnings.append(repetition_warning(self._continuations, texts))
        if self._marker:
            answers = self._answer_questions(model, "reasoning: compressed") if self._answers else []
            limit = min(_THOUGHT_TOKENS, self._half_positions)
            warnings.append(reasoning_warning(self._marker, self._answers, answers, limit))
        if self._failures:
            warnings.append(f"The compressed model cannot generate as the original does: {self._failures[0]}")
        return [text for text in warnings if text]

    def _solve(self, model: Any, label: str) -> dict[str, list[bool]]:
        """Return whether each problem is solved, by sort; empty if the model cannot generate."""
        problems = list(chain(*self._problems.values()))
        prompts = [problem.prompt for problem in problems]
        texts = self._generate(model, prompts, _ANSWER_TOKENS, f"synthetic problems: {label}", stop=ANSWER_STOP)
        if not texts:
            return {}
        right = [problem.solved_by(text.text) for problem, text in zip(problems, texts, strict=True)]
        return {name: right[k * _PROBLEMS : (k + 1) * _PROBLEMS] for k, name in enumerate(self._problems)}

    def _continue_texts(self, model: Any, label: str) -> list[GeneratedText]:
        return self._generate(model, self._prompts, min(_TEXT_TOKENS, self._half_positions), f"repetition: {label}")

    def _answer_questions(self, model: Any, desc: str, tokens: int = _THOUGHT_TOKENS) -> list[GeneratedText]:
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        return self._generate(model, _REASONING_QUESTIONS, min(tokens, self._half_positions), desc, chat=chat)

    def _marker_in_answers(self, model: Any) -> str:
        """Return the reasoning marker in the first tokens of a model's answers, or an empty string."""
        texts = self._answer_questions(model, "first words: original", _OPENING_TOKENS)
        markers = [reasoning_marker_in_text(self.tokenizer.decode(text.tokens)) for text in texts]
        return next(filter(None, markers), "")

    def _generate(
        self, model: Any, prompts: Sequence[str], tokens: int, desc: str, **options: Any
    ) -> list[GeneratedText]:
        try:
            results = generate_texts(model, self.tokenizer, prompts, TextGenerationConfig(tokens, **options), desc=desc)
        except Exception as error:  # any error of the model's generate must not abort the compression
            self._failures.append(f"{type(error).__name__}: {error}")
            logger.info(f"No text was generated ({desc}): {self._failures[-1]}")
            return []
        return [text for (text,) in results]
