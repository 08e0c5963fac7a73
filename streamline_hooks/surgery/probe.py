"""Run a model with blocks bypassed and with blocks removed, on a few tokens, and compare the outputs.

Known hazards are found by inspection (`hazards`). The probe detects all other dependencies on the block index: other
logits, a failing forward pass, or a cache that no longer fits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import UnsupportedSurgery, warn_caller
from streamline_hooks.modeling import (
    PROBE_TOKENS,
    BlockStack,
    ProbeFailedError,
    choose_probe_inputs,
    isolated_inference,
    logits_of_output,
    part_of_model,
    probe_logits,
    run_probe,
)
from streamline_hooks.surgery.bypass import bypass
from streamline_hooks.surgery.splice import AFTER, run_after, run_before, spliced

# Not marked in splice.py, which is copied into checkpoints and imports nothing else of the library.
for _hook in (run_before, run_after):
    part_of_model(_hook)

CACHE_MISMATCH = "decoding with a cache no longer equals the full forward"
_STEPS = 2
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative; 1e-4 for wider dtypes


@dataclass(frozen=True)
class ReferenceRun:
    """The inputs and outputs that the model without a window must reproduce."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the forward pass."""
    logits: Tensor
    """Logits with the window bypassed, usually of shape (rows, tokens, vocabulary)."""
    cached: bool
    """Whether cached decoding of the unmodified model equals its full forward, so that it is required afterwards."""
    runs: bool = False
    """Whether the forward runs with its default cache settings. Tested only if `cached` is false."""


def run_reference(stack: BlockStack, window: range, removed_splices: Sequence[nn.Module] = ()) -> ReferenceRun | None:
    """Run the model with a window bypassed, and without `removed_splices`, which follow the window's last block.

    Return None, with a warning, if the model cannot be run without a batch or is not deterministic.
    """
    model = stack.model
    first, last = stack[window.start], stack[window.stop - 1]
    called: list[nn.Module] = []

    def replacement(state: Tensor) -> Tensor:
        for splice in spliced(last, AFTER):
            state = state if any(splice is module for module in removed_splices) else splice(state)
        return state

    def attach() -> list[RemovableHandle]:
        called.clear()
        return [
            first.register_forward_pre_hook(lambda block, _: called.append(block)),
            *bypass(first, last, replacement),
        ]

    message = f"Removals in this {type(model).__name__} are not compared with the same blocks bypassed"
    reference = run_reference_with_hooks(model, attach, message, runs=first)
    if reference is not None and not called:
        raise UnsupportedSurgery(
            f"Block {window.start} cannot be removed: a forward of {' and '.join(reference.inputs)} alone does not run "
            "it, so the model without it cannot be verified. Choose other blocks.",
            "cannot-run",
        )
    return reference


def run_reference_with_hooks(
    model: nn.Module,
    attach: Callable[[], Iterable[RemovableHandle]],
    message: str,
    runs: nn.Module | None = None,
) -> ReferenceRun | None:
    """Run the model with the hooks that `attach` registers, preferably on inputs that run the module `runs`.

    Return None, with a warning, if the model cannot be run without a batch or is not deterministic. The warning begins
    with `message`.
    """
    with isolated_inference(model):
        try:
            inputs = choose_probe_inputs(model, runs)
            logits, repeated = probe_logits(model, inputs), probe_logits(model, inputs)
            reason = "" if probe_logits_allclose(logits, repeated) else "two forward passes give different outputs"
        except ProbeFailedError as error:
            reason = f"it cannot be run without a batch ({error})"
        if reason:
            warn_caller(f"{message}: {reason}.")
            return None
        cached = cache_matches_forward(model, logits, inputs)
        as_called = not cached and not forward_error(model, inputs)
        handles = attach()
        try:
            return ReferenceRun(inputs, probe_logits(model, inputs), cached, as_called)
        finally:
            for handle in handles:
                handle.remove()


def find_mismatch(reference: ReferenceRun, model: nn.Module, than: str = "the bypassed model") -> str | None:
    """Return how a model differs from a reference run, with or without a cache, or None if it is equal.

    `than` describes the reference in the returned text.
    """
    with isolated_inference(model):
        try:
            logits = probe_logits(model, reference.inputs)
        except ProbeFailedError as error:
            return f"the model fails ({error})"
        if not probe_logits_allclose(logits, reference.logits):
            return f"the model gives other logits than {than}"
        wrong = reference.cached and not cache_matches_forward(model, logits, reference.inputs)
        failure = forward_error(model, reference.inputs) if wrong or reference.runs else ""
        if failure:
            return f"the model fails with its default cache ({failure})"
        return CACHE_MISMATCH if wrong else None


def matches_reference(reference: ReferenceRun, model: nn.Module) -> bool:
    """Whether a model's full forward gives the logits of a reference run."""
    with isolated_inference(model), suppress(ProbeFailedError):
        return probe_logits_allclose(probe_logits(model, reference.inputs), reference.logits)
    return False


def forward_error(model: Any, inputs: dict[str, Tensor]) -> str:
    """Return the error of a forward pass with the default cache settings, or an empty string if there is none."""
    try:
        run_probe(model, dict(inputs))
    except ProbeFailedError as error:
        return str(error)
    return ""


def cache_matches_forward(model: Any, logits: Tensor, inputs: dict[str, Tensor]) -> bool:
    """Whether the last tokens, decoded one by one with a cache, have the logits of the full forward."""
    ids_name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    cache_name = next(
        (n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters), None
    )
    if cache_name is None or ids_name not in inputs or logits.ndim < 3 or logits.shape[1] != PROBE_TOKENS:
        return False
    ids, cache = inputs[ids_name], None
    for end in range(PROBE_TOKENS - _STEPS, PROBE_TOKENS + 1):
        new_ids = ids[:, :end] if cache is None else ids[:, end - 1 : end]
        arguments = {**inputs, ids_name: new_ids, "use_cache": True, **({} if cache is None else {cache_name: cache})}
        try:
            output = run_probe(model, arguments)
        except ProbeFailedError:
            return False
        cache = getattr(output, cache_name, None)
        if cache is None or not probe_logits_allclose(logits_of_output(output)[:, -1:], logits[:, end - 1 : end]):
            return False
    return True


def probe_logits_allclose(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are equal up to the rounding of their dtype."""
    if a.shape != b.shape:
        return False
    tolerance = _TOLERANCE.get(a.dtype, 1e-4)
    difference = torch.where(a == b, 0.0, (a - b).abs())
    return bool(difference.max() <= tolerance * (1 + without_masks(b).abs().max()))


def without_masks(values: Tensor) -> Tensor:
    """Return a tensor with 0 in place of infinities and of the lowest number of its dtype, which mask logits.

    A tolerance relative to such a number would allow any difference.
    """
    if not values.is_floating_point():
        return values
    return torch.where(values.abs() < 0.9 * torch.finfo(values.dtype).max, values, 0.0)
