"""The Taylor criterion: the first-order change of the loss if a block's weights were zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamline_hooks.batch import Batch, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.perplexity import input_ids, require_text
from streamline_hooks.passes import inference, progress
from streamline_hooks.precision import widen
from streamline_hooks.predicted import predicted_tokens
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced
from streamline_hooks.task import logits_of


def taylor(
    model: nn.Module, batches: Sequence[Batch | Tensor], windows: Sequence[range], *, stack: str | None = None
) -> list[float]:
    """Minus the sum of `block_saliency` over the window (the Taylor criterion of Shortened LLaMA, arXiv 2402.02834).

    Its variant "Taylor+" is this with the first four and the last two blocks kept: ``keep=[0, 1, 2, 3, -2, -1]``.
    """
    saliency = block_saliency(model, batches, {k for window in windows for k in window}, stack=stack)
    return [-math.fsum(saliency[k] for k in window) for window in windows]


@torch.inference_mode(False)  # what is made inside one has no gradient
def block_saliency(
    model: nn.Module, batches: Sequence[Batch | Tensor], blocks: Iterable[int], *, stack: str | None = None
) -> dict[int, float]:
    """Sum of |gradient × weight| over the parameters of each block (Shortened LLaMA, arXiv 2402.02834).

    The gradient is that of the mean next-token loss over all text, in evaluation mode. Frozen parameters count too.
    The model is not changed, and existing gradients stay. A pass costs a forward, and a backward down to the first of
    the blocks; memory is one gradient of these blocks' parameters, in float32 at least.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    batches : sequence of mapping or torch.Tensor
    blocks : iterable of int
    stack : str, optional
        Path of the stack, see `find_stack`.

    Returns
    -------
    dict of int to float
        By block, in nats.

    Raises
    ------
    StreamlineError
        If a parameter has no gradient (it is quantised, or kept elsewhere), the loss or a gradient is not finite, or
        there is nothing to predict.
    """
    require_text(model)
    found = find_stack(model, stack)
    chosen = sorted(set(blocks))
    _require_differentiable(found, chosen)
    parameters = {k: _own_parameters(found[k]) for k in chosen}
    every: dict[Tensor, None] = dict.fromkeys(p for k in chosen for p in parameters[k])  # blocks may share some
    sums = {p: torch.zeros_like(p, dtype=_wide(p), requires_grad=False) for p in every}
    masks = [_predicted(batch) for batch in batches]
    total = sum(int(mask.sum()) for mask in masks)
    if not total:
        raise StreamlineError("No token is predicted; give sequences of at least two real tokens.")
    share = 0.0  # of all predicted tokens, in the batch that is run
    reached: set[Tensor] = set()

    def receive(parameter: Tensor) -> None:
        if parameter.grad is not None:
            sums[parameter].add_(parameter.grad.to(sums[parameter]), alpha=share)
        parameter.grad = None
        reached.add(parameter)

    what = f"gradients: blocks {chosen[0]} to {chosen[-1]} of {len(found)}"
    with inference(model), _gradients_of(model, sums, receive), progress(total, what) as bar:
        for number, (batch, mask) in enumerate(zip(batches, masks, strict=True)):
            if not mask.any():
                continue
            share = float(mask.sum()) / total
            logits = logits_of(model(**prepare(model, batch)))
            labels = input_ids(batch).to(logits.device)[:, 1:][mask.to(logits.device)]
            predicted = logits[:, :-1][mask.to(logits.device)]
            loss = cross_entropy(predicted.to(_wide(predicted)), labels)
            if not torch.isfinite(loss):
                raise StreamlineError(
                    f"The loss is {float(loss.detach())} (batch {number}). Look at the weights of the model, or run in "
                    "a wider precision (float32 or bfloat16)."
                )
            if loss.requires_grad:
                loss.backward()
            bar.update(int(mask.sum()))
    for k in chosen:
        if reached.isdisjoint(parameters[k]):
            raise StreamlineError(
                f"No gradient reaches block {k}: {type(model).__name__} runs it, or what follows it, without a graph. "
                "Choose a criterion without gradients."
            )
    saliency = {
        k: sum(float(widen(p.detach()).mul(widen(sums[p])).abs_().sum()) for p in parameters[k]) for k in chosen
    }
    if bad := [k for k in chosen if not math.isfinite(saliency[k])]:
        raise StreamlineError(
            f"A gradient or a weight of block {bad[0]} is not finite. Look at its weights, or run in a wider precision "
            "(float32 or bfloat16)."
        )
    return saliency


def _own_parameters(block: nn.Module) -> list[Tensor]:
    """Return a block's parameters without those of modules spliced beside it, which stay when it is removed."""
    beside = {id(p) for place in (BEFORE, AFTER) for module in spliced(block, place) for p in module.parameters()}
    return [p for p in block.parameters() if id(p) not in beside]


@contextmanager
def _gradients_of(model: nn.Module, parameters: Iterable[Tensor], receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Compute the gradients of these parameters only, and hand each on as soon as it is there."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = []
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for wanted in parameters:
            wanted.requires_grad_(True)
            handles.append(wanted.register_post_accumulate_grad_hook(receive))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient


def _predicted(batch: Batch | Tensor) -> Tensor:
    """Return the mask of predicted tokens, of shape (batch, tokens − 1)."""
    ids = input_ids(batch)
    given = {} if isinstance(batch, Tensor) else batch
    mask = given.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
    return predicted_tokens(real, given.get("position_ids"))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _require_differentiable(stack: BlockStack, blocks: Sequence[int]) -> None:
    for k in blocks:
        for name, p in stack[k].named_parameters():
            if not p.is_floating_point() or p.is_meta:
                where = "is kept elsewhere (offloaded)" if p.is_meta else f"is {p.dtype}"
                raise StreamlineError(
                    f"{name} of block {k} {where} and has no gradient. Load the model whole and in floating point, or "
                    "choose a criterion without gradients."
                )
