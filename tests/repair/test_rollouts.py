"""What a repaired model writes to be trained on: its own text, from real tokens, cut where it runs in a circle."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import LinearReplacement, StreamlineError
from streamline_hooks.cli.short_forms import parse_on_policy
from streamline_hooks.generation import end_tokens
from streamline_hooks.repair.on_policy import OnPolicyConfig, TextLength
from streamline_hooks.repair.rollouts import Counts, prompts_of, require_writes, roll_out, without_loop
from streamline_hooks.repair.student import Student
from streamline_hooks.task import Task
from streamline_hooks.testing import tiny_model

GREEDY: dict[str, Any] = {"temperature": 1e-4}


def student_of(family: str) -> Student:
    torch.manual_seed(3)
    module = LinearReplacement(32)
    torch.nn.init.normal_(module.projection.weight, std=0.3)
    return Student(tiny_model(family), [(range(1, 3), module)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3_text", "mamba"])
def test_what_is_written_is_what_the_model_says_without_a_cache(family: str) -> None:
    """A cache that is off by a slot, or positions that count the padding, would write another text."""
    student = student_of(family)
    batch = {"input_ids": torch.arange(3, 33).view(2, 15), "attention_mask": torch.ones(2, 15, dtype=torch.long)}
    batch["attention_mask"][0, :6] = 0  # prompts of several lengths, so that some are padded on the left
    with student.opened():
        found = roll_out(student.model, batch, prompt=12, new_tokens=5, **GREEDY)
        for row, (prompt, answered) in enumerate(
            zip(prompts_of(batch, 12, 5), found.answered.sum(dim=1).tolist(), strict=True)
        ):
            ids, ends = list(prompt), end_tokens(student.model, None)
            while len(ids) < len(prompt) + 5 and ids[-1] not in ends:
                with torch.no_grad():
                    ids.append(int(student.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            text = without_loop([i for i in ids[len(prompt) :] if i not in ends])
            length = int(found.batch["attention_mask"][row].sum())
            assert found.batch["input_ids"][row, :length].tolist() == [*prompt, *text]
            assert answered == len(text) + 1
    assert found.counts.written > 0


def test_it_is_the_student_that_writes_and_not_the_original() -> None:
    student, batch = student_of("llama"), torch.arange(3, 43).view(2, 20)
    with student.opened():
        mine = roll_out(student.model, batch, prompt=4, new_tokens=6, **GREEDY)
    theirs = roll_out(student.model, batch, prompt=4, new_tokens=6, **GREEDY)
    assert mine.batch["input_ids"].tolist() != theirs.batch["input_ids"].tolist()


def test_the_seed_decides_what_is_sampled_and_torch_is_left_as_it_was() -> None:
    model, batch = tiny_model("llama"), torch.arange(3, 43).view(2, 20)
    before = torch.get_rng_state()
    texts = [roll_out(model, batch, prompt=4, new_tokens=6, seed=seed).batch["input_ids"] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(texts[0], texts[1])
    assert texts[0].tolist() != texts[2].tolist()


def test_every_place_where_the_model_chose_is_marked_and_no_other() -> None:
    found = roll_out(tiny_model("llama"), torch.arange(3, 43).view(2, 20), prompt=4, new_tokens=6, seed=1)
    mask = found.batch["attention_mask"].bool()
    assert found.answered[:, :3].sum() == 0, "a prompt's inner tokens were not chosen by the model"
    assert bool(found.answered[:, 3].all()), "the first new token was chosen at the prompt's last one"
    assert torch.equal(found.answered[:, 3:], mask[:, 3:]), "padding is marked, or a text's end is not"
    counts = found.counts
    assert (counts.texts, counts.answers) == (4, int(found.answered.sum()))
    assert counts.written == int(mask.sum()) - 4 * 4


def test_a_batch_of_padding_alone_has_no_text() -> None:
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    found = roll_out(tiny_model("llama"), batch, prompt=4, new_tokens=6)
    assert found.counts == Counts() and len(found.answered) == 0


def test_an_end_is_learned_from_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The place at which the model ended its text is one at which it chose, though the end itself is left out."""
    model = tiny_model("llama")
    first = int(model(torch.tensor([[3, 4, 5, 6]])).logits[0, -1].argmax())
    monkeypatch.setattr(model.generation_config, "eos_token_id", first)
    found = roll_out(model, torch.tensor([[3, 4, 5, 6]]), prompt=4, new_tokens=6, **GREEDY)
    assert found.answered.tolist() == [[False, False, False, True]]
    assert found.counts == Counts(texts=1, whole=1, written=0, answers=1)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.arange(10)[None], [[0, 1], [5, 6]]),
        ({"input_ids": torch.arange(4)[None]}, [[0, 1]]),
        ({"input_ids": torch.arange(1)[None]}, [[0]]),
        (
            {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])},
            [[3, 4], [6, 7]],
        ),
        (
            {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [0] * 6])},
            [[0, 1]],
        ),
        (
            {"input_ids": torch.arange(12)[None], "position_ids": torch.tensor([[*range(6), 0, *range(5)]])},
            [[0, 1], [6], [7, 8]],
        ),
        (
            {
                "input_ids": torch.arange(6)[None],
                "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
                "position_ids": torch.arange(6)[None],
            },
            [[2, 3]],
        ),
    ],
    ids=["whole", "short", "one token", "left padded", "right padded", "packed", "positions of padding"],
)
def test_prompts_are_of_real_tokens_of_one_document(batch: Any, expected: list[list[int]]) -> None:
    assert prompts_of(batch, 2, 3) == expected


def test_fewer_at_a_time_write_of_the_same_prompts() -> None:
    model, batch = tiny_model("llama"), torch.arange(3, 43).view(2, 20)
    whole, parts = (roll_out(model, batch, prompt=4, new_tokens=6, share=share, **GREEDY) for share in (1.0, 0.4))
    assert torch.equal(whole.batch["input_ids"], parts.batch["input_ids"])


@given(st.lists(st.integers(0, 3), max_size=60))
def test_what_is_left_is_a_beginning_in_which_nothing_is_said_three_times_running(tokens: list[int]) -> None:
    left = without_loop(tokens)
    assert left == tokens[: len(left)]
    for period in range(1, 20):
        rounds = max(3, -(-8 // period))
        for start in range(len(left) - rounds * period + 1):
            run = left[start : start + period]
            assert left[start : start + rounds * period] != run * rounds


@pytest.mark.parametrize(
    ("tokens", "left"),
    [
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], 6),
        ([7, 7, 1, 2, 3, 1, 2, 3, 1, 2, 4], 11),
        ([0] * 7, 7),
        ([0] * 8, 2),
        (list(range(40)) * 3, 120),
        ([9] + list(range(32)) * 3, 65),
    ],
)
def test_the_third_round_is_cut_and_short_rows_are_not(tokens: list[int], left: int) -> None:
    assert len(without_loop(tokens)) == left


def test_texts_grow_when_most_are_whole_and_closer_to_the_original_and_never_beyond_the_longest() -> None:
    length = TextLength(OnPolicyConfig(shortest=4, longest=10), 4)
    for texts, whole, loss, expected in (
        (31, 31, 1.0, 4),
        (1, 1, 33.0, 4),  # a mean of 2, weighted by places: what later ones of this length are held against
        (40, 40, 1.95, 4),  # not improved by more than noise
        (40, 31, 1.0, 4),  # too many that were cut
        (40, 32, 1.9, 8),
        (40, 40, 0.1, 8),  # the first of another length
        (31, 31, 0.09, 8),
        (9, 9, 0.09, 10),
        (40, 40, 1.0, 10),
        (40, 40, 0.5, 10),
    ):
        length.note(texts, whole, loss, 10 * texts)
        assert length.length == expected
        length = TextLength.of(length.settings, json.loads(json.dumps(length.so_far)))
    assert OnPolicyConfig(shortest=4, longest=10).lengths == [4, 8, 10] and OnPolicyConfig(
        shortest=8, longest=8
    ).lengths == [8]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lm", r"'lm' compares labels.*kl and reverse_kl"),
        ("kl + mse", "'mse' compares states.*kl and reverse_kl"),
        ("kl:share=2", r"share=2.0.*above 0 and at most 1"),
        ("kl:begin=1", r"begin=1.0.*below 1"),
        ("kl:temperature=0", r"temperature=0.0.*above 0"),
        ("kl:shortest=64,longest=32", r"longest=32.*1 <= shortest <= longest"),
        ("kl:length=3", r"'length'.*options: share"),
    ],
)
def test_what_is_no_such_training_is_refused(text: str, said: str) -> None:
    with pytest.raises(StreamlineError, match=said):
        parse_on_policy(text)


def test_steps_are_spread_evenly_after_the_beginning() -> None:
    settings = OnPolicyConfig(share=0.25, begin=0.5)
    assert [step for step in range(16) if settings.is_due(step, 16)] == [11, 15]
    assert all(OnPolicyConfig(share=1.0).is_due(step, 9) for step in range(9))


def test_models_that_do_not_write_are_refused() -> None:
    with pytest.raises(StreamlineError, match=r"for embedding.*own text"):
        require_writes(tiny_model("bert"), Task("embedding"), OnPolicyConfig(), [torch.arange(3, 9)[None]])
    model, task = tiny_model("llama"), Task("causal-lm")
    with pytest.raises(StreamlineError, match="no input_ids"):
        require_writes(model, task, OnPolicyConfig(), [{"inputs_embeds": torch.zeros(1, 4, 32)}])
    model.config.max_position_embeddings = 100
    with pytest.raises(StreamlineError, match=r"of 32.*of 128.*160 positions.*100"):
        require_writes(model, task, OnPolicyConfig(), [torch.arange(3, 9)[None]])


def test_what_is_not_text_alone_is_not_written_on() -> None:
    """An image's places would be written on from without the image."""
    batch = {
        "input_ids": torch.arange(3, 11)[None],
        "attention_mask": torch.ones(1, 8),
        "pixel_values": torch.zeros(1, 3, 4, 4),
    }
    with pytest.raises(StreamlineError, match=r"pixel_values.*tokens"):
        require_writes(tiny_model("llama"), Task("causal-lm"), OnPolicyConfig(prompt=2, shortest=2, longest=4), [batch])
    del batch["pixel_values"]
    require_writes(tiny_model("llama"), Task("causal-lm"), OnPolicyConfig(prompt=2, shortest=2, longest=4), [batch])
