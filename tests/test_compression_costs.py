"""What a dry run tells is what is run then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from streamline_hooks import compress, find_stack
from streamline_hooks.compression_costs import compression_costs
from streamline_hooks.evaluation.cost import Pace
from streamline_hooks.planning import training_plan_here
from streamline_hooks.preparation import prepare_compression
from streamline_hooks.task import Task
from tests.blockwise.checkpoints import reader
from tests.configured import configured
from tests.tiny_models import tiny_config

DEPTH = 12
AMOUNTS = {"seed": 0, "sequence_length": 16, "calibration_tokens": 512, "validation_tokens": 128, "test_tokens": 128}
OPTIONS: dict[str, Any] = {"remove": 4, "keep": (), "batch_size": 4, "stack": None}
# A second a token and block, and nothing else, so that what is told is how many tokens are run through blocks.
NOTHING = dict.fromkeys(("before", "after", "similarity", "moments", "reference", "divergence", "likelihood"), 0.0)
A_BLOCK = Pace(
    blocks=(1.0,) * DEPTH, surgery=0.0, features=32, widest=48, vocabulary=300, state_size=4, logit_size=4, **NOTHING
)


@pytest.mark.parametrize(
    ("search", "kind", "at_most"),
    [
        ("window", "linear", 1.3),
        ("window", "block", 1.3),
        ("disjoint", "linear", 2),
        ("mixed", "linear", 3),
        ("one-shot", "linear", 4),  # of as many windows as blocks, and no two neighbours, as seldom is
    ],
)
def test_as_many_tokens_are_run_as_are_told(
    search: str, kind: str, at_most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search for several windows was told as if it were for one, and took three times as long."""
    monkeypatch.setattr("streamline_hooks.compression_costs.measure_pace", lambda *args, **options: A_BLOCK)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        tiny_config("llama", vocab_size=300, num_hidden_layers=DEPTH)
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    options = {**OPTIONS, "repair": kind, "search": search}
    config = configured(speed=False, generation=False, **options, **AMOUNTS)
    ready = prepare_compression(model, *reader(), config, task=Task("causal-lm"))
    told = sum(cost.seconds for cost in compression_costs(ready))
    run = []
    for block in find_stack(model).blocks:
        block.register_forward_pre_hook(lambda block, args: run.append(args[0].shape[0] * args[0].shape[1]))
    compress(model, *reader(), config)
    assert sum(run) <= 1.02 * told <= at_most * sum(run)


def test_a_selection_of_several_windows_is_measured_whole() -> None:
    windows = (range(4, 6), range(8, 10))
    assert training_plan_here.scoring_passes(A_BLOCK, windows, whole=True) == 12 + 4 * 8 + 8
    assert (
        training_plan_here.scoring_passes(A_BLOCK, windows, whole=False) == 12 + 4 * 4 + 8
    )  # from the first window on
