"""A collapse that is planted is told at the end of a compression, on the page and in the card; a whole model is not."""

from __future__ import annotations

import copy
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import compress, find_stack
from streamline_hooks.checkpoint import model_card
from streamline_hooks.evaluation.degeneration import CollapseCheck
from streamline_hooks.pipeline import write_report
from tests.configured import configured
from tests.pipeline.reading import Reader

SMALL = {"sequence_length": 64, "calibration_tokens": 3200, "validation_tokens": 320, "test_tokens": 640}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
END = 2


class Letters:
    """A tokenizer whose tokens are characters."""

    bos_token_id, eos_token_id, chat_template = 1, END, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(int(token)) for token in tokens if int(token) > END)

    def batch_decode(self, rows: Any) -> list[str]:
        return [self.decode(row) for row in rows]

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return f"User: {messages[0]['content']}\nAssistant:"


class Knowing(nn.Module):
    """Writes what it knows after a line, and the alphabet after any other."""

    def __init__(self, watched: dict[str, list[Any]], thinks: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config, self.generation_config = SimpleNamespace(), SimpleNamespace(eos_token_id=END)
        self.answers = {p.prompt: p.answer for sort in watched.values() for p in sort}
        self.otherwise, self.thinks = "abcdefghijklmnopqrstuvwxyz" * 20, thinks

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any) -> Any:
        if options.get("output_logits"):
            return SimpleNamespace(logits=[torch.zeros(len(input_ids), 3)])
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = Letters().decode(ids[mask.bool()])
            thought = "<think>" if self.thinks and "Assistant:" in prompt else ""
            answer = f" {self.answers[prompt]}\n" if prompt in self.answers else thought + self.otherwise
            rows.append([*map(ord, answer), *[END] * max_new_tokens][:max_new_tokens])
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def knowing(**options: Any) -> Knowing:
    from streamline_hooks.evaluation import synthetic_problems

    return Knowing(synthetic_problems(8, shots=3), **options)


def watched(model: nn.Module, tokenizer: Any) -> CollapseCheck:
    rows = [torch.arange(97, 121).roll(k)[None] for k in range(8)]
    return CollapseCheck(model, tokenizer, rows)


def test_what_a_model_no_longer_knows_is_told(log_messages: list[str]) -> None:
    model = knowing()
    watch = watched(model, Letters())
    assert watch.warnings(model) == []
    known = dict(model.answers)
    model.answers = {prompt: answer for prompt, answer in known.items() if "Say:" in prompt}
    (text,) = watch.warnings(model)
    assert re.search(r"solves 3 of 32.*original 27.*arithmetic 8 -> 0", text)
    assert "copying 3 -> 3, counting 8 -> 0" in text  # of 24 letters, what is longer is cut
    model.answers, model.otherwise = known, "a" * 500
    (text,) = watch.warnings(model)
    assert re.search(r"repetitive: 98%.*42% in the original's", text)
    assert log_messages == []


def test_a_model_that_can_write_no_more_is_told(log_messages: list[str]) -> None:
    model = knowing()
    watch = watched(model, Letters())

    def fails(**given: Any) -> Any:
        raise ValueError("no attention layer is left")

    vars(model)["generate"] = fails
    (text,) = watch.warnings(model)
    assert text.endswith("ValueError: no attention layer is left") and "cannot generate" in text
    del vars(model)["generate"]
    assert watch.warnings(model) == [] and len(log_messages) == 2


def test_an_original_that_knows_nothing_is_not_asked_again(log_messages: list[str]) -> None:
    model = knowing()
    model.answers = {}
    watch = watched(model, Letters())
    assert len(log_messages) == 1 and re.search(r"original solves 0 of 32.*takes 7\.", log_messages[0])
    calls: list[int] = []  # not held by the model, whose attributes are restored after each pass
    generate = model.generate

    def counted(**given: Any) -> Any:
        calls.append(0 if given.get("output_logits") else len(given["input_ids"]))
        return generate(**given)

    model.generate = counted  # type: ignore[method-assign]
    assert watch.warnings(model) == [] and sum(calls) == 8  # the texts alone


@pytest.mark.parametrize("thinks", [False, True])
def test_a_model_whose_template_is_silent_may_show_that_it_reasons(thinks: bool) -> None:
    tokenizer = Letters()
    tokenizer.chat_template = TEMPLATE
    model = knowing(thinks=thinks)
    watch = watched(model, tokenizer)
    model.otherwise = "ab" * 200
    told = [text for text in watch.warnings(model) if "reasoning" in text]
    assert len(told) == thinks
    if thinks:
        assert re.search(r"it answers with <think>.*at most 256 tokens, the original finishes 0 of 3 problems", told[0])
        assert re.search(
            r"256 tokens on average and 87%.*compressed model finishes 0, with 256 tokens and 96%", told[0]
        )


def test_text_for_too_few_beginnings_is_told(log_messages: list[str]) -> None:
    rows = [torch.arange(97, 121)[None]] * 4
    CollapseCheck(knowing(), Letters(), rows)
    assert len(log_messages) == 1 and re.search(r"4 prompts.*takes 5\..*Increase test_tokens", log_messages[0])


@pytest.mark.filterwarnings("ignore:Prompts of .* lengths")
def test_a_model_that_cannot_is_passed_over(log_messages: list[str]) -> None:
    model = knowing()

    def fails(**options: Any) -> Tensor:
        raise RuntimeError("no cache")

    model.generate = fails  # type: ignore[method-assign]
    tokenizer = Letters()
    tokenizer.chat_template = f"{TEMPLATE}<think>"
    (text,) = watched(model, tokenizer).warnings(model)
    assert "not measured" in text
    assert re.search(r"No text was generated.*synthetic problems: original.*RuntimeError: no cache", log_messages[0])
    assert re.search(r"No text was generated.*repetition: original.*RuntimeError: no cache", log_messages[1])


def test_a_head_that_repeats_is_told(
    story_model: tuple[Any, Any], story_texts: list[str], log_messages: list[str]
) -> None:
    model, tokenizer = story_model
    rows = [tokenizer(text, return_tensors="pt").input_ids[:, :64] for text in story_texts[:8]]
    watch = CollapseCheck(model, tokenizer, rows)
    assert watch.warnings(model) == [] and "of 32 synthetic problems" in log_messages[0], "a model of stories"
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.clone())  # not the embedding, where they are one
        head.weight[:] = head.weight[:1]
    (text,) = watch.warnings(model)
    assert "repetitive: 98%" in text


@pytest.mark.long
def test_a_reasoning_model_is_told_everywhere(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer = story_model[0], copy.deepcopy(story_model[1])
    tokenizer.chat_template = f"{TEMPLATE}<think>"
    result = compress(
        model, story_texts, configured(remove=1, shortlist=2, **SMALL), tokenizer=tokenizer, output=tmp_path / "out"
    )
    told = [text for text in result.warnings if "reasoning model (its chat template has" in text]
    assert len(told) == 1 and "of 3 problems" in told[0] and "at most 256 tokens" in told[0]
    assert result.table().endswith(f"\nWarning: {result.warnings[-1]}")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["warnings"] == result.warnings
    assert f"\n- {told[0]}\n" in (tmp_path / "out/README.md").read_text()
    page = write_report(tmp_path / "page", compression=report, command="c", title="t")
    reader = Reader(page.read_text())
    assert "Warnings" in reader.headings() and told[0] in reader.text


@pytest.mark.long
def test_before_the_surgery_and_after_it(
    story_model: tuple[Any, Any], story_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = story_model
    lengths: list[int] = []

    class Watch:
        def __init__(self, model: nn.Module, tokenizer: Any, batches: Any) -> None:
            self.model = model
            lengths.append(len(find_stack(model)))

        def warnings(self, model: Any) -> list[str]:
            lengths.append(len(find_stack(self.model)))
            return ["It is lost."]

    monkeypatch.setattr(importlib.import_module("streamline_hooks.pipeline.one_round"), "CollapseCheck", Watch)
    result = compress(
        copy.deepcopy(model),
        story_texts,
        configured(remove=1, repair="none", shortlist=2, **SMALL),
        tokenizer=tokenizer,
    )
    assert lengths == [5, 4] and result.warnings == ["It is lost."]
    result = compress(
        model,
        story_texts,
        configured(remove=1, repair="none", shortlist=2, speed=False, generation=False, **SMALL),
        tokenizer=tokenizer,
    )
    assert lengths == [5, 4] and result.warnings == [] and "Warning" not in result.table()


def test_a_reasoning_model_is_told_where_nothing_is_written(
    story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    model, tokenizer = story_model[0], copy.deepcopy(story_model[1])
    tokenizer.chat_template = f"{TEMPLATE}<think>"
    result = compress(
        model,
        story_texts,
        configured(remove=1, repair="none", shortlist=2, speed=False, generation=False, **SMALL),
        tokenizer=tokenizer,
    )
    (text,) = result.warnings
    assert "reasoning model (its chat template has <think>)" in text


def test_a_card_of_warnings_alone() -> None:
    card = model_card({"model_type": "llama"}, {"warnings": ["It solves 3 of 32."]})
    assert "## Quality\n" in card and "\n- It solves 3 of 32.\n" in card
    assert "## Quality" not in model_card({"model_type": "llama"}, {"warnings": []})
