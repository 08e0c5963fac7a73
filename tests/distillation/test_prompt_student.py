"""Trained prompt skipping: the loss and gradients of a full forward pass in which the skipped outputs are replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import DistillationConfig, LayerSurgeon, StreamlineError
from streamline_hooks.distillation import (
    PromptSkipStudent,
    TrainingCallback,
    TrainingProgress,
    prompt_of,
    skips_any,
    train,
)
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import PromptSkip
from streamline_hooks.testing import tiny_model
from tests.prompt_skips import prompt_marks, random_maps, replaced_outputs, with_positions

WINDOW, WIDTH, VOCABULARY = range(4, 7), 32, 60


def batch(rows: int = 2, length: int = 12, prompt: int = 6, seed: int = 0, padding: str = "") -> dict[str, Tensor]:
    """Sequences whose first tokens are the prompt; with padding, the second row has two tokens fewer."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), ids.masked_fill(torch.arange(length) < prompt, -100)
    if padding:
        gone = slice(0, 2) if padding == "left" else slice(-2, None)
        mask[1, gone] = 0
        labels[1, gone] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCHES = [batch(seed=seed) for seed in range(12)]
VALIDATION = [batch(seed=100), batch(seed=101, prompt=4)]
QUICK = DistillationConfig(validations=2, learning_rate=3e-3, epochs=2)


def maps(count: int = len(WINDOW)) -> list[nn.Module | None]:
    return [LinearReplacement.from_map(0.05 * torch.eye(WIDTH)) for _ in range(count)]


def student_of(
    model: nn.Module, modules: list[nn.Module | None] | None = None, last_tokens: int = 1
) -> PromptSkipStudent:
    return PromptSkipStudent(model, WINDOW, maps() if modules is None else modules, last_tokens=last_tokens)


def expected_marks(inputs: dict[str, Tensor], last_tokens: int = 1) -> Tensor:
    """The tokens that skip: all of the prompt except the first real and the last ones."""
    scored = inputs["labels"] != -100
    rows = []
    for real, labelled in zip(inputs["attention_mask"].bool(), scored, strict=True):
        first, start = int(real.int().argmax()), int(labelled.int().argmax())
        rows.append(torch.tensor([first < k < start - last_tokens for k in range(len(real))]))
    return torch.stack(rows)


def kl_by_reference(model: Any, modules: Any, inputs: dict[str, Tensor], last_tokens: int = 1) -> tuple[Tensor, int]:
    """The summed KL of the tokens from the last one of the prompt on, and their number, by a full forward pass."""
    given = with_positions(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    scored = inputs["labels"] != -100
    scored[:, :-1] |= scored[:, 1:]  # the last token of the prompt predicts the first label
    with torch.no_grad():
        reference = model(**given).logits[scored].log_softmax(dim=-1)
    with replaced_outputs(model, WINDOW, modules, expected_marks(inputs, last_tokens)):
        logits = model(**given).logits[scored].log_softmax(dim=-1)
    return (reference.exp() * (reference - logits)).sum(), int(scored.sum())


@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize(
    ("name", "last_tokens"), [("llama", 1), ("llama", 2), ("gpt2", 1), ("gemma3", 2), ("qwen3_moe", 1)]
)
def test_the_validated_distance_is_that_of_a_full_forward_pass(name: str, last_tokens: int, padding: str) -> None:
    model, modules = tiny_model(name), random_maps(len(WINDOW), WIDTH)
    inputs = batch(padding=padding)
    total, count = kl_by_reference(model, modules, inputs, last_tokens)
    result = train(student_of(model, modules, last_tokens), BATCHES[:1], [inputs], DistillationConfig(validations=1))
    assert result.distance_before == pytest.approx(float(total.detach()) / count, rel=1e-3)
    assert result.distance_before > 1e-3


def test_a_step_uses_the_gradient_of_a_full_forward_pass() -> None:
    model, inputs = tiny_model("llama"), batch(padding="left")
    seen: list[list[Tensor]] = []
    for way in ("reference", "student"):
        modules = random_maps(len(WINDOW), WIDTH)
        parameters = list(nn.ModuleList(modules).parameters())
        if way == "reference":
            total, count = kl_by_reference(model, modules, inputs)
            (total / count).backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            seen.append([-g.sign() * (g.abs() > 1e-5) for g in gradients])
        else:  # the first step of AdamW has the sign of the gradient
            before = [p.detach().clone() for p in parameters]
            config = DistillationConfig(validations=1, weight_decay=0.0, max_grad_norm=0, warmup_ratio=0)
            last = Last()
            train(student_of(model, modules), [inputs], [inputs], config, callbacks=[last.of(parameters)])
            seen.append([(p - b).sign() for p, b in zip(last.values, before, strict=True)])
    pairs = [(a, b) for a, b in zip(*seen, strict=True) if bool(a.any())]
    assert pairs and all(torch.equal(a[a != 0], b[a != 0]) for a, b in pairs)


class Last(TrainingCallback):
    """Copies the parameters after a step, before the best ones are restored."""

    def of(self, parameters: list[nn.Parameter]) -> Last:
        self.parameters = parameters
        return self

    def on_step_end(self, progress: TrainingProgress) -> None:
        self.values = [parameter.detach().clone() for parameter in self.parameters]


def test_training_lowers_the_distance_and_changes_only_the_maps() -> None:
    model, modules = tiny_model("llama"), maps()
    before, trainable = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    weights = [p.detach().clone() for p in nn.ModuleList(modules).parameters()]
    result = train(student_of(model, modules), BATCHES, VALIDATION, QUICK)
    assert result.distance < 0.95 * result.distance_before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trainable and "generate" not in vars(model)
    assert not any(torch.equal(p, w) for p, w in zip(nn.ModuleList(modules).parameters(), weights, strict=True))
    total, count = (sum(x) for x in zip(*(kl_by_reference(model, modules, b) for b in VALIDATION), strict=True))
    assert result.distance == pytest.approx(float(total.detach()) / count, rel=1e-3)
    ids = BATCHES[0]["input_ids"]
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}
    with PromptSkip(model, WINDOW, modules, last_tokens=1):
        (logits,) = model.generate(ids, max_new_tokens=1, **options).logits
    with torch.no_grad(), replaced_outputs(model, WINDOW, modules, prompt_marks({"input_ids": ids})):
        assert torch.allclose(logits, model(ids).logits[:, -1], atol=1e-5)


def test_the_head_and_the_blocks_run_only_for_the_continuation() -> None:
    model, seen = tiny_model("llama"), {"head": set(), "mlp": set()}
    model.lm_head.register_forward_pre_hook(lambda _, args: seen["head"].add(args[0].shape[1]))
    mlp = model.model.layers[WINDOW.start].mlp
    mlp.register_forward_pre_hook(lambda _, args: seen["mlp"].add((args[0].shape[1], torch.is_grad_enabled())))
    student = student_of(model)
    seen["mlp"].clear()  # of the probe
    train(student, BATCHES[:2], BATCHES[:1], QUICK)
    last = BATCHES[0]["input_ids"].shape[1]
    # The first of 12 tokens, and from the last one of the prompt of 6 on.
    assert seen["head"] == {7} and {count for count, trains in seen["mlp"] if trains} == {8}
    assert {count for count, trains in seen["mlp"] if not trains} == {last, 8}  # the teacher runs all of them


def test_one_map_for_several_blocks_is_trained_once_per_step() -> None:
    model, inputs = tiny_model("llama"), batch()
    (shared,) = random_maps(1, WIDTH)
    assert shared is not None
    modules = [shared, shared, None]
    total, count = kl_by_reference(model, modules, inputs)
    result = train(student_of(model, modules), [inputs], [inputs], DistillationConfig(validations=1))
    assert result.distance_before == pytest.approx(float(total.detach()) / count, rel=1e-3)
    assert len(student_of(model, modules).parameters()) == len(list(shared.parameters()))


def test_batches_in_which_no_token_skips_give_no_gradient_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    model, modules, whole = tiny_model("llama"), maps(), batch(seed=3)
    whole["labels"] = whole["input_ids"]
    short = {name: value[:, :1] for name, value in batch(seed=4).items()}
    result = train(student_of(model, modules), [BATCHES[0], whole, short, BATCHES[1]], VALIDATION, QUICK)
    assert result.steps == 8 and result.distance < result.distance_before and not result.stopped
    warnings = [record.message for record in caplog.records if "trains nothing" in record.message]
    assert len(warnings) == 1 and "more than 2 tokens" in warnings[0]
    before = [p.detach().clone() for p in nn.ModuleList(modules).parameters()]
    train(student_of(model, modules), [whole], VALIDATION, DistillationConfig(validations=1, weight_decay=0.0))
    assert all(torch.equal(p, b) for p, b in zip(nn.ModuleList(modules).parameters(), before, strict=True))


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, state: Tensor) -> Tensor:
        return state + self.dropout(self.inner(state))


def test_dropout_of_maps_acts_in_steps_only() -> None:
    modules: list[nn.Module | None] = [WithDropout() for _ in WINDOW]
    seen: list[tuple[bool, bool]] = []
    for module in modules:
        assert module is not None
        module.register_forward_hook(lambda m, args, output: seen.append((m.training, torch.is_grad_enabled())))
    result = train(student_of(tiny_model("llama"), modules), BATCHES, VALIDATION, QUICK, callbacks=[Stop()])
    assert result.interrupted and set(seen) == {(True, True), (False, False)}
    assert not any(part.training for module in modules if module is not None for part in module.modules())


class Stop(TrainingCallback):
    def on_step_end(self, progress: TrainingProgress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt


def test_an_interrupted_run_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = maps(), maps()
    train(student_of(tiny_model("llama"), whole), BATCHES, VALIDATION, QUICK)
    file = tmp_path / "training"
    first = train(
        student_of(tiny_model("llama"), resumed), BATCHES, VALIDATION, QUICK, checkpoint_file=file, callbacks=[Stop()]
    )
    assert first.interrupted and first.steps < 24
    again = maps()
    train(student_of(tiny_model("llama"), again), BATCHES, VALIDATION, QUICK, checkpoint_file=file, resume=True)
    pairs = zip(nn.ModuleList(whole).parameters(), nn.ModuleList(again).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    one, two = [*maps(1), None, None], [None, None, *maps(1)]
    train(student_of(tiny_model("llama"), one), BATCHES, VALIDATION, QUICK, checkpoint_file=tmp_path / "one")
    with pytest.raises(StreamlineError, match="another training run"):
        student = student_of(tiny_model("llama"), two)
        train(student, BATCHES, VALIDATION, QUICK, checkpoint_file=tmp_path / "one", resume=True)
    for window, last_tokens in ((range(3, 6), 1), (WINDOW, 2)):
        other = PromptSkipStudent(tiny_model("llama"), window, maps(), last_tokens=last_tokens)
        with pytest.raises(StreamlineError, match="another training run"):
            train(other, BATCHES, VALIDATION, QUICK, checkpoint_file=file, resume=True)


@pytest.mark.parametrize(
    ("labels", "mask", "last_tokens", "expected"),
    [
        ([-100, -100, -100, 9, 9], [1, 1, 1, 1, 1], 1, [1, 1, 0, 0, 0]),
        ([-100, -100, -100, 9, 9], [1, 1, 1, 1, 1], 2, [1, 0, 0, 0, 0]),
        ([-100, -100, -100, -100, 9], [1, 1, 1, 1, 1], 3, [1, 0, 0, 0, 0]),
        ([-100, -100, -100, 9, 9], [1, 1, 1, 1, 1], 9, [0, 0, 0, 0, 0]),
        ([-100, -100, -100, -100, 9], [0, 1, 1, 1, 1], 2, [0, 1, 0, 0, 0]),
        ([-100, 9, 9, -100, -100], [1, 1, 1, 1, 1], 2, [0, 0, 1, 0, 0]),
        ([9, 9, 9, 9, 9], [1, 1, 1, 1, 1], 1, [0, 0, 0, 0, 0]),
        ([-100, -100, 9, -100, -100], [1, 1, 1, 0, 0], 1, [1, 0, 0, 0, 0]),  # padding at the end
        ([-100, -100, -100, -100, 9], [0, 0, 1, 1, 1], 1, [0, 0, 1, 0, 0]),  # padding at the start
        ([-100, 9, 9, -100, -100], [1, 1, 1, 1, 1], 1, [0, 0, 1, 1, 0]),  # a second turn of a conversation
    ],
)
def test_the_prompt_is_what_is_followed_by_a_token_without_label(
    labels: list[int], mask: list[int], last_tokens: int, expected: list[int]
) -> None:
    inputs = {"input_ids": torch.full((1, 5), 9), "attention_mask": torch.tensor([mask])}
    assert prompt_of({**inputs, "labels": torch.tensor([labels])}, last_tokens).int().tolist() == [expected]


def test_documents_of_a_packed_row_have_prompts_of_their_own() -> None:
    """Neither the last token of an answer nor the first of the next document skips blocks."""
    labels = torch.tensor([[-100, -100, -100, 9, 9, -100, -100, -100, -100, 9]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    batch = {"input_ids": torch.full((1, 10), 9), "labels": labels, "position_ids": positions}
    assert prompt_of(batch, 1).int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 1, 0, 0]]
    assert prompt_of(batch, 2).int().tolist() == [[1, 0, 0, 0, 0, 1, 1, 0, 0, 0]]
    alone = {name: value[:, :5] for name, value in batch.items()}
    assert prompt_of(alone, 1).int().tolist() == [[1, 1, 0, 0, 0]]
    short = torch.tensor([[-100, -100, 9, 9, 9]]).repeat(1, 2)
    assert skips_any(batch, 1) and not skips_any({**batch, "labels": short}, 1)  # only first tokens are left


def without_labels() -> None:
    bare = {"input_ids": BATCHES[0]["input_ids"]}
    train(student_of(tiny_model("llama")), [bare], [bare], QUICK)


def with_a_tensor() -> None:
    prompt_of(BATCHES[0]["input_ids"])


def with_states() -> None:
    train(student_of(tiny_model("llama")), BATCHES, VALIDATION, DistillationConfig(loss={"mse": 1.0}))


def with_weights_of_the_model() -> None:
    model = tiny_model("llama")
    student_of(model, [model.model.layers[0].self_attn.q_proj, None, None])


def inside_the_with_statement() -> None:
    model = tiny_model("llama")
    with PromptSkip(model, WINDOW, maps()) as skip:
        skip.resume(torch.zeros(1, 4, WIDTH), torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4))


def inside_a_surgeon() -> None:
    model = tiny_model("llama")
    skip = PromptSkip(model, WINDOW, maps())
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.remove([0])
        skip.resume(torch.zeros(1, 4, WIDTH), torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4))


REFUSED: dict[Callable[[], None], str] = {
    without_labels: "no labels.*Add them",
    with_a_tensor: "no labels",
    with_states: "hidden states.*Use kl",
    with_weights_of_the_model: "shares weights",
    inside_the_with_statement: "closed PromptSkip",
    inside_a_surgeon: "PromptSkip.resume.*surgeon|open",
    lambda: student_of(tiny_model("llama"), [None, None, None]) and None: "no parameter to train",  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_what_cannot_be_trained_is_refused(case: Callable[[], None]) -> None:
    with pytest.raises(StreamlineError, match=REFUSED[case]):
        case()
