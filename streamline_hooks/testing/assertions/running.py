"""Run a model or module for the assertions, and read an output that can be compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare, real_tokens
from streamline_hooks.errors import StreamlineError
from streamline_hooks.generation import seeded
from streamline_hooks.hidden_state import padded, read_output
from streamline_hooks.passes import inference
from streamline_hooks.testing.assertions.difference import LOGITS, STATES
from streamline_hooks.testing.tiny import tiny_inputs


@contextmanager
def quietly(model: nn.Module, *, restore: bool = True) -> Iterator[None]:
    """Run without gradients and dropout, and restore the random state; if `restore`, also what forwards change.

    PyTorch's encoders leave their fused path as soon as a block has a hook; it is switched off to compare equal sums.
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
    """Return the given batch, or generated tokens for the model, with a left-padded batch if `left_padded`."""
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
    """Return a model's logits, or its last hidden states if it has no head."""
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
    """Return the real tokens of a batch, boolean (batch, tokens); None if all are, or if unknown."""
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


def is_model(subject: nn.Module, batch: Any) -> bool:
    """A Transformers model, or anything that comes with the batch that it is run on."""
    return batch is not None or is_transformers_model(subject)


def features_of(module: nn.Module, features: int | None) -> int:
    """The width of the states that a module maps.

    Raises
    ------
    StreamlineError
        If it was not given and the module does not say it.
    """
    said = getattr(module, "features", None) if features is None else features
    if not isinstance(said, int) or said < 1:
        raise StreamlineError(
            f"How wide the states of this {type(module).__name__} are is not known. If it maps (batch, tokens, "
            "features) to the same shape, give features=...; if it is a model that is no Transformers model, give "
            "batch={...} with what its forward takes."
        )
    return said


def states_for(module: nn.Module, rows: int, tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    """Random states of shape (rows, tokens, features) where a module is."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, tokens, features, generator=generator)
    return states.to(device=_first_tensor(module).device, dtype=dtype)


def precision_of(module: nn.Module) -> torch.dtype:
    """The floating-point type that a module computes in; float32 where nothing in it says so."""
    tensor = _first_tensor(module)
    return tensor.dtype if tensor.is_floating_point() else torch.float32


def called_on(module: nn.Module, states: Tensor) -> Any:
    """Call a module on states with fixed random numbers; an AssertionError names the shape that it fails on."""
    call: Callable[[Tensor], Any] = module
    try:
        with seeded(states.device, "assertion"):
            return call(states)
    except Exception as error:
        raise AssertionError(
            f"{type(module).__name__} fails on states of shape {tuple(states.shape)} (batch, tokens, features) in "
            f"{states.dtype}: {type(error).__name__}: {error}. Expected: the same shape. Likely cause: it takes more "
            "than the states (then test the model that it is in), or has another width than features says."
        ) from error


def _first_tensor(module: nn.Module) -> Tensor:
    floating = (t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())
    return next(floating, torch.empty(0))


GREEDILY: Mapping[str, Any] = MappingProxyType(
    {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "eos_token_id": None,
        "stop_strings": None,
        "pad_token_id": 0,
    }
)
"""One text a row, of the likeliest tokens, as long as it was told to be, whatever a model's generation_config says."""
