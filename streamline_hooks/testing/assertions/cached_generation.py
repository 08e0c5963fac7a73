"""Assert that decoding with a cache equals the forward without one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, positions_by_mask, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import find_stack
from streamline_hooks.testing.assertions.difference import OTHER_SUMS, require_same
from streamline_hooks.testing.assertions.removal import wrong_numbers
from streamline_hooks.testing.assertions.running import (
    GREEDILY,
    answer,
    batches_for,
    is_transformers_model,
    padding_said,
    precision_of,
    quietly,
)

_CACHES = ("cache", "past_key_values", "cache_params", "state")


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
    """Assert that decoding with a KV cache gives the logits of the forward without one.

    Three things are compared: the last tokens of a batch, decoded one by one; the logits that ``generate`` reports,
    with a cache and without; and, for a left-padded batch, each row against the same row alone, without its padding.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model that generates.
    batch : mapping or torch.Tensor, optional
        With ``input_ids``, and an ``attention_mask`` that pads on the left if at all. Made up by default.
    steps : int
        How many tokens are decoded, less than the batch is long.
    cache_implementation : str, optional
        For ``generate``, such as "static"; the model's own by default.
    left_padding : bool
        Whether a left-padded batch is made up as well; False for a model that does not claim to take one.
    tolerance : float, optional
        Relative; by default 2e-4 for float32 and accordingly for the others, since a cache takes sums in another
        order.
    stack : str, optional
        Path of the stack, whose blocks' numbers are looked at for the cause.

    Raises
    ------
    AssertionError
        With the token, the largest difference and where it is.
    StreamlineError
        If the model does not generate, is an encoder with a decoder, or the batch does not fit.

    Examples
    --------
    >>> from streamline_hooks.testing import assert_cached_generation_matches, tiny_model
    >>> assert_cached_generation_matches(tiny_model("llama", blocks=3), steps=2)
    """
    if not (is_transformers_model(model) and callable(getattr(model, "generate", None))):
        raise StreamlineError(
            f"A {type(model).__name__} has no cache to compare with: give a Transformers model that generates."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise StreamlineError(
            f"{type(model).__name__} reads a text and writes another one; decoding is compared here for models that "
            "write on. Hold its blocks with assert_shapes, assert_causal and assert_removal_equals_shorter_model."
        )
    with quietly(model):
        for given in batches_for(model, batch, left_padded=left_padding):
            given = _with_mask(given, steps)
            if padding_said(given):
                hold_rows_alone(model, given, tolerance=tolerance)
            hold_decoding(model, given, steps=steps, tolerance=tolerance, stack=stack)
            sequences, reported = hold_generation(
                model, given, steps=steps, cache_implementation=cache_implementation, tolerance=tolerance, stack=stack
            )
            _hold_reported(model, given, sequences, reported, tolerance)


def hold_decoding(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    steps: int,
    tolerance: float | None = None,
    stack: str | None = None,
) -> None:
    """Compare the last `steps` tokens of a batch, decoded one by one with a cache, with the whole forward."""
    padded = bool(padding_said(batch))
    with torch.no_grad():
        whole = answer(model, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    length = ids.shape[1]
    positions = positions_by_mask(model, mask) if padded else None
    takes = inspect.signature(model.forward).parameters
    argument = next((name for name in _CACHES if name in takes), "past_key_values")
    cache: Any = None
    for end in range(length - steps, length + 1):
        piece = slice(0, end) if cache is None else slice(end - 1, end)
        given = {**batch, "input_ids": ids[:, piece], "attention_mask": mask[:, :end], "use_cache": True}
        given = prepare(model, given)
        given.pop("position_ids", None)
        if positions is not None:
            given["position_ids"] = positions[:, piece].to(given["input_ids"].device)
        if cache is not None:
            given[argument] = cache
        with torch.no_grad(), failing_with_a_cache(model, stack, f"decoding token {end - 1}"):
            output = model(**given)
        cache = getattr(output, "cache", None)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is None:
            raise AssertionError(
                f"{type(model).__name__} returns no cache though it was told to (use_cache=True). Expected: "
                "past_key_values in its output. Likely cause: its configuration, or its forward, drops it."
            )
        what = "The prompt, run with a cache," if end == length - steps else f"Token {end - 1}, decoded with a cache,"
        require_same(
            output.logits[:, -1:],
            whole[:, end - 1 : end],
            f"{what} has other logits than in the forward without one{padding_said(batch)}",
            likely_cause(model, stack),
            tolerance=_allowed(model, tolerance),
        )


def hold_generation(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    steps: int,
    cache_implementation: str | None = None,
    tolerance: float | None = None,
    stack: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compare greedy ``generate`` with a cache with ``generate`` without one, and return the latter's texts and logits.

    Rows are compared up to the first token where they part over a tie; from there on the texts differ.
    """
    generate: Any = model.generate
    options = {**GREEDILY, "max_new_tokens": steps, "output_logits": True, "return_dict_in_generate": True}
    extra = (
        {} if cache_implementation is None else {"cache_implementation": cache_implementation, "disable_compile": True}
    )
    with torch.no_grad():
        without = generate(**batch, **options, use_cache=False)
        with failing_with_a_cache(model, stack, "generate()"):
            cached = generate(**batch, **options, use_cache=True, **extra)
    length = batch["input_ids"].shape[1]
    together = torch.ones(len(batch["input_ids"]), dtype=torch.bool, device=without.sequences.device)
    for step, (expected, got) in enumerate(zip(without.logits, cached.logits, strict=True)):
        require_same(
            got,
            expected,
            f"Token {step} that generate() makes with a cache has other logits than without{padding_said(batch)}",
            likely_cause(model, stack),
            real=together,
            tolerance=_allowed(model, tolerance),
            axes=("batch", "vocabulary entry"),
        )
        together &= without.sequences[:, length + step] == cached.sequences[:, length + step]
        if not bool(together.any()):
            break
    return without.sequences, without.logits


def hold_rows_alone(model: nn.Module, batch: Mapping[str, Any], *, tolerance: float | None = None) -> None:
    """Compare each row of a left-padded batch with the same row alone, without its padding."""
    whole = answer(model, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    for row in range(len(ids)):
        kept = mask[row]
        if bool(kept.all()):
            continue
        alone = {"input_ids": ids[row][kept][None], "attention_mask": torch.ones_like(ids[row][kept])[None]}
        expected = answer(model, alone)
        got = whole[row][kept.to(whole.device)][None]
        require_same(
            got,
            expected,
            f"Row {row} of a left-padded batch has other logits than alone without its padding (real tokens counted "
            "from 0)",
            "the attention mask is ignored or turned round, or positions count the padding: hand attention_mask on, "
            "and take position_ids from it (mask.cumsum(1) - 1)",
            tolerance=_allowed(model, tolerance),
        )


def _hold_reported(
    model: nn.Module, batch: Mapping[str, Any], sequences: Tensor, reported: tuple[Tensor, ...], tolerance: float | None
) -> None:
    """What ``generate`` reports without a cache is what the forward says about the text that it made."""
    mask = batch["attention_mask"].to(sequences.device)
    made = torch.ones(len(mask), len(reported), dtype=mask.dtype, device=mask.device)
    whole = answer(model, {"input_ids": sequences, "attention_mask": torch.cat([mask, made], dim=1)})
    length = mask.shape[1]
    for step, got in enumerate(reported):
        require_same(
            got,
            whole[:, length + step - 1].to(got.dtype),
            f"Token {step} that generate() makes without a cache has other logits than the forward of the whole "
            f"text{padding_said(batch)}",
            "generate() hands the model another mask or other positions than a forward with the batch's mask: see "
            "prepare_inputs_for_generation",
            tolerance=_allowed(model, tolerance),
            axes=("batch", "vocabulary entry"),
        )


def _with_mask(given: dict[str, Any], steps: int) -> dict[str, Any]:
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not 1 <= steps < ids.shape[1]:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else "no tensor"
        raise StreamlineError(
            f"input_ids is {shape} and steps={steps}: expected token numbers of shape (batch, tokens), more of them "
            "than steps, and at least one step."
        )
    mask = given.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not bool(mask[:, -1].bool().all()):
        raise StreamlineError("The batch is padded on its right; generating needs the padding on the left.")
    return {**given, "attention_mask": mask}


def _allowed(model: nn.Module, tolerance: float | None) -> float:
    """By the model's precision: generate() reports its logits in float32, whatever they were computed in."""
    return OTHER_SUMS.get(precision_of(model), 0.0) if tolerance is None else tolerance


@contextmanager
def failing_with_a_cache(model: nn.Module, stack: str | None, what: str) -> Iterator[None]:
    """Turn an error of a model that runs with a cache into an AssertionError that names the likely cause."""
    try:
        yield
    except Exception as error:
        raise AssertionError(
            f"{type(model).__name__} fails with a cache, {what}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Expected: the logits of the forward without one. Likely cause: "
            f"{likely_cause(model, stack)}."
        ) from error


def likely_cause(model: nn.Module, stack: str | None) -> str:
    """Why a cache gives something else: numbers of blocks that are wrong, or what cannot be seen from here."""
    try:
        wrong = wrong_numbers(find_stack(model, stack))
    except StreamlineError:  # no single stack: then nothing is said of its numbers
        wrong = []
    if wrong:
        return f"{'; '.join(wrong)}: it writes into another block's slot of the cache. Number the blocks from 0"
    return (
        "a block keeps its keys in the wrong slot or for the wrong positions, or a module between the blocks looks at "
        "other tokens, which decoding does not hand it"
    )
