"""A slow reference for blocks skipped by prompts: all blocks run, and the outputs of skipped tokens are replaced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.modeling import find_stack, read_input, read_output, write_output
from streamline_hooks.replacements import LinearReplacement


def random_maps(count: int, width: int) -> list[nn.Module | None]:
    """Maps far from the identity, so that a token with a wrong estimate shows."""
    modules: list[nn.Module | None] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        modules.append(LinearReplacement.from_map(0.3 * torch.randn(width, width, generator=generator)))
    return modules


@contextmanager
def replaced_outputs(
    model: nn.Module, window: range, estimates: Sequence[nn.Module | None], marks: Tensor
) -> Iterator[None]:
    """Run every block, and replace the outputs of marked tokens in forward passes with the shape of the marks."""
    stack, boundary = find_stack(model), []

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        boundary[:] = [read_input(args, kwargs, block)]

    def replace(estimate: nn.Module | None, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        state = read_output(output)
        if state.shape[:2] != marks.shape:
            return None
        value = read_input(args, kwargs, block) if estimate is None else estimate(boundary[0])
        return write_output(output, torch.where(marks[..., None], value, state))

    handles = [stack[window.start].register_forward_pre_hook(enter, with_kwargs=True)]
    for estimate, k in zip(estimates, window, strict=True):
        handles.append(stack[k].register_forward_hook(partial(replace, estimate), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prompt_marks(batch: dict[str, Tensor], tokens_of_prompt: int | None = None, last_tokens: int = 1) -> Tensor:
    """All tokens of the prompt except its last ones, and except the first real token of each sequence."""
    shape = batch["input_ids"].shape
    end = shape[1] if tokens_of_prompt is None else tokens_of_prompt
    real = batch.get("attention_mask", torch.ones(shape))
    marks = torch.arange(shape[1]).expand(shape) < end - last_tokens
    return marks & (torch.arange(shape[1]).expand(shape) != real.int().argmax(dim=1)[:, None])


def with_positions(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The positions that generate passes for padded sequences."""
    if "attention_mask" not in batch or "position_ids" not in inspect.signature(model.forward).parameters:
        return batch
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}
