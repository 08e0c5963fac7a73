"""Taylor criterion: the first-order estimate of the loss change when the weights of a block are set to zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamline_hooks.core import (
    IGNORE_INDEX,
    Batch,
    StreamlineError,
    autocast_dtype,
    prepare_inputs,
    progress_bar,
    shift_labels,
    target_ids,
    to_float64,
)
from streamline_hooks.evaluation import require_causal_lm
from streamline_hooks.modeling import BlockStack, find_stack, get_logits, inference
from streamline_hooks.surgery import AFTER, BEFORE, spliced


def taylor(
    model: nn.Module, batches: Sequence[Batch | Tensor], windows: Sequence[range], *, stack: str | None = None
) -> list[float]:
    """Return minus the sum of `block_saliency` over the window (Shortened LLaMA, arXiv 2402.02834).

    The paper's variant "Taylor+" keeps the first four and the last two blocks: ``protect=[0, 1, 2, 3, -2, -1]``.
    """
    saliency = block_saliency(model, batches, {k for window in windows for k in window}, stack=stack)
    return [-math.fsum(saliency[k] for k in window) for window in windows]


@torch.inference_mode(False)  # tensors created in inference mode have no gradient
def block_saliency(
    model: nn.Module, batches: Sequence[Batch | Tensor], blocks: Iterable[int], *, stack: str | None = None
) -> dict[int, float]:
    """Sum ``|gradient × weight|`` over the parameters of each block (Shortened LLaMA, arXiv 2402.02834).

    The gradient is of the mean next-token loss over all batches, in nats, in evaluation mode. Frozen parameters count.
    The model and existing gradients are not changed. The cost is one forward, and a backward to the first of the
    blocks. Memory is one gradient of the parameters of these blocks, in float32 or higher precision.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    batches : sequence of mapping or torch.Tensor
        Token ids of shape (batch, tokens), or mappings with ``input_ids``. Tokens whose ``labels`` are −100 are not
        predicted.
    blocks : iterable of int
        Indices of the blocks.
    stack : str, optional
        Path of the stack (see `find_stack`).

    Returns
    -------
    dict of int to float
        Saliency by block index, in nats.

    Raises
    ------
    StreamlineError
        If the model is not a causal language model, a parameter is offloaded or not floating point, weights or autocast
        are float16, no token is predicted, no gradient reaches a block, or the loss or a gradient is not finite.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> saliency = block_saliency(tiny_model("llama"), [torch.arange(3, 13).view(1, 10)], [1, 2])
    >>> sorted(saliency), saliency[1] > 0
    ([1, 2], True)
    """
    require_causal_lm(model)
    block_stack = find_stack(model, stack)
    chosen = sorted(set(blocks))
    _require_differentiable(block_stack, chosen)
    parameters = {k: _own_parameters(block_stack[k]) for k in chosen}
    unique: dict[Tensor, None] = dict.fromkeys(p for k in chosen for p in parameters[k])  # blocks may share parameters
    sums = {p: torch.zeros_like(p, dtype=_accumulation_dtype(p), requires_grad=False) for p in unique}
    labels = [_next_tokens(batch) for batch in batches]
    total = sum(int((values != IGNORE_INDEX).sum()) for values in labels)
    if not total:
        raise StreamlineError(
            "The batches contain no predicted token. Expected sequences with at least two real tokens. Pass longer "
            "text."
        )
    share = 0.0  # fraction of all predicted tokens that are in the current batch
    reached: set[Tensor] = set()

    def receive(parameter: Tensor) -> None:
        if parameter.grad is not None:
            sums[parameter].add_(parameter.grad.to(sums[parameter]), alpha=share)
        parameter.grad = None
        reached.add(parameter)

    desc = f"gradients: blocks {chosen[0]} to {chosen[-1]} of {len(block_stack)}"
    with inference(model), _gradients_of(model, sums, receive), progress_bar(total, desc) as bar:
        for number, (batch, next_tokens) in enumerate(zip(batches, labels, strict=True)):
            mask = next_tokens != IGNORE_INDEX
            count = int(mask.sum())
            if not count:
                continue
            share = count / total
            logits = get_logits(model(**prepare_inputs(model, batch)))
            predicted = logits[mask.to(logits.device)]
            targets = next_tokens[mask].to(logits.device)
            loss = cross_entropy(predicted.to(_accumulation_dtype(predicted)), targets)
            if not torch.isfinite(loss):
                raise StreamlineError(
                    f"The loss of batch {number} is {float(loss.detach())}. Expected a finite loss. Check the weights "
                    "of the model, or run in float32 or bfloat16."
                )
            if loss.requires_grad:
                loss.backward()
            bar.update(count)
    for k in chosen:
        if reached.isdisjoint(parameters[k]):
            raise StreamlineError(
                f"No gradient reaches block {k}: {type(model).__name__} runs this block or a later module without a "
                "graph. Use a criterion without gradients."
            )
    saliency = {
        k: sum(float(to_float64(p.detach()).mul(to_float64(sums[p])).abs_().sum()) for p in parameters[k])
        for k in chosen
    }
    if bad := [k for k in chosen if not math.isfinite(saliency[k])]:
        raise StreamlineError(
            f"A gradient or a weight of block {bad[0]} is not finite. Check its weights, or run in float32 or bfloat16."
        )
    return saliency


def _own_parameters(block: nn.Module) -> list[Tensor]:
    """Return the block's parameters without those of spliced modules, which stay when the block is removed."""
    spliced_ids = {
        id(p) for position in (BEFORE, AFTER) for module in spliced(block, position) for p in module.parameters()
    }
    return [p for p in block.parameters() if id(p) not in spliced_ids]


@contextmanager
def _gradients_of(model: nn.Module, parameters: Iterable[Tensor], receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Enable gradients of these parameters only, and call `receive` as soon as a gradient is computed."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = []
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for parameter in parameters:
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(receive))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient


def _next_tokens(batch: Batch | Tensor) -> Tensor:
    """Return the token that each position predicts, or `IGNORE_INDEX`, of shape (batch, tokens)."""
    ids = target_ids(batch)
    fields = {} if isinstance(batch, Tensor) else batch
    mask = fields.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
    return shift_labels(ids, real, fields.get("position_ids"))


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _require_differentiable(stack: BlockStack, blocks: Sequence[int]) -> None:
    in_weights = any(p.dtype == torch.float16 for p in stack.model.parameters())
    if in_weights or autocast_dtype(stack.model) == str(torch.float16):
        raise StreamlineError(
            f"{'The weights are' if in_weights else 'autocast is'} float16, in which small gradients become 0. "
            "Expected bfloat16 or float32. Call model.bfloat16(), or use a criterion without gradients."
        )
    for k in blocks:
        for name, p in stack[k].named_parameters():
            if not p.is_floating_point() or p.is_meta:
                state = "is offloaded" if p.is_meta else f"has dtype {p.dtype}"
                raise StreamlineError(
                    f"{name} of block {k} {state}, so it has no gradient. Expected floating-point parameters in "
                    "memory. Load the model without offloading or quantization, or use a criterion without gradients."
                )
