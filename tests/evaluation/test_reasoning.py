"""Which tokenizers speak of a model that reasons, and what is then said."""

from __future__ import annotations

import re
from typing import Any

import pytest

from streamline_hooks.evaluation.reasoning import reasoning_in_words, sign_in_writing, sign_of_reasoning
from streamline_hooks.evaluation.writing import Written

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
    assert sign_of_reasoning(tokenizer) == sign


def test_a_plain_instruct_model_is_none(smollm2: tuple[Any, Any]) -> None:
    assert smollm2[1].chat_template and sign_of_reasoning(smollm2[1]) == ""


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
    assert sign_in_writing(text) == sign


def test_what_is_said_of_one_that_reasons() -> None:
    before = [Written("", "", tuple(range(100)), True), Written("", "", tuple(range(256)), False)]
    after = [Written("", "", (3,) * 256, False)] * 2
    said = reasoning_in_words("it answers with <think>", before, after, 256)
    for words in ("it answers with <think>", "2 problems", "at most 256 tokens", "original brings 1"):
        assert words in said
    assert re.search(r"178 tokens.*0%.*compressed model 0, 256 tokens and 100%", said)
    empty = [Written("", "", (), True)]
    assert "0 tokens and none." in reasoning_in_words("x", empty, empty, 256)
    unmeasured = reasoning_in_words("it answers with <think>")
    assert "not measured" in unmeasured and "arXiv 2510.22228" in unmeasured
    assert reasoning_in_words("", before, after, 256) == ""
