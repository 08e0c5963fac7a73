"""The monitor in Hugging Face's Trainer, in accelerate's loop and in Lightning's."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from streamline_hooks.training import HiddenStateMonitor
from streamline_hooks.training.trainer_callbacks import MonitorCallback
from tests.tiny_models import BLOCKS, tiny_model, tokens


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A Trainer that compiles tells accelerate so in the environment and in its state, and does not take it back."""
    from accelerate.state import AcceleratorState

    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tokens(count, 7)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual = {"max_steps": 5, "per_device_train_batch_size": 2, "disable_tqdm": True, "use_cpu": True, "report_to": []}
    return TrainingArguments(str(folder), **{**usual, "seed": 1, "data_seed": 1, **options})


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def trained(folder: Path, every: int = 2, **options: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    trainer = Trainer(tiny_model("llama"), arguments(folder, **options), train_dataset=rows())
    trainer.add_callback(MonitorCallback(trainer, every=every, file=folder / "states.jsonl"))
    trainer.train()
    return trainer, lines_of(folder / "states.jsonl")


def test_logs_to_tensorboard_and_not_to_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, lines = trained(tmp_path, report_to=["tensorboard"], logging_steps=1)
    assert [line["step"] for line in lines] == [1, 3, 5]
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events.parent))
    read.Reload()
    series = read.Scalars(f"train/states/influence/{BLOCKS - 1}")
    assert [event.step for event in series] == [1, 3, 5]
    assert [event.value for event in series] == pytest.approx([line["influence"][-1] for line in lines])
    assert "influence" not in capsys.readouterr().out
    assert not any(name.startswith("states") for entry in trainer.state.log_history for name in entry)


def test_a_step_counts_all_of_its_batches_and_none_of_an_evaluation(tmp_path: Path) -> None:
    _, plain = trained(tmp_path / "plain", every=1, per_device_train_batch_size=4)
    trainer = Trainer(
        tiny_model("llama"),
        arguments(tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, logging_steps=1),
        train_dataset=rows(), eval_dataset=rows(4),
    )  # fmt: skip
    trainer.add_callback(MonitorCallback(trainer, every=1, file=tmp_path / "states.jsonl"))
    trainer.train()
    found = lines_of(tmp_path / "states.jsonl")
    assert [line["tokens"] for line in found] == [28] * 5
    for name in ("influence", "norm"):
        assert found[0][name] == pytest.approx(plain[0][name], rel=1e-4)
    # A micro-batch's loss counts half.
    assert found[0]["gradient_norm"] == pytest.approx(plain[0]["gradient_norm"], rel=1e-3)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=["checkpointing", "compiled"],
)
def test_measures_the_same_however_the_trainer_runs_the_model(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    _, plain = trained(tmp_path / "plain", max_steps=3)
    _, found = trained(tmp_path / "other", max_steps=3, **options)
    torch.compiler.reset()
    assert [line["step"] for line in found] == [1, 3]
    for name in ("influence", "norm", "gradient_norm"):
        assert found[1][name] == pytest.approx(plain[1][name], rel=1e-3)


def test_goes_on_with_a_training_that_is_resumed(tmp_path: Path) -> None:
    _, whole = trained(tmp_path / "whole", max_steps=5, save_steps=2)
    trainer = Trainer(tiny_model("llama"), arguments(tmp_path / "whole", max_steps=5), train_dataset=rows())
    trainer.add_callback(MonitorCallback(trainer, every=2, file=tmp_path / "resumed.jsonl"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    resumed = lines_of(tmp_path / "resumed.jsonl")
    assert [line["step"] for line in resumed] == [3, 5]
    assert resumed[0]["norm"] == pytest.approx(whole[1]["norm"], rel=1e-4)


class Stops(TrainerCallback):
    """Interrupts a training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_training_can_be_begun_again(tmp_path: Path) -> None:
    trainer = Trainer(tiny_model("llama"), arguments(tmp_path), train_dataset=rows(), callbacks=[Stops()])
    callback = MonitorCallback(trainer, every=2, file=tmp_path / "states.jsonl")
    trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stops)
    trainer.train()
    assert [line["step"] for line in lines_of(tmp_path / "states.jsonl")] == [1, 3, 5]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


def test_a_trainer_that_makes_its_model_anew(tmp_path: Path) -> None:
    trainer = Trainer(
        model_init=lambda: tiny_model("llama"), args=arguments(tmp_path, max_steps=3), train_dataset=rows()
    )
    trainer.add_callback(MonitorCallback(trainer, every=2, file=tmp_path / "states.jsonl"))
    trainer.train()
    trainer.train()
    assert [line["step"] for line in lines_of(tmp_path / "states.jsonl")] == [1, 3, 1, 3]


def test_in_accelerates_loop(tmp_path: Path) -> None:
    from accelerate import Accelerator

    seen: list[tuple[int, dict[str, float]]] = []
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_model("llama").train()
    loader = DataLoader(rows(8), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    with HiddenStateMonitor(model, every=1, log=lambda values, step: seen.append((step, values))) as monitor:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                assert monitor.step().tokens == 28
    assert [step for step, _ in seen] == [1, 2]
    assert seen[1][1]["states/gradient_norm/0"] > 0


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
@pytest.mark.filterwarnings("ignore")
def test_in_lightnings_loop() -> None:
    import lightning

    seen: list[tuple[int, dict[str, float]]] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: nn.Module = tiny_model("llama")

        def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    class Monitored(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            log = lambda values, step: seen.append((step, values))  # noqa: E731 - such as trainer.logger.log_metrics
            module.model.train()
            self.monitor = HiddenStateMonitor(module.model, every=2, log=log).open(trainer.global_step)

        def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
            self.monitor.step(trainer.global_step)

        def on_train_end(self, *given: Any) -> None:
            self.monitor.close()

    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", callbacks=[Monitored()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(rows(8), batch_size=2))
    assert [step for step, _ in seen] == [1, 3]
    assert seen[0][1]["states/gradient_norm/0"] > 0
