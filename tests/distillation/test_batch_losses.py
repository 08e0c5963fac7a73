"""Losses from logits of a few tokens at a time equal those from all logits, and need less memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from streamline_hooks.distillation import DistillationConfig, HealingConfig, Student, TrainingResult, student_of, train
from streamline_hooks.distillation.optimizer import MasterWeights
from streamline_hooks.modeling import find_stack, get_logits
from streamline_hooks.replacements import LinearReplacement, SwiGLUReplacement
from streamline_hooks.testing import tiny_model

VOCABULARY = 64
PARTIAL = HealingConfig("partial", where="after", learning_rate_ratio=0.2)


def padded(lengths: list[int], side: str, seed: int = 0) -> dict[str, Tensor]:
    width = max(lengths)
    ids = torch.randint(3, 60, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    columns = torch.arange(width)
    real = torch.stack([columns < n if side == "right" else columns >= width - n for n in lengths])
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long()}


BATCHES = [padded([7, 11, 4], "right"), padded([5, 9], "left", 1), padded([8], "right", 2)]


def small_parts(monkeypatch: pytest.MonkeyPatch, tokens: int = 5) -> None:
    """Compute the logits of so many tokens at a time."""
    monkeypatch.setattr("streamline_hooks.surgery.token_outputs.WHOLE_LOGIT_BYTES", 0)
    monkeypatch.setattr("streamline_hooks.surgery.token_outputs.LOGIT_BYTES", 4 * VOCABULARY * tokens)


def trained(
    name: str,
    loss: Mapping[str, float],
    healing: HealingConfig | None,
    window: range,
    *,
    teacher: nn.Module | None = None,
    parts: pytest.MonkeyPatch | None = None,
) -> tuple[TrainingResult, dict[str, Tensor], list[int]]:
    """Return the result, the trained weights and the numbers of tokens of each call of the LM head."""
    torch.manual_seed(0)
    model: Any = tiny_model(name)
    replacement = SwiGLUReplacement(32, 16)
    with torch.no_grad():
        for parameter in replacement.parameters():
            parameter.normal_(0.0, 0.1)
    student = student_of(find_stack(model), [(window, replacement)], healing, seed=0)
    if teacher is not None:
        student.teacher = teacher
    counts: list[int] = []
    for head in {model.get_output_embeddings(), student.outside.get("lm_head", model.get_output_embeddings())}:
        head.register_forward_hook(lambda _, args, __: counts.append(args[0].shape[:-1].numel()))
    config = DistillationConfig(loss=loss, validations=2, learning_rate=1e-2, gradient_accumulation_steps=2)
    if parts is not None:
        small_parts(parts)
    result = train(student, BATCHES, BATCHES[:2], config)
    return result, {name: p.detach().clone() for name, p in student.parameters().items()}, counts


CASES: dict[str, tuple[str, dict[str, float], HealingConfig | None, range]] = {
    "kl and text": ("llama", {"kl": 1.0, "lm": 1.0}, PARTIAL, range(2, 4)),
    "all losses": ("llama", {"kl": 1.0, "lm": 0.5, "reverse_kl": 0.3, "mse": 0.1}, PARTIAL, range(2, 4)),
    "text alone": ("llama", {"lm": 1.0}, None, range(2, 4)),
    "states alone": ("llama", {"mse": 1.0}, None, range(2, 4)),
    "window at the end": ("llama", {"kl": 1.0, "relative": 1.0}, None, range(6, 8)),
    "adapters and head": ("llama", {"kl": 1.0}, HealingConfig("lora", head=True, rank=2), range(2, 4)),
    "capped logits, tied head": ("gemma2", {"kl": 1.0, "lm": 1.0}, PARTIAL, range(2, 4)),
    "learned positions": ("opt", {"kl": 1.0, "lm": 1.0}, PARTIAL, range(1, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_few_tokens_train_the_same_weights(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, weights, whole = trained(*CASES[case])
    result, found, counts = trained(*CASES[case], parts=monkeypatch)
    assert max(whole) == 33 and max(counts[2:]) <= 8  # 8 tokens are compared with a forward at the start
    assert max(counts[-3:]) <= 5
    for row, other in zip(result.history, expected.history, strict=True):
        assert [row[key] for key in ("step", "tokens", "distance", "validated")] == [
            pytest.approx(other[key], rel=1e-5) for key in ("step", "tokens", "distance", "validated")
        ]
    losses = [[row["loss"] for row in done.history[1:]] for done in (expected, result)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert result.history[-1]["distance"] != pytest.approx(result.history[0]["distance"], rel=1e-3)
    for name, value in weights.items():
        if not name.endswith("k_proj.bias"):  # the loss does not depend on it, so its gradient is rounding
            torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5)
    assert ("lm_head.0.weight" in weights) == (case == "adapters and head")


def test_another_teacher_gives_its_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher: Any = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
    case = "llama", {"kl": 1.0}, None, range(2, 4)
    own, *_ = trained(*case)
    expected, weights, _ = trained(*case, teacher=teacher)
    result, found, _ = trained(*case, teacher=teacher, parts=monkeypatch)
    assert expected.distance_before != pytest.approx(own.distance_before, rel=1e-2)
    assert result.distance_before == pytest.approx(expected.distance_before, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5)


def test_logits_that_depend_on_other_tokens_need_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda _, __, output: output + output.mean(dim=1, keepdim=True))
    counts: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: counts.append(len(args[0])))
    small_parts(monkeypatch)
    student = Student(model, [(range(2, 4), LinearReplacement(32))])
    train(student, BATCHES, BATCHES[:1], DistillationConfig(validations=1))
    assert set(counts[-4:]) == {1}  # one sequence at a time instead


def test_parts_have_at_most_the_tokens_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of GPT-2 is run with positions, of which there are as many as the model has."""
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=12, n_embd=32, n_layer=6, n_head=2)
    small_parts(monkeypatch, tokens=1000)
    model = GPT2LMHeadModel(config).eval()
    counts: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: counts.append(args[0].shape[:-1].numel()))
    student = Student(model, [(range(2, 4), LinearReplacement(32))])
    train(student, BATCHES, BATCHES[:1], DistillationConfig(validations=1))
    assert 8 < max(counts[-4:]) <= 11


def test_gradients_of_a_16_bit_head_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    collect = MasterWeights.collect

    def counting(self: MasterWeights) -> None:
        collected.append(sum(p.grad is not None for p in self.parameters.values()))
        collect(self)

    monkeypatch.setattr(MasterWeights, "collect", counting)
    small_parts(monkeypatch)
    model = tiny_model("llama").to(torch.bfloat16)
    healing = HealingConfig("partial", where="last", count=1, head=True)
    student = student_of(find_stack(model), [(range(2, 4), LinearReplacement(32).bfloat16())], healing)
    train(student, BATCHES[:1], BATCHES[:1], DistillationConfig(validations=1, loss={"kl": 1.0}))
    parts = -(-22 // 5)
    assert collected[:parts] == [1] * parts and collected[parts] > 1  # the head, then the blocks


def test_a_student_that_runs_in_its_own_way_needs_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Louder(Student):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            output, states = super().run(*args, **kwargs)
            return (None if output is None else 2 * get_logits(output)), states

    results = []
    for is_split in (False, True):
        if is_split:
            small_parts(monkeypatch)
        student = Louder(tiny_model("llama"), [(range(2, 4), LinearReplacement(32))])
        results.append(train(student, BATCHES, BATCHES[:1], DistillationConfig(validations=1)).distance_before)
    assert results[1] == pytest.approx(results[0], rel=1e-5)
