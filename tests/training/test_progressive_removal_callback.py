"""Blocks go in the middle of a training by Hugging Face's Trainer, and a checkpoint behind it is the shorter model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from streamline_hooks import LayerSurgeon, LinearConfig, StreamlineError, SwiGLUConfig, load
from streamline_hooks.checkpoint import read_plans
from streamline_hooks.repair import BlockConfig, ReplacementConfig
from streamline_hooks.training.stochastic_depth import StochasticDepth
from streamline_hooks.training.trainer_callbacks import ProgressiveRemovalCallback
from tests.tiny_models import BLOCKS, tiny_model, tokens

SCHEDULE = {2: range(1, 3), 4: range(4, 5)}


@pytest.fixture(autouse=True)
def by_itself() -> Iterator[None]:
    """TrainingArguments leave the compiler and the precision in the environment, and accelerate in its own state."""
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for name in set(os.environ) - set(before):
        if name.startswith("ACCELERATE_"):
            del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name.startswith("ACCELERATE_")})
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, **settings}
    return TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2,
        learning_rate=1e-2, weight_decay=0.1, lr_scheduler_type="linear", **given,
    )  # fmt: skip


def trainer(model: nn.Module, args: TrainingArguments, *callbacks: TrainerCallback) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in tokens(16, 7)]
    return Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.rates: list[float] = []
        self.blocks: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.rates.append(given["lr_scheduler"].get_last_lr()[0])
        self.blocks.append(len(given["model"].model.layers))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, ProgressiveRemovalCallback, Watch, Path]:
    """A training of five steps with two removals, saved between them."""
    folder = tmp_path_factory.mktemp("whole")
    callback, watch = ProgressiveRemovalCallback(SCHEDULE), Watch()
    trained = trainer(tiny_model("llama"), arguments(folder), callback, watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.train()
    return trained, callback, watch, folder / "checkpoint-3"


def test_the_trainer_goes_on_with_what_is_left(whole: tuple[Any, ...]) -> None:
    trained, callback, watch, _ = whole
    assert [(done.step, done.blocks) for done in callback.done] == [(2, (1, 2)), (4, (4,))]
    assert watch.blocks == [6, 4, 4, 3, 3]
    assert watch.rates == pytest.approx([0.008, 0.006, 0.004, 0.002, 0.0])
    held = [p for group in trained.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trained.model.parameters()} and len(losses(trained)) == 5


def test_a_checkpoint_behind_a_removal_is_resumed(whole: tuple[Any, ...], tmp_path: Path) -> None:
    trained, _, _, checkpoint = whole
    model = load(checkpoint)
    assert len(model.model.layers) == BLOCKS - 2 and [plan.removed for plan in read_plans(model)] == [(1, 2)]
    callback = ProgressiveRemovalCallback(SCHEDULE)
    resumed = trainer(model, arguments(tmp_path), callback)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [(done.step, done.blocks) for done in callback.done] == [(2, (1, 2)), (4, (4,))]
    assert losses(resumed) == losses(trained)
    expected = dict(trained.model.named_parameters())
    assert list(expected) == [name for name, _ in resumed.model.named_parameters()]
    assert all(torch.equal(parameter, expected[name]) for name, parameter in resumed.model.named_parameters())


@pytest.mark.sample(1)
@pytest.mark.parametrize("config", [LinearConfig(diagonal=True), SwiGLUConfig(width=8), BlockConfig()])
def test_a_run_with_replacements_is_resumed(config: ReplacementConfig, tmp_path: Path) -> None:
    """The Trainer creates the groups of the resumed run itself, and loads their state before the callback is called."""

    def replacing() -> ProgressiveRemovalCallback:
        batches = [{"input_ids": tokens(4, 9, seed)} for seed in (7, 8)]
        return ProgressiveRemovalCallback(
            {2: range(1, 3), 4: range(3, 5)}, replacement=config, fit=batches[:1], held_out=batches[1:]
        )

    callback = replacing()
    trained = trainer(tiny_model("llama"), arguments(tmp_path, save_steps=1), callback)
    trained.train()
    held = [p for group in trained.optimizer.param_groups for p in group["params"]]
    assert [done.blocks for done in callback.done] == [(1, 2), (3, 4)]
    assert {id(p) for p in held} == {id(p) for p in trained.model.parameters()}
    expected = dict(trained.model.named_parameters())
    for step in (2, 3):
        checkpoint = tmp_path / f"checkpoint-{step}"
        resumed = trainer(load(checkpoint), arguments(tmp_path / "resumed", save_strategy="no"), replacing())
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert losses(resumed) == losses(trained)
        assert list(expected) == [name for name, _ in resumed.model.named_parameters()]
        for name, parameter in resumed.model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
            moments, present = (
                one.state[p] for one, p in ((trained.optimizer, expected[name]), (resumed.optimizer, parameter))
            )
            assert moments.keys() == present.keys()
            assert all(torch.equal(moments[key], present[key]) for key in moments)


def test_a_full_model_is_not_resumed_from_a_shortened_checkpoint(whole: tuple[Any, ...], tmp_path: Path) -> None:
    """With the optimizer's state PyTorch raises; without it nobody else would."""
    checkpoint = whole[3]
    wrong = trainer(tiny_model("llama"), arguments(tmp_path), ProgressiveRemovalCallback(SCHEDULE))
    with pytest.raises(ValueError, match="parameter group"):
        wrong.train(resume_from_checkpoint=str(checkpoint))
    alone = tmp_path / "checkpoint-3"
    alone.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in ("optimizer.pt", "scheduler.pt"):
            (alone / file.name).write_bytes(file.read_bytes())
    wrong = trainer(tiny_model("llama"), arguments(tmp_path), ProgressiveRemovalCallback(SCHEDULE))
    with pytest.raises(StreamlineError, match=r"3 steps.*step 2"):
        wrong.train(resume_from_checkpoint=str(alone))


def test_a_second_training_of_what_came_out_needs_a_name_of_its_own(tmp_path: Path) -> None:
    model = tiny_model("llama")
    once = arguments(tmp_path, max_steps=1, save_strategy="no")
    trainer(model, once, ProgressiveRemovalCallback({1: range(1, 2)})).train()
    with pytest.raises(StreamlineError, match=r"0 steps.*run="):
        trainer(model, once, ProgressiveRemovalCallback({1: range(1, 2)})).train()
    trainer(model, once, ProgressiveRemovalCallback({1: range(1, 2)}, run="second")).train()
    assert len(model.model.layers) == BLOCKS - 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"torch_compile": True, "torch_compile_backend": "eager"}, r"it compiles the model.*Train on one device"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3},
            r"load_best_model_at_end=True.*earlier step",
        ),
    ],
)
def test_settings_that_would_go_wrong(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = trainer(tiny_model("llama"), arguments(tmp_path, **settings), ProgressiveRemovalCallback(SCHEDULE))
    with pytest.raises(StreamlineError, match=words):
        given.train()
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("mode", "words"),
    [(ParallelMode.NOT_DISTRIBUTED, "several devices in one process"), (ParallelMode.TPU, "it is parallel")],
)
def test_other_ways_to_be_parallel(
    mode: ParallelMode, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes are tried for real in the tests of `ProgressiveRemoval`."""
    given = trainer(tiny_model("llama"), arguments(tmp_path), ProgressiveRemovalCallback(SCHEDULE))
    monkeypatch.setattr(TrainingArguments, "parallel_mode", mode)
    with pytest.raises(StreamlineError, match=rf"{words}.*Train"):
        given.callback_handler.on_train_begin(given.args, given.state, given.control)


def test_stochastic_depth_around_a_training(tmp_path: Path) -> None:
    """With gradient accumulation, checkpointing, bfloat16, evaluation, saving and removals inside."""
    model, skipped = tiny_model("llama"), []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            skipped.append(depth.skipped)

    settings = {"gradient_accumulation_steps": 2, "bf16": True, "gradient_checkpointing": True}
    args = arguments(tmp_path, **settings, eval_strategy="steps", eval_steps=2)
    given = trainer(model, args, Note(), ProgressiveRemovalCallback(SCHEDULE))
    with StochasticDepth(model, 0.5, rule="constant", protect=[0]) as depth:
        given.train()
        with torch.no_grad():
            inside = model.eval()(tokens(2, 7)).logits
    assert any(skipped) and len(model.model.layers) == BLOCKS - 3 and not model.model._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 7)).logits, inside)
    assert len(load(tmp_path / "checkpoint-3").model.layers) == BLOCKS - 2
    with LayerSurgeon(model) as surgeon:  # nothing is left open
        surgeon.remove([0])
