"""Run models and modules for the assertions, and describe the largest difference between two outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, exclusive_global_state, padding_mask, prepare_inputs
from streamline_hooks.modeling import inference, padded, read_output, seeded_sampling
from streamline_hooks.surgery import without_masks
from streamline_hooks.testing.tiny_models import tiny_inputs

LOGITS = ("batch", "token", "vocabulary entry")
STATES = ("batch", "token", "feature")

SAME_ORDER_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
)
"""Relative tolerance if both results sum in the same order."""

OTHER_ORDER_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
)
"""Relative tolerance if the order of summation differs, as with a cache."""

TOKEN_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
)
"""Allowed change of a token relative to its norm if its inputs did not change."""

MAX_NOISE = 0.1
"""Largest allowance for noise: twice the difference between two runs on the same input, relative to a token's norm."""

GREEDY_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "eos_token_id": None,
        "stop_strings": None,
        "pad_token_id": 0,
    }
)
"""Options for greedy generation of one sequence per row without early stopping, independent of generation_config."""


def describe_difference(
    got: Tensor,
    expected: Tensor,
    *,
    real: Tensor | None = None,
    tolerance: float | None = None,
    axes: Sequence[str] = LOGITS,
) -> str | None:
    """Compare two tensors and their dtypes; describe the largest difference, or return None if they agree.

    The allowed difference is `tolerance` times (1 + the largest expected absolute value). The default tolerance is that
    of the dtype in `SAME_ORDER_TOLERANCE`; 0 compares bit for bit, up to the sign of zeros. `real`, a boolean mask of
    the leading axes, selects positions. `axes` are the names of the axes.
    """
    error = _shape_dtype_or_nan_error(got, expected, real, axes)
    if error or not got.numel():
        return error
    a, b = got.detach().double(), expected.detach().to(got.device).double()
    is_compared = torch.ones_like(a, dtype=torch.bool) if real is None else _expand_mask(real, a).expand(a.shape)
    relative = SAME_ORDER_TOLERANCE.get(got.dtype, 0.0) if tolerance is None else tolerance
    largest = float(torch.where(is_compared, without_masks(expected.detach()).to(got.device), 0.0).abs().max())
    allowed = relative * (1 + largest) if relative else 0.0
    gaps = torch.where(is_compared & (a != b), (a - b).abs(), 0.0)
    if float(gaps.max()) <= allowed:
        return None
    limit = f"allowed: {allowed:.3g}" if allowed else "expected: bitwise equal"
    return f"{_describe_largest(gaps, a, b, axes)}; {limit})"


def describe_token_difference(
    got: Tensor, expected: Tensor, again: Tensor, real: Tensor, tolerance: float | None, axes: Sequence[str] = STATES
) -> str | None:
    """Compare tokens relative to their norms; describe the largest change, or return None if they agree.

    `again` is the output of a second run on the unchanged input. Twice its difference from `expected` is allowed in
    addition to `tolerance`, whose default is that of the dtype in `TOKEN_TOLERANCE`. NaN is never equal.
    """
    error = _shape_dtype_or_nan_error(got, expected, real, axes)
    if error:
        return error
    noise = 2 * float(_relative_gaps(again, expected, real).max())
    if not noise < torch.inf:
        return "two runs on the same input differ by NaN or infinity, so the outputs cannot be compared"
    if noise > MAX_NOISE:
        return (
            f"two runs on the same input differ by {noise / 2:.3g} of the norm of a token, so the outputs cannot be "
            "compared; expected a deterministic forward pass, without dropout"
        )
    allowed = noise + (TOKEN_TOLERANCE.get(got.dtype, 0.0) if tolerance is None else tolerance)
    gaps = _relative_gaps(got, expected, real)
    size = float(gaps.max())
    if size <= allowed and size < torch.inf:
        return None
    row, token = (int(k) for k in torch.unravel_index(gaps.argmax(), gaps.shape))
    a, b = got[row, token].detach().double(), expected[row, token].detach().to(got.device).double()
    difference = torch.where(a == b, 0.0, a - b).abs()
    return (
        f"{_describe_largest(difference, a, b, axes, (row, token))}), which is {size:.3g} of the norm of that token "
        f"(allowed: {allowed:.3g})"
    )


def _describe_largest(
    gaps: Tensor, got: Tensor, expected: Tensor, axes: Sequence[str], outer: tuple[int, ...] = ()
) -> str:
    """Describe the largest gap and both values there; `outer` are the indices of the axes that precede `gaps`."""
    inner = tuple(int(k) for k in torch.unravel_index(gaps.argmax(), gaps.shape))
    where = _describe_index((*outer, *inner), axes)
    return (
        f"the largest absolute difference is {float(gaps[inner]):.6g}{f' at {where}' if where else ''} "
        f"(got {float(got[inner]):.9g}, expected {float(expected[inner]):.9g}"
    )


def _shape_dtype_or_nan_error(got: Tensor, expected: Tensor, real: Tensor | None, axes: Sequence[str]) -> str | None:
    """Describe why two tensors cannot be compared (shape, dtype or NaN), or return None."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return (
            f"got a {got.dtype} tensor of shape {tuple(got.shape)}, "
            f"expected {expected.dtype} of shape {tuple(expected.shape)}"
        )
    for values, name in ((expected, "the expected tensor"), (got, "the returned tensor")):
        is_nan = values.detach().double().isnan()
        is_nan = is_nan if real is None else is_nan & _expand_mask(real, is_nan)
        if bool(is_nan.any()):
            return f"NaN at {_describe_index(is_nan.nonzero()[0].tolist(), axes)} of {name}"
    return None


def _relative_gaps(got: Tensor, expected: Tensor, real: Tensor) -> Tensor:
    """Return the norm of each token's difference relative to the expected token, float64 of shape (batch, tokens).

    The result is 0 for tokens outside `real`, and infinite for NaN and if exactly one of the two values is infinite.
    """
    a, b = (x.detach().to(expected.device).double().reshape(*x.shape[:2], -1) for x in (got, expected))
    difference = torch.where(a == b, 0.0, a - b).norm(dim=-1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    norm = without_masks(expected.detach()).double().reshape(b.shape).norm(dim=-1)
    gaps = torch.where(difference > 0, difference / norm, 0.0)  # infinite if the expected token is zero
    return torch.where(real.to(gaps.device), gaps, 0.0)


def _expand_mask(real: Tensor, like: Tensor) -> Tensor:
    return real.to(like.device).bool()[(...,) + (None,) * (like.ndim - real.ndim)]


def _describe_index(indices: Sequence[int], axes: Sequence[str]) -> str:
    names = axes if len(axes) == len(indices) else [f"axis {k}" for k in range(len(indices))]
    return ", ".join(f"{name} {index}" for name, index in zip(names, indices, strict=True))


def assert_tensors_match(
    got: Tensor,
    expected: Tensor,
    what: str,
    cause: str,
    *,
    real: Tensor | None = None,
    tolerance: float | None = None,
    axes: Sequence[str] = LOGITS,
) -> None:
    """Raise AssertionError if two tensors differ; `what` begins the message and `cause` ends it."""
    difference = describe_difference(got, expected, real=real, tolerance=tolerance, axes=axes)
    if difference is not None:
        raise AssertionError(f"{what}: {difference}. Likely cause: {cause}.")


def assert_outputs_match(
    model: nn.Module,
    batch: Mapping[str, Any],
    got: Tensor,
    expected: Tensor,
    what: str,
    cause: str,
    tolerance: float | None,
) -> None:
    """Raise AssertionError if two outputs of a batch differ at a real token."""
    real, what = real_token_mask(batch, expected), f"{what}{padding_suffix(batch)}"
    assert_tensors_match(got, expected, what, cause, real=real, tolerance=tolerance, axes=output_axes(model))


@contextmanager
def reproducible_eval(model: nn.Module, *, restore: bool = True) -> Iterator[None]:
    """Run a model in evaluation mode without gradients, and restore the random state.

    With `restore`, attributes that forward passes change are restored as well. PyTorch's encoders do not use their
    fused implementation if a block has a hook, so it is disabled to compare equal sums.
    """
    with exclusive_global_state(), inference(model, restore=restore), torch.random.fork_rng(devices=[]):
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def is_transformers_model(model: nn.Module) -> bool:
    """Whether a model has a Transformers configuration."""
    return callable(getattr(getattr(model, "config", None), "get_text_config", None))


def batch_kwargs(model: nn.Module, batch: Batch | Tensor) -> dict[str, Any]:
    """Return a batch as keyword arguments of the forward; a bare tensor is the first argument."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return {next(iter(inspect.signature(model.forward).parameters)): batch}


def make_batches(model: nn.Module, batch: Batch | Tensor | None, *, left_padded: bool) -> list[dict[str, Any]]:
    """Return `batch`, or random batches for the model, one of them left-padded if `left_padded`."""
    if batch is not None:
        return [batch_kwargs(model, batch)]
    if not is_transformers_model(model):
        parameters = ", ".join(inspect.signature(model.forward).parameters)
        raise StreamlineError(
            f"No batch can be generated for {type(model).__name__}, because it is not a Transformers model. Pass the "
            f"arguments of its forward by name: batch={{...}} with some of {parameters}."
        )
    return [tiny_inputs(model, left_padding=padding) for padding in ((False, True) if left_padded else (False,))]


def output_tensor(output: Any) -> Tensor:
    """Return the logits of a model's output, or the last hidden states if it has no logits."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return padded(read_output(output))


def model_output(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Run a model without a cache and return its logits (batch, tokens, vocabulary) or last hidden states."""
    return output_tensor(model(**prepare_inputs(model, batch)))


def real_token_mask(batch: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """Return the mask of real tokens of a batch, boolean (batch, tokens); None if unknown."""
    has_decoder = isinstance(batch.get("decoder_input_ids"), Tensor)
    mask = batch.get("decoder_attention_mask") if has_decoder else padding_mask(batch)
    if like.ndim < 3 or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != like.shape[:2]:
        return None
    return mask.bool()


def output_axes(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the axes of a model's output."""
    return LOGITS if is_transformers_model(model) else STATES


def padding_suffix(batch: Mapping[str, Any]) -> str:
    """Return the end of a message that names the padding side, or an empty string without padding."""
    mask = padding_mask(batch)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.bool().all()):
        return ""
    return " of a left-padded batch" if not bool(mask[:, 0].bool().all()) else " of a right-padded batch"


def state_width(module: nn.Module, features: int | None) -> int:
    """Return `features` or the module's attribute ``features``; raise if neither is a positive integer."""
    width = getattr(module, "features", None) if features is None else features
    if not isinstance(width, int) or width < 1:
        raise StreamlineError(
            f"The width of the states of {type(module).__name__} is unknown. Expected a positive integer. Pass "
            "features=... for a module that maps (batch, tokens, features) to the same shape, or batch={...} with the "
            "arguments of the forward for a model that is not a Transformers model."
        )
    return width


def random_states(module: nn.Module, rows: int, tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    """Return random states of shape (rows, tokens, features) on the module's device."""
    states = torch.randn(rows, tokens, features, generator=torch.Generator().manual_seed(0))
    return states.to(device=_first_tensor(module).device, dtype=dtype)


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first floating-point tensor; float32 if it has none."""
    return _first_tensor(module).dtype


def _first_tensor(module: nn.Module) -> Tensor:
    floating = (t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())
    return next(floating, torch.empty(0, dtype=torch.float32))


def call_module(module: nn.Module, states: Tensor) -> Any:
    """Call a module on states with fixed random numbers; raise AssertionError with the shape if it fails."""
    call: Callable[[Tensor], Any] = module
    try:
        with seeded_sampling(states.device, "assertion"):
            return call(states)
    except Exception as error:
        raise AssertionError(
            f"{type(module).__name__} fails on states of shape {tuple(states.shape)} (batch, tokens, features) in "
            f"{states.dtype}: {type(error).__name__}: {error}. Expected: an output of the same shape. Likely cause: it "
            "takes more arguments than the states (test the model that contains it), or features is not its width."
        ) from error
