"""The work of a block by its shapes, against what torch counts while it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from streamline_hooks import StreamlineError
from streamline_hooks.planning.work import work_of
from streamline_hooks.stack import find_stack
from streamline_hooks.testing import tiny_model

TOKENS = 12


def counted(model: Any, k: int) -> int:
    """FLOPs of a block on one sequence, as torch counts them; attention to all tokens, later ones too."""
    stack = find_stack(model)
    model.set_attn_implementation("eager")  # torch does not count the fused attention of a CPU
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # nor the grouped products of experts
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(3, 3 + TOKENS)[None])
    counts = counter.get_flop_counts()
    return sum(counts[f"{type(model).__name__}.{stack.path}.{k}"].values())


@pytest.mark.parametrize("type_", ["llama", "gpt2", "opt", "gpt_neox", "phi", "qwen3"])
def test_dense_blocks_take_what_torch_counts(type_: str) -> None:
    model = tiny_model(type_)
    work = work_of(find_stack(model))
    for k in (0, 3):
        expected = TOKENS * (2 * work[k].active + 4 * work[k].attended * TOKENS)
        assert counted(model, k) == expected
        assert work[k].parameters == sum(p.numel() for p in find_stack(model)[k].parameters())


@pytest.mark.parametrize("type_", ["mixtral", "qwen2_moe", "olmoe"])
def test_of_a_mixture_only_the_chosen_experts_are_run(type_: str) -> None:
    model = tiny_model(type_)
    work = work_of(find_stack(model))[2]
    matrices = sum(p.numel() for p in find_stack(model)[2].parameters() if p.ndim > 1)
    assert work.active < matrices
    assert counted(model, 2) == pytest.approx(TOKENS * (2 * work.active + 4 * work.attended * TOKENS), rel=0.02)


def test_experts_of_which_nobody_says_how_many_are_chosen_are_refused() -> None:
    model = tiny_model("mixtral")
    object.__setattr__(model.config, "num_experts_per_tok", None)
    with pytest.raises(StreamlineError, match=r"4 experts.*how many"):
        work_of(find_stack(model))


def test_a_block_without_attention_attends_to_nothing() -> None:
    assert {work.attended for work in work_of(find_stack(tiny_model("mamba")))} == {0}
