"""Configs of training: they are read as they were written, each field has an effect, and invalid values are refused."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import DistillationConfig, HealingConfig, StreamlineError, find_stack, train
from streamline_hooks.core import Config, HardwareConfig
from streamline_hooks.distillation import student_of
from streamline_hooks.distillation.progress import TrainingCallback, TrainingProgress
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model

WINDOW = range(1, 3)
MODEL = tiny_model("llama", blocks=5)
BATCHES = [torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(k)) for k in range(8)]
BASE = DistillationConfig(learning_rate=1e-2, epochs=2, validations=2, warmup_ratio=0.25)
HEALING = HealingConfig(rank=2)


class Watch(TrainingCallback):
    """Note before which steps the file to resume from was there."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.kept: list[bool] = []

    def on_step_begin(self, progress: TrainingProgress) -> None:
        self.kept.append(self.file.is_file())


def observed(
    config: DistillationConfig = BASE, *, hardware: HardwareConfig | None = None, healing: HealingConfig | None = None
) -> dict[str, Any]:
    """What can be seen of a training run."""
    files: list[Any] = []
    make = tempfile.NamedTemporaryFile
    module = LinearReplacement(32, rank=2)
    nn.init.constant_(module.projection[0].weight, 0.01)  # type: ignore[index]
    model = copy.deepcopy(MODEL)
    student = student_of(find_stack(model), [(WINDOW, module)], healing)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(
            "streamline_hooks.distillation.teacher_cache.tempfile.NamedTemporaryFile",
            lambda *given, **named: (files.append(1), make(*given, **named))[1],
        )
        watch = Watch(Path(folder) / "file")
        trained = train(
            student, BATCHES[:6], BATCHES[6:], config, hardware=hardware, checkpoint_file=watch.file, callbacks=[watch]
        )
    return {
        "parameters": {name: tuple(p.shape) for name, p in student.parameters().items()},
        "weights": [p.detach().double().sum().item() for p in student.parameters().values()],
        "losses": [row["loss"] for row in trained.history],
        "validations": [row["step"] for row in trained.history],
        "steps": trained.steps,
        "stopped": trained.stopped,
        "kept": watch.kept,
        "files": len(files),
    }


def run(config: Config) -> dict[str, Any]:
    """A training run as one of its configs describes it."""
    match config:
        case DistillationConfig():
            return observed(config, healing=HealingConfig("partial", "last", 1))
        case HealingConfig():
            return observed(healing=config)
        case HardwareConfig():
            return observed(hardware=config)
    raise AssertionError(config)


Row = tuple[Config, Any, str]
"""A config, another value of a field, and what that changes."""

EFFECTS: dict[type[Config], dict[str, Row]] = {
    DistillationConfig: {
        "loss": (BASE, {"kl": 1.0, "mse": 1.0}, "losses"),
        "learning_rate": (BASE, 1e-3, "weights"),
        "scale_parameter": (BASE, False, "weights"),
        "weight_decay": (BASE, 0.5, "weights"),
        "betas": (BASE, (0.5, 0.95), "weights"),
        "warmup_ratio": (BASE, 0.0, "weights"),
        "min_lr_ratio": (BASE, 1.0, "weights"),
        "max_grad_norm": (BASE, 1e-4, "weights"),
        "epochs": (BASE, 3, "steps"),
        "gradient_accumulation_steps": (BASE, 2, "steps"),
        "validations": (BASE, 3, "validations"),
        "patience": (replace(BASE, learning_rate=10.0, validations=4), 1, "stopped"),
        "max_minutes": (BASE, 1e-9, "stopped"),
        "checkpoint_minutes": (BASE, 0.0, "kept"),
        "seed": (BASE, 1, "weights"),
    },
    HealingConfig: {
        "method": (HealingConfig(), "partial", "parameters"),
        "where": (HEALING, "after", "parameters"),
        "count": (replace(HEALING, where="last", count=1), 2, "parameters"),
        "learning_rate_ratio": (HEALING, 0.5, "weights"),
        "head": (HEALING, True, "parameters"),
        "rank": (HEALING, 4, "parameters"),
        "alpha": (HEALING, 4.0, "weights"),
        "dropout": (HEALING, 0.5, "weights"),
        "targets": (HEALING, ("up_proj",), "parameters"),
    },
    HardwareConfig: {
        "autocast": (HardwareConfig(), "bfloat16", "weights"),
        "state_memory": (HardwareConfig(), 0, "files"),
        "state_dtype": (HardwareConfig(), "bfloat16", "weights"),
    },
}
ELSEWHERE = {HardwareConfig: {"batch_size"}}  # of a compression: tests/pipeline/test_config.py
CONFIGS = list(EFFECTS)


def undescribed(config: type[Config], rows: Mapping[str, Row]) -> set[str]:
    """The fields without a row, and rows without a field."""
    return {field.name for field in fields(config)} ^ set(rows) ^ ELSEWHERE.get(config, set())


def has_effect(name: str, row: Row) -> bool:
    """Whether a run with another value of a field differs in what is said to change."""
    config, value, what = row
    assert getattr(config, name) != value
    return bool(run(replace(config, **{name: value}))[what] != run(config)[what])


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_described(config: type[Config]) -> None:
    assert not undescribed(config, EFFECTS[config])


@pytest.mark.sample(6)
@pytest.mark.parametrize(("config", "name"), [(config, name) for config in CONFIGS for name in EFFECTS[config]])
def test_every_field_has_an_effect(config: type[Config], name: str) -> None:
    assert has_effect(name, EFFECTS[config][name])


@dataclass(frozen=True)
class Planted(DistillationConfig):
    """Has a field that nothing looks at."""

    useless: int = 0


def test_a_planted_field_without_effect_is_found() -> None:
    assert undescribed(Planted, EFFECTS[DistillationConfig]) == {"useless"}
    planted = Planted(**{field.name: getattr(BASE, field.name) for field in fields(BASE)})
    for what in ("weights", "losses", "steps", "validations"):
        assert not has_effect("useless", (planted, 1, what))
    assert has_effect("seed", (planted, 1, "weights"))


@pytest.mark.parametrize(("config", "name"), [(config, name) for config in CONFIGS for name in EFFECTS[config]])
def test_a_config_is_read_as_it_was_written(config: type[Config], name: str) -> None:
    plain, value, _ = EFFECTS[config][name]
    for made in (config(), plain, replace(plain, **{name: value})):
        written = json.loads(json.dumps(made.to_dict(), allow_nan=False))
        assert config.from_dict(written) == made
        assert list(written) == [field.name for field in fields(config)]


def test_weights_of_losses_are_copied() -> None:
    loss = {"kl": 1.0}
    config = DistillationConfig(loss)
    loss["kl"] = 2.0
    assert config.loss == {"kl": 1.0}


def test_the_seed_of_the_compression_is_for_configs_without_one() -> None:
    assert DistillationConfig().seeded(5).seed == 5 and DistillationConfig(seed=3).seeded(5).seed == 3
    assert observed(replace(BASE, seed=0)) == observed(BASE)


@pytest.mark.parametrize(
    ("config", "values", "named"),
    [
        (DistillationConfig, {"loss": {"kld": 1.0}}, "'kld'.*Did you mean 'kl'"),
        (DistillationConfig, {"loss": {}}, r"loss=\{\}.*empty.*Add one"),
        (DistillationConfig, {"loss": {"kl": -1.0}}, "'kl'.*-1.0.*above 0.*Change"),
        (DistillationConfig, {"loss": "kl"}, "loss='kl'.*Expected Mapping"),
        (DistillationConfig, {"learning_rate": 0.0}, r"learning_rate=0.0.*in \(0, inf\)"),
        (DistillationConfig, {"learning_rate": float("inf")}, r"learning_rate=inf.*in \(0, inf\)"),
        (DistillationConfig, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\).*in \[0, 1\)"),
        (DistillationConfig, {"warmup_ratio": 1.5}, r"warmup_ratio=1.5.*in \[0, 1\]"),
        (DistillationConfig, {"min_lr_ratio": -0.1}, r"min_lr_ratio=-0.1.*in \[0, 1\]"),
        (DistillationConfig, {"epochs": 0.5}, "epochs=0.5.*at least 1"),
        (DistillationConfig, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0.*at least 1"),
        (DistillationConfig, {"max_minutes": 0.0}, r"max_minutes=0.0.*in \(0, inf\)"),
        (DistillationConfig, {"epoch": 2}, "'epoch'.*Did you mean 'epochs'"),
        (HealingConfig, {"method": "full"}, "method='full'.*one of lora, partial.*Pass"),
        (HealingConfig, {"where": "lasst", "count": 1}, "where='lasst'.*Did you mean 'last'"),
        (HealingConfig, {"where": "last"}, "count=0 with where='last'.*at least 1.*Change one"),
        (HealingConfig, {"method": "partial", "rank": 4}, "no adapters, but rank.*Omit it"),
        (HealingConfig, {"learning_rate_ratio": 0.0}, r"learning_rate_ratio=0.0.*in \(0, inf\)"),
        (HardwareConfig, {"autocast": "bfloat"}, "autocast='bfloat'.*Did you mean 'bfloat16'"),
        (HardwareConfig, {"autocast": torch.bfloat16}, "autocast=torch.bfloat16.*Expected"),
        (HardwareConfig, {"state_memory": -1}, "state_memory=-1.*at least 0"),
    ],
)
def test_values_that_are_refused(config: type[Config], values: dict[str, Any], named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        config.from_dict(values)
