"""Assert shapes, dtypes and devices of a replacement's or a model's output."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, device_of, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import padded, require_batch_first
from streamline_hooks.layouts import by_token
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.stack import find_stack
from streamline_hooks.testing.assertions.running import (
    GREEDILY,
    answer_of,
    called_on,
    features_of,
    is_model,
    is_transformers_model,
    named_batch,
    precision_of,
    quietly,
    real_places,
    states_for,
)
from streamline_hooks.testing.tiny import tiny_inputs

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
    """Assert that a replacement, or a model, keeps shapes, and gives no NaN.

    A replacement (any module that maps states) must return, for states of (batch, tokens, features), a tensor of the
    same shape, dtype and device. In a model every block's state must be (batch, tokens, features), of one width and
    one dtype, the logits (batch, tokens, vocabulary), and ``generate`` must lengthen a batch by what it was told to.

    Parameters
    ----------
    model_or_module : torch.nn.Module
        A model is a Transformers model, or what comes with a batch; anything else is a replacement.
    batch : mapping or torch.Tensor, optional
        What a model's forward takes. Made up for a Transformers model, of each of the sizes.
    features : int, optional
        Width of a replacement's states; by default its own attribute ``features``.
    sizes : sequence of (int, int)
        Batch sizes and numbers of tokens; one token is what decoding with a cache runs on.
    dtypes : iterable of torch.dtype, optional
        In which a copy of a replacement is tried; by default its own and bfloat16, which surgery may cast it to.
    new_tokens : int
        How many tokens a model generates; 0 for a model that cannot.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Raises
    ------
    AssertionError
        With the module or block, what it gave, and what was expected.
    StreamlineError
        If the width of a replacement's states is not known, or a model's answer has no axis of tokens, as a
        classifier's; its blocks' states have been looked at then.

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
    if not is_model(model_or_module, batch):
        chosen = dict.fromkeys((precision_of(model_or_module), torch.bfloat16)) if dtypes is None else dtypes
        _hold_module(model_or_module, features_of(model_or_module, features), sizes, list(chosen))
        return
    given = (
        [named_batch(model_or_module, batch)]
        if batch is not None
        else [tiny_inputs(model_or_module, batch=rows, tokens=tokens) for rows, tokens in sizes]
    )
    for one in given:
        _hold_model(model_or_module, one, stack)
    if new_tokens and is_transformers_model(model_or_module) and callable(getattr(model_or_module, "generate", None)):
        for one in given:
            _hold_generation(model_or_module, one, new_tokens)


def _hold_module(
    module: nn.Module, features: int, sizes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]
) -> None:
    name = type(module).__name__
    for dtype in dtypes:
        tried = copy.deepcopy(module).to(dtype)
        with quietly(tried):
            for rows, tokens in sizes:
                states = states_for(tried, rows, tokens, features, dtype)
                got = called_on(tried, states)
                if not isinstance(got, Tensor):
                    raise AssertionError(
                        f"{name} returns a {type(got).__name__}; expected a tensor of the shape of its states. Likely "
                        "cause: it returns a tuple, as blocks do; return its first element."
                    )
                if got.shape != states.shape:
                    raise AssertionError(
                        f"{name} returns the shape {tuple(got.shape)} for states of shape {tuple(states.shape)}; "
                        "expected the same shape, (batch, tokens, features). Likely cause: "
                        f"{_shape_cause(got, states)}."
                    )
                if got.dtype != dtype or got.device != states.device:
                    raise AssertionError(
                        f"{name} returns {got.dtype} on {got.device} for states in {dtype} on {states.device}; "
                        "expected the same. Likely cause: it computes in another precision and does not cast back "
                        "(.to(state.dtype)), or holds a tensor that is neither parameter nor buffer."
                    )
                _require_finite(got, f"What {name} returns for {rows} x {tokens} tokens in {dtype}", None)


def _shape_cause(got: Tensor, states: Tensor) -> str:
    if got.ndim != states.ndim:
        return "a squeeze() or an index drops an axis of length 1; name the axis that shall go"
    if got.shape[1] != states.shape[1]:
        return "it changes the number of tokens"
    return "its last projection has another width"


def _hold_model(model: nn.Module, batch: Mapping[str, Any], stack: str | None) -> None:
    blocks = find_stack(model, stack)
    require_batch_first(blocks[0])
    given = prepare(model, batch)
    with quietly(model), HiddenStateRecorder(model, stack=stack) as record:
        answer = answer_of(model(**given))
    rows, tokens = _rows_and_tokens(model, given, record.inputs[0][0], blocks[0])
    real = real_places(given, answer)
    width, dtype = None, None
    for k in range(len(blocks)):
        for what, visits in (("enters", record.inputs[k]), ("leaves", record.outputs[k])):
            for state in visits:
                held = by_token(padded(state, tokens), blocks[k])
                where = f"The state that {what} block {k} of {type(model).__name__}"
                width, dtype = width or held.shape[-1], dtype or held.dtype
                if tuple(held.shape) != (rows, tokens, width):
                    raise AssertionError(
                        f"{where} has the shape {tuple(held.shape)} for a batch of {rows} x {tokens} tokens; "
                        f"expected {(rows, tokens, width)}, (batch, tokens, features). Likely cause: what runs there "
                        "changes the number of tokens or drops an axis; hold it alone with assert_shapes(module)."
                    )
                if held.dtype != dtype:
                    raise AssertionError(
                        f"{where} is in {held.dtype}; expected {dtype}, as the state that enters block 0. Likely "
                        "cause: what runs there does not cast back to the dtype of its input."
                    )
                _require_finite(held, where, real if real is not None and real.shape == held.shape[:2] else None)
    decoded = given.get("decoder_input_ids")  # what an encoder's states are not of
    rows, tokens = decoded.shape if isinstance(decoded, Tensor) else (rows, tokens)
    _hold_answer(model, answer, rows, tokens, real)


def _rows_and_tokens(model: nn.Module, given: Mapping[str, Any], first: Tensor, block: nn.Module) -> tuple[int, int]:
    """Return the batch size and number of tokens of the states: those of the text, or of the first block's input."""
    ids = given.get("input_ids")
    of_text = isinstance(ids, Tensor) and ids.ndim == 2 and _gives_logits(model)
    if first.is_nested or (of_text and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        first = next(value for value in given.values() if isinstance(value, Tensor) and value.ndim >= 2)
    elif first.ndim >= 3:
        first = by_token(first, block)
    rows, tokens = first.shape[:2]
    return rows, tokens


def _hold_answer(model: nn.Module, answer: Tensor, rows: int, tokens: int, real: Tensor | None) -> None:
    name = type(model).__name__
    of_tokens = is_transformers_model(model) and _gives_logits(model)
    if answer.ndim < 3 and not of_tokens:
        raise StreamlineError(
            f"A {name} answers with the shape {tuple(answer.shape)}, which has no axis of tokens, as a classifier's "
            f"one answer a sequence: it cannot be held against (batch, tokens, ...). The states of its blocks, {rows} "
            f"x {tokens} tokens, are as they should be; to look at an answer too, give the model inside it."
        )
    last = answer.shape[-1]
    if of_tokens:
        config: Any = model.config
        last = config.get_text_config(decoder=True).vocab_size
    if tuple(answer.shape) != (rows, tokens, last):
        raise AssertionError(
            f"{name} gives the shape {tuple(answer.shape)} for a batch of {rows} x {tokens} tokens; expected "
            f"{(rows, tokens, last)}, (batch, tokens, vocabulary). Likely cause: its head and its configuration's "
            "vocab_size are of different models, or something between the blocks drops an axis."
        )
    if answer.device != device_of(model):
        raise AssertionError(f"{name} answers on {answer.device}; expected {device_of(model)}, where it is.")
    _require_finite(answer, f"What {name} answers", real)


def _gives_logits(model: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", None)
    return callable(head) and head() is not None


def _require_finite(values: Tensor, what: str, real: Tensor | None) -> None:
    bad = values.isnan()
    if real is not None:
        bad = bad & real.to(bad.device)[..., None]
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise AssertionError(
            f"{what} holds NaN, first at batch {place[0]}, token {place[1]}, feature {place[2]}. Expected: numbers. "
            "Likely cause: a division by a deviation or a sum that is zero for one token, or an overflow."
        )


def _hold_generation(model: nn.Module, batch: Mapping[str, Any], new_tokens: int) -> None:
    generate, ids = cast(Any, model.generate), batch["input_ids"]
    given = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
    if getattr(model.config, "is_encoder_decoder", False):  # what it writes does not go on from what it reads
        said: Any = model.generation_config
        starts = (said.decoder_start_token_id, said.bos_token_id, int(batch.get("decoder_input_ids", ids)[0, 0]))
        given["decoder_start_token_id"] = next(start for start in starts if start is not None)
        ids = torch.full((len(ids), 1), given["decoder_start_token_id"])
    with quietly(model):
        made = generate(
            **given, **GREEDILY, max_new_tokens=new_tokens, min_new_tokens=new_tokens, return_dict_in_generate=False
        )
    expected = (ids.shape[0], ids.shape[1] + new_tokens)
    if tuple(made.shape) != expected or not torch.equal(made[:, : ids.shape[1]].to(ids), ids):
        raise AssertionError(
            f"{type(model).__name__}.generate gives the shape {tuple(made.shape)} for tokens of {tuple(ids.shape)} and "
            f"{new_tokens} new ones; expected {expected}, beginning with the tokens that were given. Likely cause: a "
            "generation configuration that stops early, or a forward that does not return one row a sequence."
        )
