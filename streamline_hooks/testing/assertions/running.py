"""Run a model as the assertions do: on a batch, without dropout, to an answer that can be compared."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare, real_tokens
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import padded, read_output
from streamline_hooks.passes import inference
from streamline_hooks.testing.assertions.difference import LOGITS, STATES
from streamline_hooks.testing.inputs import tiny_inputs


@contextmanager
def quietly(model: nn.Module, *, restore: bool = True) -> Iterator[None]:
    """Without gradients and dropout, with the random numbers left as they were.

    What forwards change in the model is undone if `restore` is true.

    PyTorch's own encoders have a fused way that they leave as soon as a block has a hook; it is switched off, so that
    a forward with hooks and one without take the same sums.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with inference(model, restore=restore), torch.random.fork_rng(devices=[]):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def is_transformers_model(model: nn.Module) -> bool:
    """Whether a model has a configuration of Transformers, which says what its vocabulary is."""
    return callable(getattr(getattr(model, "config", None), "get_text_config", None))


def named_batch(model: nn.Module, batch: Batch | Tensor) -> dict[str, Any]:
    """A batch as the arguments of a forward, by name; a tensor alone is the first one."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return {next(iter(inspect.signature(model.forward).parameters)): batch}


def batches_for(model: nn.Module, batch: Batch | Tensor | None, *, left_padded: bool) -> list[dict[str, Any]]:
    """What a model is run on: the given batch, or tokens that are made up for it.

    Parameters
    ----------
    model : torch.nn.Module
    batch : mapping, torch.Tensor or None
    left_padded : bool
        Whether a left-padded batch is made up as well.

    Raises
    ------
    StreamlineError
        If no batch was given and none can be made up.
    """
    if batch is not None:
        return [named_batch(model, batch)]
    if not is_transformers_model(model):
        takes = ", ".join(inspect.signature(model.forward).parameters)
        raise StreamlineError(
            f"No batch can be made up for a {type(model).__name__}, which is no Transformers model. Give what its "
            f"forward takes, by name: batch={{...}} with some of {takes}."
        )
    batches = [tiny_inputs(model)]
    return [*batches, tiny_inputs(model, left_padding=True)] if left_padded else batches


def run(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What a model returns for a batch, without a cache and with the positions of the real tokens."""
    return model(**prepare(model, batch))


def answer_of(output: Any) -> Tensor:
    """The logits; of a model without a head its last states.

    Raises
    ------
    StreamlineError
        If a model returned neither.
    """
    for name in ("logits", "last_hidden_state"):
        answer = getattr(output, name, None)
        if isinstance(answer, Tensor):
            return answer
    return padded(read_output(output))


def answer(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The answer of a model to a batch: logits of shape (batch, tokens, vocabulary), or its last states."""
    return answer_of(run(model, batch))


def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The same without gradients, for callers that are not inside `quietly`."""
    with torch.no_grad():
        return answer(model, batch)


def real_places(batch: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """Which tokens of a batch are real, boolean, of shape (batch, tokens); None where all are, or none can tell.

    Of an encoder with a decoder, those of what is decoded.
    """
    decodes = isinstance(batch.get("decoder_input_ids"), Tensor)
    mask = batch.get("decoder_attention_mask") if decodes else real_tokens(batch)
    if like.ndim < 3 or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != like.shape[:2]:
        return None
    return mask.bool()


def axes_of(model: nn.Module) -> tuple[str, ...]:
    """What the axes of a model's answer are called."""
    return LOGITS if is_transformers_model(model) else STATES


def padding_said(batch: Mapping[str, Any]) -> str:
    """How a message calls a batch."""
    mask = real_tokens(batch)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.bool().all()):
        return ""
    return " of a left-padded batch" if not bool(mask[:, 0].bool().all()) else " of a right-padded batch"
