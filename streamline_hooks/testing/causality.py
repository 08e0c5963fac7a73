"""Assert that no token depends on a later token, and no row of a batch on another row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, prepare_inputs
from streamline_hooks.modeling import by_token, find_stack, padded, require_batch_first, seeded_sampling
from streamline_hooks.recording import HiddenStateRecorder
from streamline_hooks.testing.compare import (
    TOKEN_TOLERANCE,
    call_module,
    describe_token_difference,
    floating_dtype,
    is_transformers_model,
    make_batches,
    output_axes,
    output_tensor,
    random_states,
    real_token_mask,
    reproducible_eval,
    state_width,
)

_LATER_FAULT = "uses later tokens: pass a causal mask"
_ROWS_FAULT = "mixes the rows of a batch: compute sums and means over features or earlier tokens, not over axis 0"
_PADDING_FAULT = "treats padding as tokens: pass the attention mask on, with 1 (or True) for real tokens"


@dataclass(frozen=True)
class _Perturbation:
    """A change of the input, the mask of outputs that must not change, and the likely fault if they do."""

    description: str
    changed: Tensor
    unaffected: Tensor
    fault: str


def assert_causal(
    model_or_module: nn.Module,
    batch: Batch | Tensor | None = None,
    *,
    features: int | None = None,
    tokens: int = 12,
    changed_tokens: Iterable[int] | None = None,
    tolerance: float | None = None,
    stack: str | None = None,
) -> None:
    """Assert that no output depends on a later token or on another row of the batch.

    Tokens are changed one at a time, and the outputs at earlier tokens must not change. Then rows are changed one at a
    time, and the outputs of the other rows must not change. In a padded batch the padding is changed too, and the
    outputs at real tokens must not change.

    Shapes and random numbers are the same in all runs, so a correct model returns the same bits. The noise of the model
    is measured by two runs on the unchanged input and added to the tolerance, so the assertion also works in half
    precision. Runs that differ by more than 5 % of a token's norm cannot be compared, and the assertion fails. A module
    receives a copy of its input, which it may modify in place. In an encoder-decoder model, the
    decoder's tokens are changed.

    Parameters
    ----------
    model_or_module : torch.nn.Module
        A Transformers model, any model together with a batch, or a module that maps states of (batch, tokens,
        features).
    batch : mapping or torch.Tensor, optional
        Inputs of the model's forward. Default for a Transformers model: random tokens.
    features : int, optional
        Width of the module's states. Default: the attribute ``features`` of the module.
    tokens : int
        Number of tokens on which a module is run.
    changed_tokens : iterable of int, optional
        Indices of the tokens to change. Default: the second, the middle and the last token.
    tolerance : float, optional
        Allowed change of a token relative to its norm, in addition to the model's noise. Default: 1e-5 for float32 and
        1e-4 for half precision. A mixture of experts whose kernels depend on the number of tokens per expert may need
        more.
    stack : str, optional
        Path of the block stack in which the first affected block is searched, see `find_stack`.

    Raises
    ------
    AssertionError
        If an output changes. The message contains the block or module, the largest difference and its position.
    StreamlineError
        If the width of a module is unknown, a token is out of range, or a model returns no output per token, such as a
        classifier.

    Examples
    --------
    >>> from torch import nn
    >>> from streamline_hooks.testing import assert_causal, tiny_model
    >>> assert_causal(nn.Linear(8, 8), features=8)
    >>> assert_causal(tiny_model("llama", blocks=3))
    >>> class Mean(nn.Module):
    ...     def forward(self, state):
    ...         return state + state.mean(dim=1, keepdim=True)
    >>> assert_causal(Mean(), features=8)
    Traceback (most recent call last):
    ...
    AssertionError: Token 1 of 12 was changed, and the output of Mean at earlier tokens changed: ... uses later
    tokens...
    """
    if batch is None and not is_transformers_model(model_or_module):
        _check_module(model_or_module, state_width(model_or_module, features), tokens, changed_tokens, tolerance)
        return
    require_batch_first(find_stack(model_or_module, stack)[0])
    for inputs in make_batches(model_or_module, batch, left_padded=False):
        _check_model(model_or_module, inputs, changed_tokens, tolerance, stack)


def _check_module(
    module: nn.Module, features: int, tokens: int, changed_tokens: Iterable[int] | None, tolerance: float | None
) -> None:
    dtype, name = floating_dtype(module), type(module).__name__
    states = random_states(module, 2, tokens, features, dtype)
    with reproducible_eval(module):
        expected = call_module(module, states.clone())
        if not isinstance(expected, Tensor) or expected.shape[:2] != states.shape[:2]:
            raise AssertionError(
                f"{name} does not return one output per token for states of shape {tuple(states.shape)} (batch, "
                "tokens, features). Likely cause: see assert_shapes(module)."
            )
        again = call_module(module, states.clone())
        for trial in _perturbations(states, _different_input(states), None, changed_tokens):
            output = call_module(module, trial.changed.clone())
            difference = describe_token_difference(output, expected, again, trial.unaffected, tolerance)
            if difference is not None:
                raise AssertionError(f"{trial.description % name}: {difference}. Likely cause: {name} {trial.fault}.")


def _check_model(
    model: nn.Module,
    batch: Mapping[str, Any],
    changed_tokens: Iterable[int] | None,
    tolerance: float | None,
    stack: str | None,
) -> None:
    inputs = prepare_inputs(model, batch)
    name = _input_name(model, inputs)
    original = inputs[name]
    other = _different_input(original)

    def run(values: Tensor) -> Tensor:
        with seeded_sampling(values.device, "assertion"):  # every run uses the same random numbers
            return output_tensor(model(**{**inputs, name: values.clone()}))

    with reproducible_eval(model):
        expected = run(original)
        if expected.ndim < 3 or expected.shape[:2] != original.shape[:2]:
            raise StreamlineError(
                f"{type(model).__name__} returns the shape {tuple(expected.shape)} for {name} of shape "
                f"{tuple(original.shape)}. Expected one output per token, (batch, tokens, ...). For a classifier, "
                "which returns one output per sequence, pass its base model."
            )
        again = run(original)
        real = real_token_mask(inputs, expected)
        for trial in _perturbations(original, other, real, changed_tokens):
            difference = describe_token_difference(
                run(trial.changed), expected, again, trial.unaffected, tolerance, output_axes(model)
            )
            if difference is not None:
                location = _first_affected_block(model, inputs, name, trial, tolerance, stack)
                raise AssertionError(
                    f"{trial.description % type(model).__name__}: {difference}. {location}. Likely cause: the module "
                    f"there {trial.fault}."
                )


def _perturbations(
    original: Tensor, other: Tensor, real: Tensor | None, changed_tokens: Iterable[int] | None
) -> Iterator[_Perturbation]:
    rows, length = original.shape[:2]
    real_tokens = torch.ones(rows, length, dtype=torch.bool) if real is None else real.cpu()
    positions = (1, length // 2, length - 1) if changed_tokens is None else tuple(changed_tokens)
    for t in dict.fromkeys(positions):
        if not 0 <= t < length:
            raise StreamlineError(
                f"changed_tokens contains {t}, but there are {length} tokens. Expected 0 to {length - 1}. Choose "
                "another."
            )
        earlier = real_tokens.clone()
        earlier[:, t:] = False
        changed = original.clone()
        changed[:, t] = other[:, t]
        if bool(earlier.any()):
            yield _Perturbation(
                f"Token {t} of {length} was changed, and the output of %s at earlier tokens changed",
                changed,
                earlier,
                _LATER_FAULT,
            )
    for row in range(rows if rows > 1 else 0):
        others = real_tokens.clone()
        others[row] = False
        changed = original.clone()
        changed[row] = other[row]
        yield _Perturbation(
            f"Row {row} of the batch was changed, and the output of %s for another row changed",
            changed,
            others,
            _ROWS_FAULT,
        )
    if not bool(real_tokens.all()):
        padding = ~real_tokens.to(original.device)
        changed = torch.where(padding[(...,) + (None,) * (original.ndim - 2)], other, original)
        yield _Perturbation(
            "The padding was changed, and the output of %s at real tokens changed", changed, real_tokens, _PADDING_FAULT
        )


def _input_name(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Return the name of the argument with the tokens or embeddings; for an encoder-decoder model, the decoder's."""
    for name in ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids"):
        if isinstance(inputs.get(name), Tensor):
            return name
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim >= 2 and "mask" not in name:
            return name
    raise StreamlineError(
        f"The batch ({', '.join(inputs)}) contains no tokens for {type(model).__name__}. Expected a tensor of shape "
        "(batch, tokens) or (batch, tokens, features) that is not a mask. Pass input_ids."
    )


def _different_input(original: Tensor) -> Tensor:
    """Return an input that differs at every position: other tokens of the batch, or other random states."""
    if original.is_floating_point():
        generator = torch.Generator().manual_seed(1)
        return original + 10 * torch.randn(original.shape, generator=generator).to(original)
    vocabulary = original.unique()
    if len(vocabulary) < 2:
        raise StreamlineError("All tokens of the batch are equal. Expected at least two different tokens. Change one.")
    other: Tensor = vocabulary[(torch.searchsorted(vocabulary, original) + len(vocabulary) // 2) % len(vocabulary)]
    return other


def _first_affected_block(
    model: nn.Module,
    inputs: Mapping[str, Any],
    name: str,
    trial: _Perturbation,
    tolerance: float | None,
    stack: str | None,
) -> str:
    """Describe the first block whose state changes."""
    records: list[HiddenStateRecorder] = []
    for values in (trial.changed, inputs[name], inputs[name]):
        with HiddenStateRecorder(model, stack=stack) as record, seeded_sampling(values.device, "assertion"):
            model(**{**inputs, name: values.clone()})
        records.append(record)
    blocks, tokens = records[0].stack, trial.unaffected.shape[1]
    for k in range(len(blocks)):
        for direction, attribute in (("enters", "inputs"), ("leaves", "outputs")):
            for visit in zip(*(getattr(record, attribute)[k] for record in records), strict=True):
                got, expected, again = (by_token(padded(state, tokens), blocks[k]) for state in visit)
                # Stricter than for the output: a change relative to a very large norm is small here, but later norms
                # amplify it.
                fraction = TOKEN_TOLERANCE.get(got.dtype, 0.0) / 100 if tolerance is None else tolerance
                if describe_token_difference(got, expected, again, trial.unaffected, fraction) is None:
                    continue
                note = " (a splice before it, or a module before the stack)" if direction == "enters" else ""
                return f"The first state to change is the one that {direction} block {k} ({blocks.path}.{k}){note}"
    return "No state of a block changed, so the fault is after the stack, in the final norm or the head"
