"""The host waits for the device a constant number of times per batch, whatever the numbers of blocks and tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import DistillationConfig, LayerSurgeon, LinearConfig, fit_windows, profile, train
from streamline_hooks.core import to_float64
from streamline_hooks.distillation import Student
from streamline_hooks.evaluation import agreement, distances_of_candidates, perplexity
from streamline_hooks.modeling import Candidate
from streamline_hooks.repair import insert_replacement
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.statistics import WindowMoments
from streamline_hooks.testing import tiny_model
from tests.world.host_syncs import HostSyncs

Batches = list[dict[str, torch.Tensor]]
WINDOW = range(1, 3)


def run_training(model: nn.Module, batches: Batches) -> None:
    config = DistillationConfig(loss={"kl": 1.0, "lm": 1.0, "mse": 1.0}, validations=1)
    train(Student(model, [(WINDOW, LinearReplacement(32))]), batches, batches[:1], config)


STEPS: dict[str, tuple[Callable[[Any, Batches], object], int]] = {
    "profile": (profile, 50),
    "fit": (lambda model, batches: fit_windows(model, [WINDOW], LinearConfig(), batches, batches[:1]), 12),
    "verify": (lambda model, batches: distances_of_candidates(model, batches, [Candidate(WINDOW)]), 20),
    "perplexity": (perplexity, 12),
    "agreement": (lambda model, batches: agreement(model, copy.deepcopy(model), batches), 20),
    "train": (run_training, 45),
}
"""By step: a function of a model and batches, and the bound of the calls per batch of two sequences."""


def batches_of(count: int, tokens: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, :2] = 0
    return [
        {"input_ids": torch.randint(3, 60, (2, tokens), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


def syncs_per_batch(run: Callable[[Any, Batches], object], blocks: int, tokens: int) -> float:
    """Return the number of calls that each further batch adds."""
    counts = []
    for number in (2, 6):
        model = tiny_model("llama", blocks=blocks)
        with HostSyncs() as syncs:
            run(model, batches_of(number, tokens))
        counts.append(syncs.count)
    return (counts[1] - counts[0]) / 4


@pytest.mark.parametrize("name", STEPS)
def test_the_host_waits_a_constant_number_of_times_per_batch(name: str) -> None:
    run, bound = STEPS[name]
    few = syncs_per_batch(run, blocks=4, tokens=8)
    assert 0 < few <= bound
    assert syncs_per_batch(run, blocks=10, tokens=8) == few, "more blocks"
    assert syncs_per_batch(run, blocks=4, tokens=40) == few, "more tokens"


def test_a_generated_token_waits_as_often_as_in_the_original() -> None:
    counts = {}
    for is_spliced in (False, True):
        model: Any = tiny_model("llama", blocks=6)
        with LayerSurgeon(model) as surgeon:
            if is_spliced:
                insert_replacement(surgeon, WINDOW, LinearReplacement(32))
                surgeon.commit()
        prompt = torch.tensor([[5, 6, 7]])
        for count in (4, 12):
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
            with HostSyncs() as syncs:
                model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            counts[is_spliced, count] = syncs.count
    assert counts[True, 12] - counts[True, 4] == counts[False, 12] - counts[False, 4] > 0


@pytest.mark.parametrize("fault", ["blocks", "tokens"])
def test_a_read_in_a_loop_is_counted(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a value that is read for each boundary, or for each part of the tokens."""
    if fault == "blocks":

        def reads_state(state: torch.Tensor, block: nn.Module) -> torch.Tensor:
            assert float(state.sum()) < 1e9
            return state

        monkeypatch.setattr("streamline_hooks.recording.recorder.by_token", reads_state)
        few, many = (syncs_per_batch(profile, blocks, 8) for blocks in (4, 10))
    else:
        update = WindowMoments.update

        def reads_tokens(self: Any, entering: Any, leaving: Any, mask: Any, **options: Any) -> None:
            assert all(float(to_float64(token).norm()) > 0 for token in entering.flatten(0, 1))
            update(self, entering, leaving, mask, **options)

        monkeypatch.setattr(WindowMoments, "update", reads_tokens)
        few, many = (syncs_per_batch(STEPS["fit"][0], 4, tokens) for tokens in (8, 40))
    assert many > few
