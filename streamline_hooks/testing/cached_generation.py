"""Assert that decoding with a cache matches the forward pass without a cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, position_ids_from_mask, prepare_inputs
from streamline_hooks.modeling import find_stack
from streamline_hooks.testing.compare import (
    GREEDY_OPTIONS,
    OTHER_ORDER_TOLERANCE,
    assert_tensors_match,
    floating_dtype,
    is_transformers_model,
    make_batches,
    model_output,
    padding_suffix,
    reproducible_eval,
)
from streamline_hooks.testing.surgery_assertions import wrong_block_indices

_CACHES = ("cache", "past_key_values", "cache_params", "state")
_GENERATED = ("batch", "vocabulary entry")


def assert_cached_generation_matches(
    model: nn.Module,
    batch: Batch | Tensor | None = None,
    *,
    steps: int = 5,
    cache_implementation: str | None = None,
    left_padding: bool = True,
    tolerance: float | None = None,
    stack: str | None = None,
) -> None:
    """Assert that decoding with a KV cache gives the same logits as the forward pass without a cache.

    Three comparisons are made: the last tokens of a batch, decoded one at a time, with the forward pass; the logits
    returned by ``generate`` with a cache with those without a cache; and each row of a left-padded batch with the same
    row alone without padding.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model with ``generate``.
    batch : mapping or torch.Tensor, optional
        Inputs with ``input_ids`` and optionally an ``attention_mask``; padding must be on the left. Default: random
        tokens.
    steps : int
        Number of decoded tokens, less than the length of the batch.
    cache_implementation : str, optional
        Argument of ``generate``, such as "static". Default: the model's cache.
    left_padding : bool
        Whether a left-padded batch is tested as well. Pass False for a model that does not support it.
    tolerance : float, optional
        Relative tolerance. The default depends on the dtype (2e-4 for float32), because a cache changes the order of
        summation.
    stack : str, optional
        Path of the block stack, whose block indices are checked to find the cause of a failure.

    Raises
    ------
    AssertionError
        If logits differ. The message contains the token, the largest difference and its position.
    StreamlineError
        If the model cannot generate, is an encoder-decoder model, or the batch is invalid.

    Examples
    --------
    >>> from streamline_hooks.testing import assert_cached_generation_matches, tiny_model
    >>> assert_cached_generation_matches(tiny_model("llama", blocks=3), steps=2)
    """
    if not (is_transformers_model(model) and callable(getattr(model, "generate", None))):
        raise StreamlineError(
            f"{type(model).__name__} has no generate() and no cache. Expected a Transformers model that generates. Use "
            "assert_shapes and assert_causal for other models."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise StreamlineError(
            f"{type(model).__name__} is an encoder-decoder model. Expected a decoder-only model. Test its blocks with "
            "assert_shapes, assert_causal and assert_removal_equals_shorter_model."
        )
    # generate() returns float32 logits, so the tolerance is chosen by the dtype of the model.
    allowed = OTHER_ORDER_TOLERANCE.get(floating_dtype(model), 0.0) if tolerance is None else tolerance
    with reproducible_eval(model):
        for inputs in make_batches(model, batch, left_padded=left_padding):
            inputs = _with_mask(inputs, steps)
            if padding_suffix(inputs):
                _compare_rows_without_padding(model, inputs, allowed)
            compare_decoding(model, inputs, steps, allowed, stack)
            sequences, logits = compare_generation(model, inputs, steps, allowed, cache_implementation, stack)
            _compare_reported_logits(model, inputs, sequences, logits, allowed)


def compare_decoding(
    model: nn.Module, batch: Mapping[str, Any], steps: int, tolerance: float, stack: str | None = None
) -> None:
    """Compare the last `steps` tokens of a batch, decoded one at a time, with the full forward pass."""
    padding, cause = padding_suffix(batch), _likely_cause(model, stack)
    with torch.no_grad():
        expected = model_output(model, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    length = ids.shape[1]
    positions = position_ids_from_mask(model, mask) if padding else None
    parameters = inspect.signature(model.forward).parameters
    argument = next((name for name in _CACHES if name in parameters), "past_key_values")
    cache: Any = None
    for end in range(length - steps, length + 1):
        columns = slice(0, end) if cache is None else slice(end - 1, end)
        inputs: dict[str, Any] = {**batch, "use_cache": True}
        inputs = prepare_inputs(model, {**inputs, "input_ids": ids[:, columns], "attention_mask": mask[:, :end]})
        inputs.pop("position_ids", None)
        if positions is not None:
            inputs["position_ids"] = positions[:, columns].to(inputs["input_ids"].device)
        if cache is not None:
            inputs[argument] = cache
        with torch.no_grad(), _report_cache_error(model, cause, f"decoding token {end - 1}"):
            output = model(**inputs)
        cache = getattr(output, "cache", None)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is None:
            raise AssertionError(
                f"{type(model).__name__} returns no cache with use_cache=True. Expected: past_key_values in the "
                "output. Likely cause: the configuration or the forward pass discards it."
            )
        subject = (
            "The prompt, run with a cache," if end == length - steps else f"Token {end - 1}, decoded with a cache,"
        )
        description = f"{subject} has different logits than in the forward pass without a cache{padding}"
        assert_tensors_match(output.logits[:, -1:], expected[:, end - 1 : end], description, cause, tolerance=tolerance)


def compare_generation(
    model: nn.Module,
    batch: Mapping[str, Any],
    steps: int,
    tolerance: float,
    cache_implementation: str | None = None,
    stack: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compare greedy ``generate`` with and without a cache; return the sequences and logits without a cache.

    A row is compared until its sequences differ because of a tie.
    """
    generate: Any = model.generate
    cause = _likely_cause(model, stack)
    options = {**GREEDY_OPTIONS, "max_new_tokens": steps, "output_logits": True, "return_dict_in_generate": True}
    extra = (
        {} if cache_implementation is None else {"cache_implementation": cache_implementation, "disable_compile": True}
    )
    with torch.no_grad():
        uncached = generate(**batch, **options, use_cache=False)
        with _report_cache_error(model, cause, "generate()"):
            cached = generate(**batch, **options, use_cache=True, **extra)
    length = batch["input_ids"].shape[1]
    is_equal = torch.ones(len(batch["input_ids"]), dtype=torch.bool, device=uncached.sequences.device)
    for step, (expected, got) in enumerate(zip(uncached.logits, cached.logits, strict=True)):
        description = f"Token {step} generated with a cache has different logits than without{padding_suffix(batch)}"
        assert_tensors_match(got, expected, description, cause, real=is_equal, tolerance=tolerance, axes=_GENERATED)
        is_equal &= uncached.sequences[:, length + step] == cached.sequences[:, length + step]
        if not bool(is_equal.any()):
            break
    return uncached.sequences, uncached.logits


def _compare_rows_without_padding(model: nn.Module, batch: Mapping[str, Any], tolerance: float) -> None:
    """Compare each left-padded row with the same row alone without padding."""
    logits = model_output(model, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    for row in range(len(ids)):
        real = mask[row]
        if bool(real.all()):
            continue
        unpadded = {"input_ids": ids[row][real][None], "attention_mask": torch.ones_like(ids[row][real])[None]}
        assert_tensors_match(
            logits[row][real.to(logits.device)][None],
            model_output(model, unpadded),
            f"Row {row} of a left-padded batch has different logits than the same row without padding (token 0 is the "
            "first real token)",
            "the attention mask is ignored or inverted, or positions count the padding: pass attention_mask on, and "
            "compute position_ids from it (mask.cumsum(1) - 1)",
            tolerance=tolerance,
        )


def _compare_reported_logits(
    model: nn.Module, batch: Mapping[str, Any], sequences: Tensor, logits: tuple[Tensor, ...], tolerance: float
) -> None:
    """Compare the logits of ``generate`` without a cache with a forward pass of the generated sequences."""
    mask = batch["attention_mask"].to(sequences.device)
    new_mask = torch.ones(len(mask), len(logits), dtype=mask.dtype, device=mask.device)
    expected = model_output(model, {"input_ids": sequences, "attention_mask": torch.cat([mask, new_mask], dim=1)})
    for step, got in enumerate(logits):
        assert_tensors_match(
            got,
            expected[:, mask.shape[1] + step - 1].to(got.dtype),
            f"Token {step} generated without a cache has different logits than the forward pass of the full "
            f"sequence{padding_suffix(batch)}",
            "generate() passes a different mask or different positions than a forward pass with the batch's mask: see "
            "prepare_inputs_for_generation",
            tolerance=tolerance,
            axes=_GENERATED,
        )


def _with_mask(inputs: dict[str, Any], steps: int) -> dict[str, Any]:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not 1 <= steps < ids.shape[1]:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else "no tensor"
        raise StreamlineError(
            f"input_ids is {shape} and steps={steps}. Expected token ids of shape (batch, tokens) with more tokens "
            "than steps, and steps of at least 1. Pass a longer batch or fewer steps."
        )
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not bool(mask[:, -1].bool().all()):
        raise StreamlineError(
            "The batch is padded on the right. Expected padding on the left for generation. Set "
            "tokenizer.padding_side to 'left'."
        )
    return {**inputs, "attention_mask": mask}


@contextmanager
def _report_cache_error(model: nn.Module, cause: str, operation: str) -> Iterator[None]:
    """Convert an error of a model that runs with a cache to an AssertionError with the likely cause."""
    try:
        yield
    except Exception as error:
        raise AssertionError(
            f"{type(model).__name__} fails with a cache in {operation}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Expected: the logits of the forward pass without a cache. Likely cause: "
            f"{cause}."
        ) from error


def _likely_cause(model: nn.Module, stack: str | None) -> str:
    """Describe the likely cause of wrong logits with a cache: wrong block indices, or the usual causes."""
    try:
        wrong = wrong_block_indices(find_stack(model, stack))
    except StreamlineError:  # without a unique stack the indices cannot be checked
        wrong = []
    if wrong:
        return f"{'; '.join(wrong)}, so it writes to the cache slot of another block. Number the blocks from 0"
    return (
        "a block stores its keys in the wrong slot or for the wrong positions, or a module between the blocks uses "
        "other tokens, which are not available during decoding"
    )
