"""Which changes count as a collapse, and which tokenizers and answers show a reasoning model."""

from __future__ import annotations

import itertools
import math
import re
from random import Random
from typing import Any

import pytest

from streamline_hooks.evaluation.degeneration import (
    min_pairs_for_significance,
    problem_collapse_warning,
    reasoning_marker,
    reasoning_marker_in_text,
    reasoning_warning,
    repetition_warning,
    sign_test,
)
from streamline_hooks.evaluation.samples import GeneratedText

SORTS = ("arithmetic", "brackets", "copying", "counting")


def solved(*counts: int) -> dict[str, list[bool]]:
    """So many of the eight of each sort, the first ones."""
    return {name: [k < count for k in range(8)] for name, count in zip(SORTS, counts, strict=True)}


def texts(*repetitions: float) -> list[GeneratedText]:
    """Texts of 103 tokens, of whose 100 runs of four such a share is repeated."""
    made = []
    for k, share in enumerate(repetitions):
        repeated = round(100 * share)
        tokens = (*([7] * (repeated + 4 if repeated else 0)), *range(100, 300))[:103]
        made.append(GeneratedText(f"prompt {k}", "", tokens, ended=False))
        assert round(made[-1].repetition, 2) == share
    return made


def test_the_sign_test_counts_all_ways_that_a_coin_can_fall() -> None:
    for lost, won in itertools.product(range(6), range(6)):
        throws = list(itertools.product((0, 1), repeat=lost + won))
        assert sign_test(lost, won) == sum(sum(one) >= lost for one in throws) / len(throws)
    assert min_pairs_for_significance(4) == 7


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((5, 0, 8, 4), (1, 0, 2, 0), r"solves 3 of 32.*original 17.*"
         r"arithmetic 5 -> 1, brackets 0 -> 0, copying 8 -> 2, counting 4 -> 0"),
        ((8, 8, 8, 8), (0, 0, 0, 0), r"solves 0 of 32.*original 32 \("),
        ((8, 8, 8, 8), (8, 0, 8, 8), r"solves 24 of 32.*original 32.*no longer this sort: brackets 8 -> 0"),
        ((0, 0, 7, 0), (0, 0, 0, 0), r"solves 0 of 32.*original 7 \("),
        ((0, 0, 6, 0), (0, 0, 0, 0), ""),  # an original that solves next to nothing
        ((0, 0, 0, 0), (0, 0, 0, 0), ""),
        ((2, 1, 2, 0), (0, 0, 0, 0), ""),
        ((5, 0, 8, 4), (5, 0, 8, 4), ""),
        ((0, 0, 0, 0), (8, 8, 8, 8), ""),
        ((8, 8, 8, 8), (4, 4, 4, 4), ""),  # clearly worse, but half is left
        ((8, 8, 8, 8), (8, 2, 8, 8), ""),  # of one sort by itself eight are few: 6 lost of 8 may be chance
    ],
)  # fmt: skip
def test_problems_that_are_no_longer_solved(before: tuple[int, ...], after: tuple[int, ...], words: str) -> None:
    said = problem_collapse_warning(solved(*before), solved(*after))
    assert re.search(words, said) and bool(said) == bool(words)


def test_other_problems_solved_instead_are_no_collapse() -> None:
    """The pairs decide: sixteen of the original's are lost, but seven others won in their place."""
    before = {"sums": [True] * 16 + [False] * 16}
    after = {"sums": [False] * 16 + [True] * 7 + [False] * 9}
    same = {"sums": [True] * 7 + [False] * 25}
    assert problem_collapse_warning(before, same) and not problem_collapse_warning(before, after)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_noise_is_seldom_called_a_collapse(share: float) -> None:
    """Two models that are equally good, and whose answers have nothing to do with each other."""
    random = Random(0)

    def drawn() -> dict[str, list[bool]]:
        return {name: [random.random() < share for _ in range(8)] for name in SORTS}

    assert sum(bool(problem_collapse_warning(drawn(), drawn())) for _ in range(2000)) <= 0.05 * 2000


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((0.0,) * 8, (0.9,) * 8, r"repetitive: 90%.*0% in the original's \(8 texts\).*Remove fewer blocks.*train"),
        ((0.3,) * 8, (0.9,) * 7 + (0.1,), "repetitive: 80%"),
        ((0.3,) * 8, (0.45,) * 8, ""),  # higher in each, but by little
        ((0.0,) * 8, (0.9,) * 3 + (0.0,) * 5, ""),  # much higher on average, but in three texts alone
        ((0.3,) * 8, (0.9,) * 6 + (0.1,) * 2, ""),
        ((0.9,) * 8, (0.0,) * 8, ""),
        ((0.9,) * 8, (0.9,) * 8, ""),
        ((0.1,) * 4, (0.9,) * 4, ""),  # four texts are too few to tell
    ],
)  # fmt: skip
def test_texts_that_go_round(before: tuple[float, ...], after: tuple[float, ...], words: str) -> None:
    said = repetition_warning(texts(*before), texts(*after))
    assert re.search(words, said) and bool(said) == bool(words)


def test_texts_that_end_at_once() -> None:
    """They have no repetition at all, which must not pass for a good sign."""
    before = texts(*(0.1,) * 8)
    after = [GeneratedText(text.prompt, "", (), ended=True) for text in before]
    assert re.search(r"almost empty: 8 of 8 texts.*0 of the original's", repetition_warning(before, after))
    assert math.isnan(after[0].repetition) and not repetition_warning(after, after)
    assert not repetition_warning(after, before)


TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n"


class Spoken:
    """What a tokenizer says of itself."""

    def __init__(self, template: Any = None, added: tuple[str, ...] = (), special: tuple[str, ...] = ()) -> None:
        self.chat_template, self.all_special_tokens = template, list(special)
        self._added = {token: k for k, token in enumerate(added)}

    def get_added_vocab(self) -> dict[str, int]:
        return self._added


@pytest.mark.parametrize(
    ("tokenizer", "sign"),
    [
        (Spoken(f"{TURNS}{ASK}<think>\n{{% endif %}}"), "its chat template has <think>"),
        (Spoken(f"{TURNS}{{{{ m.content.split('</think>')[-1] }}}}"), "its chat template has </think>"),
        (Spoken(f"{TURNS}{ASK}{{% if not enable_thinking %}}-{{% endif %}}"), "its chat template has enable_thinking"),
        (Spoken("{{ '<|turn>system\n<|think|>' }}"), "its chat template has <|think|>"),
        (Spoken("{{ '[SYSTEM_PROMPT]First draft in [THINK]here[/THINK]' }}"), "its chat template has [THINK]"),
        (Spoken("{{ '<|start|>assistant<|channel|>analysis<|message|>' }}"),
         "its chat template has <|channel|>analysis"),
        (Spoken({"default": TURNS, "thinks": f"{TURNS}<think>"}), "its chat template has <think>"),
        (Spoken(None, ("<think>", "</think>")), "its vocabulary has the token <think>"),
        (Spoken(None, (), ("<s>", "[THINK]")), "its vocabulary has the token [THINK]"),
        # none of these reasons
        (Spoken(f"{TURNS}{ASK}{{% endif %}}"), ""),
        (Spoken(f"{{# no <think> here #}}{TURNS}"), ""),
        (Spoken(f"You are a thinking assistant who thinks in channels of reasoning. {TURNS}"), ""),
        (Spoken(f"{TURNS}{ASK}{{% endif %}}", ("<think>", "</think>")), ""),  # a sibling's vocabulary
        (Spoken("{{ '<|start|>assistant<|channel|>final<|message|>' }}"), ""),
        (Spoken(None, ("<|im_start|>",), ("<s>", "</s>")), ""),
        (Spoken(), ""), (object(), ""), (None, ""),
    ],
)  # fmt: skip
def test_what_a_tokenizer_says(tokenizer: Any, sign: str) -> None:
    assert reasoning_marker(tokenizer) == sign


@pytest.mark.long
def test_a_plain_instruct_model_is_none(smollm2: tuple[Any, Any]) -> None:
    assert smollm2[1].chat_template and reasoning_marker(smollm2[1]) == ""


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("<think>\nOkay", "it answers with <think>"),
        ("<|channel|>analysis<|message|>We need", "it answers with <|channel|>analysis"),
        ("I think that 9 - 4 < 6 is true.", ""),
        ("", ""),
    ],
)
def test_what_an_answer_says(text: str, sign: str) -> None:
    assert reasoning_marker_in_text(text) == sign


def test_what_is_said_of_one_that_reasons() -> None:
    before = [GeneratedText("", "", tuple(range(100)), True), GeneratedText("", "", tuple(range(256)), False)]
    after = [GeneratedText("", "", (3,) * 256, False)] * 2
    said = reasoning_warning("it answers with <think>", before, after, 256)
    for words in ("it answers with <think>", "at most 256 tokens", "original finishes 1 of 2 problems"):
        assert words in said
    assert re.search(r"178 tokens.*0%.*compressed model finishes 0, with 256 tokens and 100%", said)
    empty = [GeneratedText("", "", (), True)]
    assert "0 tokens and none." in reasoning_warning("x", empty, empty, 256)
    unmeasured = reasoning_warning("it answers with <think>")
    assert "not measured" in unmeasured and "arXiv 2510.22228" in unmeasured
    assert reasoning_warning("", before, after, 256) == ""
