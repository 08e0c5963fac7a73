"""Training files that earlier versions wrote are resumed: renamed settings leave a run's fingerprint as it was."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import DistillationConfig, HealingConfig, StreamlineError, find_stack, train
from streamline_hooks.core import HardwareConfig
from streamline_hooks.distillation import LOSSES, Loss, register_loss, student_of
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.training_file import read_training_file, training_fingerprint
from streamline_hooks.repair import FoldedConfig, ScaleConfig, fit_windows
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model

FILES = Path(__file__).parent / "files"  # written by the version before `DistillationConfig`, interrupted after 3 steps
RUNS: dict[str, tuple[str, DistillationConfig, HardwareConfig]] = {
    "plain": (
        "380b40b3599900c26126d6b243d3173267731c82131bcd560102343ff6cc1125",
        DistillationConfig(epochs=2, learning_rate=1e-2, scale_parameter=False, validations=2, patience=7, seed=3),
        HardwareConfig(),
    ),
}


def filled(module: Any) -> Any:
    """The same weights on every machine."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            values = (torch.arange(parameter.numel()) * 37 + 11 * number) % 101 - 50
            parameter.copy_((values / 64).view_as(parameter))
    return module


def student() -> Student:
    module: nn.Module = filled(LinearReplacement(32, rank=1))
    return Student(filled(tiny_model("llama", blocks=4)), [(range(1, 3), module)])


def text(first: int) -> list[torch.Tensor]:
    return [(torch.arange(k, k + 32) * 7 % 61 + 3).view(2, 16) for k in range(first, first + 4)]


def fingerprint_of(config: DistillationConfig, hardware: HardwareConfig) -> str:
    made = student()
    return training_fingerprint(config, hardware, made, made.parameters(), text(0), text(9)[:2])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_fingerprint_that_it_had(name: str) -> None:
    wanted, config, hardware = RUNS[name]
    assert (
        fingerprint_of(config, hardware) == wanted == read_training_file(FILES / f"{name}.training")[1]["fingerprint"]
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_file_of_an_earlier_version_is_resumed(name: str, tmp_path: Path) -> None:
    _, config, hardware = RUNS[name]
    file = Path(shutil.copy(FILES / f"{name}.training", tmp_path))
    resumed, whole = student(), student()
    found = train(resumed, text(0), text(9)[:2], config, hardware=hardware, checkpoint_file=file, resume=True)
    wanted = train(whole, text(0), text(9)[:2], config, hardware=hardware)
    assert (found.steps, found.tokens, found.stopped) == (wanted.steps, wanted.tokens, "")
    assert found.distance == pytest.approx(wanted.distance, rel=1e-2)
    with pytest.raises(StreamlineError, match="belongs to another training run"):
        train(
            student(),
            text(0),
            text(9)[:2],
            replace(config, seed=8),
            hardware=hardware,
            checkpoint_file=file,
            resume=True,
        )


def test_a_file_of_a_run_on_generated_text_is_refused(tmp_path: Path) -> None:
    file = Path(shutil.copy(FILES / "own_text.training", tmp_path))
    with pytest.raises(StreamlineError, match=r"own_text.training.*generated text.*examples/on_policy_distillation.py"):
        train(student(), text(0), text(9)[:2], RUNS["plain"][1], checkpoint_file=file, resume=True)


def l1(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).abs().mean(dim=-1)


def test_a_registered_loss_changes_the_runs_that_use_it_alone() -> None:
    wanted, config, hardware = RUNS["plain"]
    register_loss(Loss("test_l1", l1, compares="states"))
    try:
        assert fingerprint_of(config, hardware) == wanted
        assert fingerprint_of(replace(config, loss={"kl": 1.0, "test_l1": 0.5}), hardware) != wanted
    finally:
        del LOSSES["test_l1"]


def test_what_may_differ_when_a_run_is_resumed_is_not_in_its_fingerprint() -> None:
    wanted, config, hardware = RUNS["plain"]
    other = replace(config, max_minutes=3.0, checkpoint_minutes=0.0)
    assert fingerprint_of(other, replace(hardware, state_memory=0)) == wanted
    assert fingerprint_of(replace(config, epochs=2.0), hardware) == wanted


@pytest.mark.parametrize("kind", ["folded", "scale"])
def test_a_run_with_another_replacement_inside_a_block_is_not_resumed(kind: str, tmp_path: Path) -> None:
    def run(fitted: int, resume: bool) -> None:
        model = tiny_model("llama")
        batches = [torch.arange(3 + k, 51 + k).view(4, 12) for k in range(4)]
        config = FoldedConfig() if kind == "folded" else ScaleConfig()
        (repair,) = fit_windows(model, [range(3, 6)], config, batches[:fitted], batches[3:])
        assert repair.replacement_module is not None
        window = [(range(3, 6), repair.replacement_module)]
        student = student_of(find_stack(model), window, HealingConfig("lora", "all"))
        file = tmp_path / "run.training"
        train(student, batches[:3], batches[3:], SHORT, checkpoint_file=file, resume=resume)

    run(3, resume=False)
    run(3, resume=True)
    with pytest.raises(StreamlineError, match="another training run"):
        run(1, resume=True)


SHORT = DistillationConfig(validations=1, checkpoint_minutes=0)
