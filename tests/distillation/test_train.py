"""Training a repair: it helps, it is the same after an interruption, and nothing is lost on the way."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from streamline_hooks import CompressionConfig, StreamlineError, compress, distillation
from streamline_hooks.cli import parse_healing, parse_loss
from streamline_hooks.core import HardwareConfig
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.losses import Objective
from streamline_hooks.distillation.optimizer import TrainingSchedule
from streamline_hooks.distillation.progress import TrainingCallback, TrainingResult
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.teacher_cache import cache_teacher_states
from streamline_hooks.distillation.train import train
from streamline_hooks.distillation.training_file import read_training_file, write_training_file
from streamline_hooks.modeling import find_stack
from streamline_hooks.replacements import LinearReplacement, SwiGLUReplacement
from streamline_hooks.testing import tiny_model
from tests.training_callbacks import BeforeSteps, RaiseAt


def texts(seed: int, count: int, rows: int = 4, width: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 60, (rows, width), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


BATCHES, VALIDATION = texts(0, 6), texts(1, 2)
QUICK = DistillationConfig(epochs=2, learning_rate=1e-2, validations=3)


def student_of(model: nn.Module, dropout: float = 0.0) -> tuple[Student, LinearReplacement]:
    module = LinearReplacement(32)
    if dropout:
        module.projection = nn.Sequential(nn.Dropout(dropout), module.projection)
    return Student(model, [(range(2, 4), module)]), module


def weights(student: Student) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in student.parameters().values()]


@pytest.mark.sample(2)
@pytest.mark.parametrize("text", ["kl", "mse", "relative", "kl + 0.5*lm", "cosine + relative", "lm"])
def test_every_objective_falls_and_the_best_weights_stay(text: str) -> None:
    student, _ = student_of(tiny_model("llama"))
    settings = replace(QUICK, loss=parse_loss(text), epochs=4, validations=6)
    trained = train(student, BATCHES, VALIDATION, settings)
    losses = [row["loss"] for row in trained.history[1:]]
    assert losses[-1] < losses[0]
    assert (trained.steps, trained.tokens) == (24, 24 * 48)
    best = min(trained.history, key=lambda row: row["validated"])
    assert (trained.distance, trained.best_step) == (best["distance"], best["step"])
    assert best["validated"] < trained.history[0]["validated"]
    assert all((row["validated"] == row["distance"]) is ("lm" not in text) for row in trained.history)
    again = train(student, BATCHES, VALIDATION, replace(settings, learning_rate=1e-30))
    assert again.distance_before == pytest.approx(trained.distance, rel=1e-6), (
        "the modules do not hold the best weights"
    )


@pytest.mark.parametrize(("text", "weight"), [("lm", 0.0), ("2*kl + lm", 2.0), ("mse + lm", 1.0)])
def test_weights_that_learn_a_text_are_kept_by_that_too(text: str, weight: float) -> None:
    """Else a text that the original did not know would be learned in vain: each step goes away from the original."""
    model = tiny_model("llama")
    objective = Objective(parse_loss(text))
    student, _ = student_of(model)
    rows = torch.full((4, 12), 7)
    same = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)}]
    trained = train(student, same, same, replace(QUICK, loss=objective.weights, epochs=8, validations=4))
    with student.applied():
        logits = model(rows).logits[:, :-1].flatten(0, 1)
    own = nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item() / rows.numel()
    best = next(row for row in trained.history if row["step"] == trained.best_step)
    assert best["validated"] == pytest.approx(weight * trained.distance + own, rel=1e-4)
    assert trained.best_step and best["validated"] == min(row["validated"] for row in trained.history)
    if text == "lm":
        assert trained.distance > trained.distance_before and trained.warning == ""


def test_tokens_without_a_label_are_not_learned() -> None:
    """As the question of a conversation is not, or an image's places; the labels are those of the tokens themselves."""
    model, objective = tiny_model("llama"), Objective({"lm": 1.0})
    (batch,) = texts(3, 1)
    labels = batch["input_ids"].clone()
    labels[:, :7], labels[1, 9] = -100, -100
    labeled = [{**batch, "labels": labels}]
    trained = train(student_of(model)[0], labeled, labeled, replace(QUICK, loss=objective.weights, learning_rate=1e-30))
    student, _ = student_of(model)
    with torch.no_grad(), student.applied():
        logits = model(batch["input_ids"]).logits[:, :-1]
    own = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / labels.numel()
    assert trained.history[0]["validated"] == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize(("text", "weight"), [("reverse_kl", 0.0), ("kl + 0.5*reverse_kl", 1.0)])
def test_weights_are_kept_by_the_divergence_that_is_minimized(text: str, weight: float) -> None:
    model = tiny_model("llama")
    objective = Objective(parse_loss(text))
    student, _ = student_of(model)
    trained = train(student, BATCHES, VALIDATION, replace(QUICK, loss=objective.weights, epochs=2, validations=3))
    ids, reverse = torch.cat([batch["input_ids"] for batch in VALIDATION]), 0.0
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        with student.applied():
            q = model(ids).logits.double().log_softmax(-1)
    reverse = float((q.exp() * (q - p)).sum(-1).mean())
    best = next(row for row in trained.history if row["step"] == trained.best_step)
    assert best["validated"] == pytest.approx(
        weight * trained.distance + objective.weights["reverse_kl"] * reverse, rel=1e-4
    )
    assert best["validated"] == min(row["validated"] for row in trained.history) != trained.distance


def test_the_best_weights_are_a_copy_that_later_steps_do_not_touch() -> None:
    student, module = student_of(tiny_model("llama"))
    trained = train(student, BATCHES, VALIDATION, replace(QUICK, learning_rate=1.0, warmup_ratio=0.0))
    assert trained.best_step == 0, "a rate that spoils everything was meant to"
    assert not module.projection.weight.any(), "the weights before the first step are not back"
    assert trained.history[-1]["distance"] > trained.distance


def test_autocast_is_for_the_products_of_both_and_no_weight_changes_its_precision() -> None:
    """The original's states on the calibration text are made in it; what validates is not."""
    model = tiny_model("llama")
    student, _ = student_of(model)
    seen: dict[str, set[torch.dtype]] = {"before the change": set(), "after it": set()}
    for where, k in (("before the change", 0), ("after it", 5)):
        model.model.layers[k].mlp.down_proj.register_forward_hook(lambda m, a, out, w=where: seen[w].add(out.dtype))
    settings = replace(QUICK, epochs=4)
    trained = train(student, BATCHES, VALIDATION, settings, hardware=HardwareConfig(autocast="bfloat16"))
    assert trained.distance < trained.distance_before
    assert seen["before the change"] == {torch.bfloat16, torch.float32} <= seen["after it"]
    assert all(p.dtype == torch.float32 for p in [*model.parameters(), *student.parameters().values()])
    plain, _ = student_of(tiny_model("llama"))
    train(plain, BATCHES, VALIDATION, settings)
    assert not torch.equal(weights(student)[0], weights(plain)[0])
    assert torch.allclose(weights(student)[0], weights(plain)[0], atol=0.05)


@pytest.mark.parametrize("where", ["weights", "autocast"])
def test_float16_is_refused_in_which_small_gradients_become_0(where: str) -> None:
    model, module = tiny_model("llama"), LinearReplacement(32)
    if where == "weights":
        model.half()
    hardware = HardwareConfig(autocast="float16" if where == "autocast" else None)
    with pytest.raises(StreamlineError, match="float16, in which small gradients become 0.*bfloat16"):
        train(Student(model, [(range(2, 4), module)]), BATCHES, VALIDATION, QUICK, hardware=hardware)


def test_compress_refuses_float16_before_anything_runs() -> None:
    config = CompressionConfig(remove=2, distillation=QUICK, hardware=HardwareConfig(autocast="float16"))
    model, ran = tiny_model("llama"), []
    model.register_forward_hook(lambda *_: ran.append(True))
    with pytest.raises(StreamlineError, match="autocast is float16"):
        compress(model, BATCHES, config)
    assert not ran


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    found = []
    for seed in (0, 0, 1):
        student, _ = student_of(tiny_model("llama"), dropout=0.2)
        train(student, BATCHES, VALIDATION, replace(QUICK, seed=seed))
        found.append(weights(student))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_each_epoch_sees_every_batch_once_in_an_order_of_its_own() -> None:
    seen: list[int] = []
    recorder = BeforeSteps(lambda progress: seen.extend(progress.batches))
    settings = replace(QUICK, gradient_accumulation_steps=4)
    train(student_of(tiny_model("llama"))[0], BATCHES, VALIDATION, settings, callbacks=[recorder])
    assert [sorted(seen[:6]), sorted(seen[6:])] == [list(range(6))] * 2
    assert seen[:6] != seen[6:]


def test_accumulated_batches_are_one_larger_batch() -> None:
    whole = {name: torch.cat([batch[name] for batch in BATCHES]) for name in BATCHES[0]}
    found = []
    for batches, accumulation in ((BATCHES, 6), ([whole], 1)):
        student, _ = student_of(tiny_model("llama"))
        train(
            student, batches, VALIDATION, replace(QUICK, gradient_accumulation_steps=accumulation, learning_rate=1e-3)
        )
        found.append(weights(student))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    assert any(bool(a.any()) for a in found[0])


def test_padding_is_not_trained_on() -> None:
    found = []
    for pad in (0, 3):
        student, _ = student_of(tiny_model("llama"))
        padded = [{name: nn.functional.pad(value, (pad, 0)) for name, value in batch.items()} for batch in BATCHES]
        trained = train(student, padded, VALIDATION, replace(QUICK, loss={"kl": 1.0, "lm": 1.0, "mse": 1.0}))
        found.append((trained.tokens, weights(student)))
    assert found[0][0] == found[1][0]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0][1], found[1][1], strict=True))


class Killed(BaseException):
    """What no training catches."""


@pytest.mark.sample(1)
@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_training_that_was_killed_goes_on_to_the_same_weights(step: int, tmp_path: Path) -> None:
    settings = replace(QUICK, checkpoint_minutes=0.0, gradient_accumulation_steps=1)
    whole, _ = student_of(tiny_model("llama"), dropout=0.2)
    wanted = train(whole, BATCHES, VALIDATION, settings)

    student, _ = student_of(tiny_model("llama"), dropout=0.2)
    with pytest.raises(Killed):
        train(
            student,
            BATCHES,
            VALIDATION,
            settings,
            checkpoint_file=tmp_path / "training",
            callbacks=[RaiseAt(step, Killed)],
        )
    fresh, _ = student_of(tiny_model("llama"), dropout=0.2)
    torch.rand(7)  # another process is elsewhere in its random numbers
    found = train(fresh, BATCHES, VALIDATION, settings, resume=True, checkpoint_file=tmp_path / "training")
    assert all(torch.equal(a, b) for a, b in zip(weights(fresh), weights(whole), strict=True))
    assert [row["distance"] for row in found.history] == [row["distance"] for row in wanted.history]
    assert [row["loss"] for row in found.history] == [row["loss"] for row in wanted.history]


_SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from dataclasses import replace
from tests.distillation.test_train import BATCHES, QUICK, VALIDATION, BeforeSteps, student_of
from tests.distillation.test_train import tiny_model, train, weights
torch.set_num_threads(1)
student, _ = student_of(tiny_model("llama"), dropout=0.2)
def dies(progress):
    if progress.step == {dies}:
        os.kill(os.getpid(), signal.SIGKILL)
settings = replace(QUICK, checkpoint_minutes=0.0)
callbacks = [BeforeSteps(dies)]
train(student, BATCHES, VALIDATION, settings, checkpoint_file={file!r}, callbacks=callbacks, resume={resume})
torch.save(weights(student), {out!r})
"""


@pytest.mark.long
@pytest.mark.slow
def test_kill_minus_nine_and_another_process(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    given = {"tests": str(root), "file": str(tmp_path / "training")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

    def run(**more: Any) -> int:
        script = _SCRIPT.format(**given, **more)
        return subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, check=False).returncode

    assert run(dies=99, resume=False, out=str(tmp_path / "whole.pt")) == 0
    (tmp_path / "training").unlink()
    assert run(dies=7, resume=False, out=str(tmp_path / "never.pt")) == -signal.SIGKILL
    assert run(dies=99, resume=True, out=str(tmp_path / "resumed.pt")) == 0
    whole, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "resumed"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_ctrl_c_keeps_the_best_and_can_go_on(tmp_path: Path, log_messages: list[str]) -> None:
    settings = replace(QUICK, checkpoint_minutes=60.0)
    whole, _ = student_of(tiny_model("llama"))
    train(whole, BATCHES, VALIDATION, settings)
    student, _ = student_of(tiny_model("llama"))
    interrupted = settings
    trained = train(
        student,
        BATCHES,
        VALIDATION,
        interrupted,
        checkpoint_file=tmp_path / "training",
        callbacks=[RaiseAt(6, KeyboardInterrupt)],
    )
    assert trained.stopped == "interrupted after step 6"
    (warning,) = log_messages
    assert re.search(rf"interrupted after step 6.*of step {trained.best_step}\.", warning)
    train(student, BATCHES, VALIDATION, settings, resume=True, checkpoint_file=tmp_path / "training")
    assert all(torch.equal(a, b) for a, b in zip(weights(student), weights(whole), strict=True))


def test_a_loss_that_is_no_number_stops_with_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, module = student_of(tiny_model("llama"))
    make = Objective.output_loss
    calls: list[int] = []

    def spoilt(self: Any, *given: Any) -> torch.Tensor:
        calls.append(1)
        return make(self, *given) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(Objective, "output_loss", spoilt)
    settings = replace(QUICK, validations=12)
    trained = train(student, BATCHES, VALIDATION, settings, checkpoint_file=tmp_path / "training")
    assert "loss of step 6 is nan" in trained.stopped
    assert (trained.steps, trained.history[-1]["step"]) == (5, 5)
    assert module.projection.weight.isfinite().all()
    assert not (tmp_path / "training").exists(), "what ended badly is not to be gone on from"


def test_out_of_memory_halves_the_batch_and_leaves_the_steps_as_they_are(
    monkeypatch: pytest.MonkeyPatch, log_messages: list[str]
) -> None:
    whole, _ = student_of(tiny_model("llama"))
    train(whole, BATCHES, VALIDATION, QUICK)
    run = Student.run

    def short_of_memory(self: Any, entrance: torch.Tensor, *given: Any, **options: Any) -> Any:
        output = run(self, entrance, *given, **options)
        if len(entrance) > 1 and torch.is_grad_enabled():
            raise torch.cuda.OutOfMemoryError("planted")
        return output

    monkeypatch.setattr(Student, "run", short_of_memory)
    student, _ = student_of(tiny_model("llama"))
    trained = train(student, BATCHES, VALIDATION, QUICK)
    assert [line.partition(":")[2].split(" sequences")[0] for line in log_messages] == [
        " continuing with 2",
        " continuing with 1",
    ]
    assert trained.steps == 12
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights(student), weights(whole), strict=True))


def test_out_of_memory_in_a_validation_halves_it_too(log_messages: list[str]) -> None:
    whole, _ = student_of(tiny_model("llama"))
    expected = train(whole, BATCHES, VALIDATION, QUICK)
    student, module = student_of(tiny_model("llama"))

    def short_of_memory(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 2 and not torch.is_grad_enabled():
            raise torch.cuda.OutOfMemoryError("planted")

    module.register_forward_pre_hook(short_of_memory)
    trained = train(student, BATCHES, VALIDATION, QUICK)
    (warning,) = log_messages
    assert "Out of memory" in warning and "2 sequences" in warning
    assert [row["distance"] for row in trained.history] == pytest.approx(
        [r["distance"] for r in expected.history], rel=1e-4
    )


def test_patience_ends_what_gets_no_better() -> None:
    student, _ = student_of(tiny_model("llama"))
    settings = replace(QUICK, learning_rate=1.0, warmup_ratio=0.0, patience=2, validations=12)
    trained = train(student, BATCHES, VALIDATION, settings)
    assert "no lower for 2 validations" in trained.stopped
    assert trained.steps == 2


def test_bfloat16_products_train_too() -> None:
    student, module = student_of(tiny_model("llama"))
    trained = train(
        student, BATCHES, VALIDATION, replace(QUICK, epochs=4), hardware=HardwareConfig(autocast="bfloat16")
    )
    assert trained.distance < trained.distance_before
    assert module.projection.weight.dtype == torch.float32


@pytest.mark.long
def test_weights_in_half_precision_are_trained_by_steps_that_they_cannot_hold(tmp_path: Path) -> None:
    """At a rate of 1e-4 a bfloat16 of 1 would stay what it is at each step, and at 300 of them."""
    model = tiny_model("llama").to(torch.bfloat16)
    module = SwiGLUReplacement(32, 32).to(torch.bfloat16)
    nn.init.normal_(module.down_proj.weight, std=0.1)
    norm, before = module.norm, module.norm.weight.detach().clone()
    settings = replace(QUICK, epochs=50, learning_rate=1e-4, validations=1, min_lr_ratio=1.0, weight_decay=0.0)
    student = Student(model, [(range(2, 4), module)])
    file = tmp_path / "training"
    trained = train(student, BATCHES, VALIDATION, settings, checkpoint_file=file)
    assert norm.weight.dtype == torch.bfloat16
    tensors, _ = read_training_file(file)
    master = next(value for name, value in tensors.items() if name.endswith("norm.weight") and "parameter" in name)
    assert master.dtype == torch.float32
    assert (master - before).abs().max() > 3e-3
    if trained.best_step:
        assert torch.equal(norm.weight, master.to(torch.bfloat16))
        assert not torch.equal(norm.weight, before)


def test_the_original_is_as_it_was(tmp_path: Path) -> None:
    model: Any = tiny_model("llama").train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student, _ = student_of(model)
    train(student, BATCHES, VALIDATION, QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_states_that_are_known_already_give_the_same_and_others_are_refused() -> None:
    model = tiny_model("llama")
    student, _ = student_of(model)
    train(student, BATCHES, VALIDATION, QUICK)
    other, _ = student_of(model)
    with cache_teacher_states(model, BATCHES, 2) as other.teacher_cache:
        train(other, BATCHES, VALIDATION, QUICK)
        assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(student), strict=True))
        with pytest.raises(StreamlineError, match=r"block 2 .* 6 batches.*Expected block 2,.*\[\].*5 batches"):
            train(other, BATCHES[:5], VALIDATION, QUICK)
        with pytest.raises(StreamlineError, match=r"Expected block 2,.*\[range\(2.*4\)\].*6 batches"):
            train(other, BATCHES, VALIDATION, replace(QUICK, loss={"mse": 1.0}))
        with pytest.raises(StreamlineError, match="Expected block 3"):
            later = Student(model, [(range(3, 4), LinearReplacement(32))])
            later.teacher_cache = other.teacher_cache
            train(later, BATCHES, VALIDATION, QUICK)
        taught = Student(model, [(range(2, 4), LinearReplacement(32))], teacher=tiny_model("llama"))
        for wrong in (student_of(tiny_model("llama"))[0], taught):
            wrong.teacher_cache = other.teacher_cache
            with pytest.raises(StreamlineError, match=r"another model.*those of the LlamaForCausalLM of this student"):
                train(wrong, BATCHES, VALIDATION, QUICK)


def test_what_cannot_be_trained_or_resumed_is_refused(tmp_path: Path) -> None:
    student, _ = student_of(tiny_model("llama"))
    file = tmp_path / "training"
    with pytest.raises(StreamlineError, match="got 0 training and 2 validation"):
        train(student, [], VALIDATION)
    with pytest.raises(StreamlineError, match="no parameter"):
        train(Student(tiny_model("llama"), [(range(2, 4), None)]), BATCHES, VALIDATION)
    with pytest.raises(StreamlineError, match="resume=True.*Pass checkpoint_file"):
        train(student, BATCHES, VALIDATION, QUICK, resume=True)
    with pytest.raises(StreamlineError, match="no training run to resume"):
        train(student, BATCHES, VALIDATION, QUICK, resume=True, checkpoint_file=file)
    train(student, BATCHES, VALIDATION, QUICK, checkpoint_file=file)
    rate = f"learning_rate was {QUICK.learning_rate}, not 0.004"
    for other, named in ((replace(QUICK, seed=1), "seed was 0, not 1"), (replace(QUICK, learning_rate=4e-3), rate)):
        with pytest.raises(StreamlineError, match=f"belongs to another training run: {named}. Expected"):
            train(student, BATCHES, VALIDATION, other, resume=True, checkpoint_file=file)
    with pytest.raises(StreamlineError, match="another training run: calibration data was .*, not "):
        train(student, BATCHES[:-1], VALIDATION, QUICK, resume=True, checkpoint_file=file)
    wide = [{name: part.view(2, 24) for name, part in one.items()} for one in BATCHES]
    for parts in ((BATCHES[:-1], [BATCHES[-1], *VALIDATION]), (wide, VALIDATION)):  # the same tokens, divided otherwise
        with pytest.raises(StreamlineError, match="belongs to another training run"):
            train(student, *parts, QUICK, resume=True, checkpoint_file=file)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no safetensors"):
        file.write_bytes(damaged)
        with pytest.raises(StreamlineError, match=r"not a checkpoint file.*start again"):
            train(student, BATCHES, VALIDATION, QUICK, resume=True, checkpoint_file=file)
    file.write_bytes(whole.replace(b'format\\": 8', b'format\\": 9'))
    with pytest.raises(StreamlineError, match=r"format 9.*7 or 8"):
        train(student, BATCHES, VALIDATION, QUICK, resume=True, checkpoint_file=file)


def test_a_part_of_an_epoch_is_its_beginning(tmp_path: Path) -> None:
    """Each batch once and half of them again; and 2.0 goes on with what 2 began."""
    course = TrainingSchedule(DistillationConfig(epochs=1.5, seed=3), 6)
    whole = TrainingSchedule(DistillationConfig(epochs=2, seed=3), 6)
    steps = [course.batches_of(step) for step in range(course.steps)]
    assert course.steps == 9 and sorted(n for numbers in steps[:6] for n in numbers) == list(range(6))
    assert steps == [whole.batches_of(step) for step in range(9)]
    student, _ = student_of(tiny_model("llama"))
    trained = train(student, BATCHES, VALIDATION, replace(QUICK, epochs=1.5), checkpoint_file=tmp_path / "a")
    tokens = sum(
        BATCHES[n]["attention_mask"].numel() for step in range(9) for n in TrainingSchedule(QUICK, 6).batches_of(step)
    )
    assert (trained.steps, trained.tokens, trained.history[-1]["step"]) == (9, tokens, 9)
    train(student, BATCHES, VALIDATION, QUICK, checkpoint_file=tmp_path / "b")
    again = train(student, BATCHES, VALIDATION, replace(QUICK, epochs=2.0), resume=True, checkpoint_file=tmp_path / "b")
    assert again.steps == 12
    with pytest.raises(StreamlineError, match="belongs to another training run"):
        train(student, BATCHES, VALIDATION, QUICK, resume=True, checkpoint_file=tmp_path / "a")


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": float("nan")},
        {"epochs": float("inf")},
        {"epochs": 0.5},
        {"learning_rate": 0.0},
        {"warmup_ratio": 1.5},
        {"max_grad_norm": -1.0},
    ],
)
def test_settings_that_make_no_training_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(StreamlineError, match=rf"{next(iter(wrong))}="):
        DistillationConfig(**wrong)


def test_every_flipped_bit_of_a_kept_training_is_found(tmp_path: Path) -> None:
    file = tmp_path / "training"
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.tensor(2.0), "d": torch.randn(4).bfloat16()}
    write_training_file(file, tensors, {"step": 3, "history": [{"distance": 0.25}]})
    whole = bytearray(file.read_bytes())
    read, _ = read_training_file(file)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    for position in range(len(whole)):
        bit = 1 << position % 8
        whole[position] ^= bit
        file.write_bytes(whole)
        with pytest.raises(StreamlineError, match=rf"{file} .*[Dd]elete"):
            read_training_file(file)
        whole[position] ^= bit


def test_a_training_kept_without_a_digest_is_still_read(tmp_path: Path) -> None:
    metadata = {"streamline_hooks_training": json.dumps({"step": 3, "format": 7})}
    save_file({"a": torch.ones(2)}, tmp_path / "training", metadata=metadata)
    tensors, said = read_training_file(tmp_path / "training")
    assert torch.equal(tensors["a"], torch.ones(2)) and said["step"] == 3


def test_a_training_is_kept_in_a_file_that_is_named_by_a_string(tmp_path: Path) -> None:
    student, _ = student_of(tiny_model("llama"))
    train(student, BATCHES, VALIDATION, QUICK, checkpoint_file=str(tmp_path / "training"))
    assert read_training_file(tmp_path / "training")[1]["step"]
    with pytest.raises(StreamlineError, match=r"checkpoint_file=3.*Expected str . Path"):
        train(student, BATCHES, VALIDATION, QUICK, checkpoint_file=3)  # type: ignore[arg-type]


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "training"
    write_training_file(file, {"a": torch.ones(2)}, {"step": 1})

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("streamline_hooks.distillation.training_file.save_file", full)
    with pytest.raises(StreamlineError, match=r"No space left.*Free disk space"):
        write_training_file(file, {"a": torch.zeros(2)}, {"step": 2})
    tensors, said = read_training_file(file)
    assert torch.equal(tensors["a"], torch.ones(2))
    assert said["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["training"]


def test_a_disk_that_is_full_meanwhile_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, log_messages: list[str]
) -> None:
    whole, other = (student_of(tiny_model("llama"))[0] for _ in range(2))
    wanted = train(whole, BATCHES, VALIDATION, QUICK)
    settings = replace(QUICK, checkpoint_minutes=0.0)
    replaced = iter([os.replace])

    def full(*paths: Any) -> None:
        if (real := next(replaced, None)) is None:
            raise OSError(28, "No space left on device")
        real(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        trained = train(other, BATCHES, VALIDATION, settings, checkpoint_file=tmp_path / "training")
    assert trained.history == wanted.history and not trained.stopped
    pairs = zip(whole.parameters().values(), other.parameters().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sum("No space left" in line for line in log_messages) > 1 and "file was not written" in caplog.text
    assert read_training_file(tmp_path / "training")[1]["step"] == 1  # the only one that could be kept


@pytest.mark.parametrize("name", ["file/training", "x" * 256, "."])
def test_a_file_that_cannot_be_written_is_refused_before_training(
    name: str, tmp_path: Path, log_messages: list[str]
) -> None:
    (tmp_path / "file").touch()
    student, _ = student_of(tiny_model("llama"))
    with pytest.raises(StreamlineError, match="[Cc]hoose another"):
        train(student, BATCHES, VALIDATION, QUICK, checkpoint_file=tmp_path / name)
    assert not log_messages and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_training_that_brought_nothing_says_so() -> None:
    found = {0: 0.27, 24: 0.33, 97: 0.28}
    history = [{"step": step, "distance": kl, "validated": kl} for step, kl in found.items()]
    trained = TrainingResult(97, 50_000, 0.27, 0.27, 0, history, 1.0)
    assert re.search(r"not improve the model: KL.*0\.2700 before.*0\.2800 at best", trained.warning)
    assert "a smaller learning rate" in trained.warning
    both = [{**row, "validated": row["validated"] + 3.0} for row in history]
    assert re.search(
        r"not improve the model: the validation loss.*3\.2700 before", replace(trained, history=both).warning
    )
    assert replace(trained, best_step=97).warning == replace(trained, history=history[:1]).warning == ""
    early = replace(trained, history=history[:1], stopped="the loss of step 12 is nan")
    assert re.search(r"not improve the model: the loss of step 12 is nan.*initial weights", early.warning)
    for stopped in ("the loss of step 12 is nan", "interrupted after step 30"):
        cut = replace(trained, best_step=24, stopped=stopped)
        assert cut.warning == f"The training run ended early: {stopped}. The best weights are kept, of step 24."
    for stopped in ("the limit of 5 minutes was reached after step 30", "no lower for 2 validations"):  # as configured
        assert replace(trained, best_step=24, stopped=stopped).warning == ""


def test_what_is_returned_says_how_it_went() -> None:
    trained = train(student_of(tiny_model("llama"))[0], BATCHES, VALIDATION, QUICK)
    assert isinstance(trained, TrainingResult)
    assert [row["step"] for row in trained.history] == [0, 4, 8, 12]
    assert trained.history[0]["loss"] is None
    assert trained.stopped == ""
    assert trained.seconds > 0


class InterruptedValidation(TrainingCallback):
    """Its methods are patched."""


@pytest.mark.parametrize("where", ["loss", "validation", "optimizer"])
def test_ctrl_c_in_the_middle_of_something_leaves_nothing_half_done(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, checkpoint_minutes=0.0)
    whole, _ = student_of(tiny_model("llama"), dropout=0.2)
    wanted = train(whole, BATCHES, VALIDATION, settings)
    student, _ = student_of(tiny_model("llama"), dropout=0.2)
    owner, name, when = {
        "loss": (Objective, "output_loss", 7),
        "validation": (InterruptedValidation, "on_validation_begin", 4),
        "optimizer": (torch.optim.AdamW, "step", 7),
    }[where]
    make, calls = getattr(owner, name), []

    def interrupted(self: Any, *given: Any) -> Any:
        calls.append(1)
        made = make(self, *given)
        if len(calls) == when:
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        trained = train(
            student,
            BATCHES,
            VALIDATION,
            settings,
            checkpoint_file=tmp_path / "training",
            callbacks=[InterruptedValidation()],
        )
    assert trained.stopped == f"interrupted after step {12 if where == 'validation' else 6}"
    found = train(student, BATCHES, VALIDATION, settings, resume=True, checkpoint_file=tmp_path / "training")
    assert all(torch.equal(a, b) for a, b in zip(weights(student), weights(whole), strict=True))
    assert found.history == wanted.history


def steps_of(
    monkeypatch: pytest.MonkeyPatch, settings: DistillationConfig, student: Student
) -> list[tuple[list[float], float]]:
    """The rates and the norm of the gradient with which the optimizer was called."""
    made: list[tuple[list[float], float]] = []
    step = torch.optim.AdamW.step

    def seen(self: Any, *given: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        made.append(([g["lr"] for g in self.param_groups], float(torch.cat([g.flatten() for g in grads]).norm())))
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", seen)
        train(student, BATCHES, VALIDATION, settings)
    return made


def test_the_rate_rises_and_falls_as_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, warmup_ratio=0.25, min_lr_ratio=0.1, scale_parameter=False)
    rates = [rate[0] for rate, _ in steps_of(monkeypatch, settings, student_of(tiny_model("llama"))[0])]
    wanted = [k / 3 for k in range(3)] + [0.1 + 0.9 * (1 + math.cos(math.pi * k / 9)) / 2 for k in range(9)]
    assert rates == pytest.approx([1e-2 * w for w in wanted])


def test_a_single_step_is_not_lost_to_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, epochs=1, gradient_accumulation_steps=6, scale_parameter=False)
    (made,) = steps_of(monkeypatch, settings, student_of(tiny_model("llama"))[0])
    assert made[0] == [1e-2]


def test_gradients_are_clipped_to_the_norm_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = {}
    for clip in (0.0, 1e-3):
        made = steps_of(monkeypatch, replace(QUICK, max_grad_norm=clip), student_of(tiny_model("llama"))[0])
        norms[clip] = [norm for _, norm in made]
    assert max(norms[1e-3]) <= 1.001e-3 < min(norms[0.0])


def test_a_run_is_resumed_with_the_rates_of_its_first_steps(tmp_path: Path) -> None:
    """Of blocks that were equal, and so had equal rates, before the training."""
    model: Any = tiny_model("llama")
    for k in (5, 6, 7):
        model.model.layers[k].load_state_dict(model.model.layers[4].state_dict())
    settings = DistillationConfig(epochs=2, learning_rate=5e-3, validations=4)

    def healed() -> Student:
        torch.manual_seed(0)
        healing = parse_healing("partial:where=after,learning_rate_ratio=0.2")
        return distillation.student_of(find_stack(model), [(range(2, 4), LinearReplacement(32))], healing)

    whole, resumed, file = healed(), healed(), tmp_path / "training"
    train(whole, BATCHES, VALIDATION, settings)
    train(resumed, BATCHES, VALIDATION, settings, checkpoint_file=file, callbacks=[RaiseAt(9, KeyboardInterrupt)])
    assert train(resumed, BATCHES, VALIDATION, settings, checkpoint_file=file, resume=True).stopped == ""
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_a_run_is_not_resumed_with_another_dtype(tmp_path: Path) -> None:
    file, callbacks = tmp_path / "training", [RaiseAt(9, KeyboardInterrupt)]
    train(student_of(tiny_model("llama"))[0], BATCHES, VALIDATION, QUICK, checkpoint_file=file, callbacks=callbacks)
    student, module = student_of(tiny_model("llama"))
    module.to(torch.bfloat16)
    with pytest.raises(StreamlineError, match=r"other dtypes \(float32\)"):
        train(student, BATCHES, VALIDATION, QUICK, checkpoint_file=file, resume=True)


def test_modules_that_the_student_does_not_run_are_not_trained() -> None:
    model: Any = tiny_model("llama")
    for path in ("model.norm", "model.embed_tokens"):
        outside = {path: copy.deepcopy(model.get_submodule(path))}
        student = Student(model, [(range(2, 4), LinearReplacement(32))], outside=outside)
        if path == "model.norm":
            train(student, BATCHES, VALIDATION, QUICK)
            continue
        with pytest.raises(StreamlineError, match=r"model.embed_tokens gets no gradient.* starts at block 2"):
            train(student, BATCHES, VALIDATION, QUICK)


def test_a_gradient_from_before_is_not_trained_on() -> None:
    """Such as that of a step which Ctrl-C broke off, or of the caller's own loop."""
    found = []
    for before in (None, 5.0):
        student, module = student_of(tiny_model("llama"))
        module.projection.weight.grad = None if before is None else torch.full((32, 32), before)
        train(student, BATCHES, VALIDATION, QUICK)
        found.append(weights(student))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_adapters_of_another_scale_are_another_training(tmp_path: Path) -> None:
    settings = QUICK

    def healed(text: str) -> Student:
        model = tiny_model("llama")
        return distillation.student_of(find_stack(model), [(range(2, 4), LinearReplacement(32))], parse_healing(text))

    train(healed("lora:rank=2,alpha=4"), BATCHES, VALIDATION, settings, checkpoint_file=tmp_path / "training")
    for text in ("lora:rank=2,alpha=8", "lora:rank=2,alpha=4,dropout=0.1"):
        with pytest.raises(StreamlineError, match="belongs to another training run"):
            train(healed(text), BATCHES, VALIDATION, settings, resume=True, checkpoint_file=tmp_path / "training")
    train(
        healed("lora:rank=2,alpha=4"), BATCHES, VALIDATION, settings, resume=True, checkpoint_file=tmp_path / "training"
    )


class Normed(nn.Module):
    """What runs may change of it is more than what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.projection = nn.BatchNorm1d(32, momentum=0.5), nn.Linear(32, 32)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + self.projection(self.norm(state.flatten(0, 1)).view_as(state))


def normed(model: nn.Module) -> tuple[Student, Normed]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Normed()
    return Student(model, [(range(2, 4), module)]), module


def test_running_means_are_kept_with_the_weights_that_they_belong_to() -> None:
    student, module = normed(tiny_model("llama"))
    settings = replace(QUICK, learning_rate=0.3, validations=6)
    trained = train(student, BATCHES, VALIDATION, settings)
    assert trained.best_step < trained.steps, "the last weights are no test of this"
    assert int(module.norm.num_batches_tracked) == trained.best_step  # type: ignore[arg-type]
    again = train(student, BATCHES, VALIDATION, replace(settings, learning_rate=1e-30))
    assert again.distance_before == pytest.approx(trained.distance, rel=1e-6)


def test_a_training_goes_on_from_its_running_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, validations=1)
    whole, _ = normed(tiny_model("llama"))
    wanted = train(whole, BATCHES, VALIDATION, settings)
    output_loss, calls = Objective.output_loss, 0

    def interrupted(self: Any, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return output_loss(self, *given)

    monkeypatch.setattr(Objective, "output_loss", interrupted)
    broken, _ = normed(tiny_model("llama"))
    assert (
        "interrupted after step 4"
        in train(broken, BATCHES, VALIDATION, settings, checkpoint_file=tmp_path / "file").stopped
    )
    monkeypatch.undo()
    fresh, _ = normed(tiny_model("llama"))
    found = train(fresh, BATCHES, VALIDATION, settings, resume=True, checkpoint_file=tmp_path / "file")
    assert found.distance == wanted.distance
    assert all(torch.equal(a, b) for a, b in zip(weights(fresh), weights(whole), strict=True))
    for name, buffer in fresh.buffers().items():
        assert torch.equal(buffer, whole.buffers()[name])


def test_the_callers_random_numbers_are_left_as_they_were() -> None:
    student, _ = student_of(tiny_model("llama"), dropout=0.5)
    before = torch.get_rng_state()
    train(student, BATCHES, VALIDATION, QUICK)
    assert torch.equal(torch.get_rng_state(), before)
