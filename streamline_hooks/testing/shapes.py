"""Assert the shapes, dtypes and devices of the outputs of a replacement or a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, device_of, prepare_inputs
from streamline_hooks.modeling import by_token, find_stack, padded, require_batch_first
from streamline_hooks.recording import HiddenStateRecorder
from streamline_hooks.testing.compare import (
    GREEDY_OPTIONS,
    batch_kwargs,
    call_module,
    floating_dtype,
    is_transformers_model,
    output_tensor,
    random_states,
    real_token_mask,
    reproducible_eval,
    state_width,
)
from streamline_hooks.testing.tiny_models import tiny_inputs

SIZES = ((1, 1), (2, 1), (1, 7), (3, 12))


def assert_shapes(
    model_or_module: nn.Module,
    batch: Batch | Tensor | None = None,
    *,
    features: int | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES,
    dtypes: Iterable[torch.dtype] | None = None,
    new_tokens: int = 3,
    stack: str | None = None,
) -> None:
    """Assert that a replacement or a model returns outputs of the right shape without NaN.

    A replacement (any module that maps states) must map states of (batch, tokens, features) to a tensor of the same
    shape, dtype and device. In a model, the states of all blocks must have the shape (batch, tokens, features) with the
    same width and dtype, the logits must have the shape (batch, tokens, vocabulary), and ``generate`` must add the
    requested number of tokens.

    Parameters
    ----------
    model_or_module : torch.nn.Module
        A Transformers model, any model together with a batch, or a replacement.
    batch : mapping or torch.Tensor, optional
        Inputs of the model's forward. Default for a Transformers model: random tokens in each of the sizes.
    features : int, optional
        Width of the replacement's states. Default: the attribute ``features`` of the replacement.
    sizes : sequence of (int, int)
        Pairs of batch size and number of tokens. Decoding with a cache uses one token.
    dtypes : iterable of torch.dtype, optional
        Dtypes in which a copy of the replacement is tested. Default: its dtype and bfloat16, to which surgery may cast
        it.
    new_tokens : int
        Number of tokens to generate with a model. Pass 0 for a model that cannot generate.
    stack : str, optional
        Path of the block stack, see `find_stack`.

    Raises
    ------
    AssertionError
        If an output is wrong. The message contains the module or block, the output, and what was expected.
    StreamlineError
        If the width of a replacement is unknown, or a model's output has no token axis, such as that of a classifier.
        In the second case the states of the blocks were tested.

    Examples
    --------
    >>> from torch import nn
    >>> from streamline_hooks.testing import assert_shapes, tiny_model
    >>> assert_shapes(nn.Linear(8, 8), features=8)
    >>> assert_shapes(tiny_model("llama", blocks=3))
    >>> assert_shapes(nn.Linear(8, 4), features=8)
    Traceback (most recent call last):
    ...
    AssertionError: Linear returns the shape (1, 1, 4) for states of shape (1, 1, 8); expected the same shape, ...
    """
    model, is_known = model_or_module, is_transformers_model(model_or_module)
    if batch is None and not is_known:
        chosen_dtypes = dict.fromkeys((floating_dtype(model), torch.bfloat16)) if dtypes is None else dtypes
        _check_module(model, state_width(model, features), sizes, list(chosen_dtypes))
        return
    if batch is None:
        batches = [tiny_inputs(model, batch=rows, tokens=tokens) for rows, tokens in sizes]
    else:
        batches = [batch_kwargs(model, batch)]
    for inputs in batches:
        _check_model(model, inputs, stack)
    if new_tokens and is_known and callable(getattr(model, "generate", None)):
        for inputs in batches:
            _check_generation(model, inputs, new_tokens)


def _check_module(
    module: nn.Module, features: int, sizes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]
) -> None:
    name = type(module).__name__
    for dtype in dtypes:
        candidate = copy.deepcopy(module).to(dtype)
        with reproducible_eval(candidate):
            for rows, tokens in sizes:
                states = random_states(candidate, rows, tokens, features, dtype)
                output = call_module(candidate, states)
                if not isinstance(output, Tensor):
                    raise AssertionError(
                        f"{name} returns a {type(output).__name__}; expected a tensor of the shape of its input. "
                        "Likely cause: it returns a tuple, as blocks do; return the first element."
                    )
                if output.shape != states.shape:
                    cause = "its last projection has a different width"
                    if output.ndim != states.ndim:
                        cause = "a squeeze() or an index removes an axis of length 1; name the axis to remove"
                    elif output.shape[1] != tokens:
                        cause = "it changes the number of tokens"
                    raise AssertionError(
                        f"{name} returns the shape {tuple(output.shape)} for states of shape {tuple(states.shape)}; "
                        f"expected the same shape, (batch, tokens, features). Likely cause: {cause}."
                    )
                if output.dtype != dtype or output.device != states.device:
                    raise AssertionError(
                        f"{name} returns {output.dtype} on {output.device} for states in {dtype} on {states.device}; "
                        "expected the same. Likely cause: it computes in a different precision without casting back "
                        "(.to(state.dtype)), or has a tensor that is neither a parameter nor a buffer."
                    )
                _require_finite(output, f"The output of {name} for {rows} x {tokens} tokens in {dtype}", None)


def _check_model(model: nn.Module, batch: Mapping[str, Any], stack: str | None) -> None:
    blocks = find_stack(model, stack)
    require_batch_first(blocks[0])
    inputs = prepare_inputs(model, batch)
    with reproducible_eval(model), HiddenStateRecorder(model, stack=stack) as record:
        output = output_tensor(model(**inputs))
    rows, tokens = _rows_and_tokens(model, inputs, record.inputs[0][0], blocks[0])
    real = real_token_mask(inputs, output)
    width, dtype = None, None
    for k in range(len(blocks)):
        for direction, visits in (("enters", record.inputs[k]), ("leaves", record.outputs[k])):
            for state in visits:
                value = by_token(padded(state, tokens), blocks[k])
                subject = f"The state that {direction} block {k} of {type(model).__name__}"
                width, dtype = width or value.shape[-1], dtype or value.dtype
                if tuple(value.shape) != (rows, tokens, width):
                    raise AssertionError(
                        f"{subject} has the shape {tuple(value.shape)} for a batch of {rows} x {tokens} tokens; "
                        f"expected {(rows, tokens, width)}, (batch, tokens, features). Likely cause: the module there "
                        "changes the number of tokens or removes an axis. Test the module alone with "
                        "assert_shapes(module)."
                    )
                if value.dtype != dtype:
                    raise AssertionError(
                        f"{subject} is in {value.dtype}; expected {dtype}, as for the state that enters block 0. "
                        "Likely cause: the module there does not cast its output to the dtype of its input."
                    )
                _require_finite(value, subject, real if real is not None and real.shape == value.shape[:2] else None)
    decoded = inputs.get("decoder_input_ids")  # the logits belong to these tokens, the states of an encoder do not
    rows, tokens = decoded.shape if isinstance(decoded, Tensor) else (rows, tokens)
    _check_output(model, output, rows, tokens, real)


def _rows_and_tokens(model: nn.Module, inputs: Mapping[str, Any], first: Tensor, block: nn.Module) -> tuple[int, int]:
    """Return the batch size and number of tokens of the states, read from the text or the first block's input."""
    ids = inputs.get("input_ids")
    is_text = isinstance(ids, Tensor) and ids.ndim == 2 and _has_output_embeddings(model)
    if first.is_nested or (is_text and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        first = next(value for value in inputs.values() if isinstance(value, Tensor) and value.ndim >= 2)
    elif first.ndim >= 3:
        first = by_token(first, block)
    rows, tokens = first.shape[:2]
    return rows, tokens


def _check_output(model: nn.Module, output: Tensor, rows: int, tokens: int, real: Tensor | None) -> None:
    name = type(model).__name__
    has_logits = is_transformers_model(model) and _has_output_embeddings(model)
    if output.ndim < 3 and not has_logits:
        raise StreamlineError(
            f"{name} returns the shape {tuple(output.shape)}, which has no token axis. Expected (batch, tokens, ...). "
            f"The states of its blocks are correct for {rows} x {tokens} tokens. For a classifier, which returns one "
            "output per sequence, pass its base model to test the output too."
        )
    last = output.shape[-1]
    if has_logits:
        config: Any = model.config
        last = config.get_text_config(decoder=True).vocab_size
    if tuple(output.shape) != (rows, tokens, last):
        raise AssertionError(
            f"{name} returns the shape {tuple(output.shape)} for a batch of {rows} x {tokens} tokens; expected "
            f"{(rows, tokens, last)}, (batch, tokens, vocabulary). Likely cause: its head and vocab_size of its "
            "configuration belong to different models, or a module between the blocks removes an axis."
        )
    if output.device != device_of(model):
        raise AssertionError(
            f"{name} returns a tensor on {output.device}; expected the model's device, {device_of(model)}."
        )
    _require_finite(output, f"The output of {name}", real)


def _has_output_embeddings(model: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", None)
    return callable(head) and head() is not None


def _require_finite(values: Tensor, what: str, real: Tensor | None) -> None:
    is_nan = values.isnan()
    if real is not None:
        is_nan = is_nan & real.to(is_nan.device)[..., None]
    if bool(is_nan.any()):
        index = is_nan.nonzero()[0].tolist()
        raise AssertionError(
            f"{what} contains NaN, first at batch {index[0]}, token {index[1]}, feature {index[2]}. Expected: no "
            "NaN. Likely cause: a division by a standard deviation or sum of zero, or an overflow."
        )


def _check_generation(model: nn.Module, batch: Mapping[str, Any], new_tokens: int) -> None:
    generate, ids = cast(Any, model.generate), batch["input_ids"]
    inputs = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
    if getattr(model.config, "is_encoder_decoder", False):  # the generated text does not continue the input
        config: Any = model.generation_config
        starts = (config.decoder_start_token_id, config.bos_token_id, int(batch.get("decoder_input_ids", ids)[0, 0]))
        inputs["decoder_start_token_id"] = next(start for start in starts if start is not None)
        ids = torch.full((len(ids), 1), inputs["decoder_start_token_id"])
    with reproducible_eval(model):
        sequences = generate(
            **inputs,
            **GREEDY_OPTIONS,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            return_dict_in_generate=False,
        )
    expected = (ids.shape[0], ids.shape[1] + new_tokens)
    if tuple(sequences.shape) != expected or not torch.equal(sequences[:, : ids.shape[1]].to(ids), ids):
        raise AssertionError(
            f"{type(model).__name__}.generate returns the shape {tuple(sequences.shape)} for input_ids of "
            f"{tuple(ids.shape)} and {new_tokens} new tokens; expected {expected}, beginning with the input. Likely "
            "cause: a generation configuration that stops early, or a forward pass that does not return one row per "
            "sequence."
        )
