"""Prepare batches for a model's forward pass, and read masks, labels and token counts from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core.devices import execution_device
from streamline_hooks.core.errors import StreamlineError

Batch = Mapping[str, Tensor]
Batches = Sequence[Batch | Tensor]
_CONTINUOUS_INPUTS = frozenset({"pixel_values", "input_features", "input_values"})
_TOKEN_INPUTS = frozenset({"input_ids", "inputs_embeds", "query_embeds"})
_INPUTS = _CONTINUOUS_INPUTS | _TOKEN_INPUTS | {"attention_mask", "src_key_padding_mask"}


def split_into_batches(sequences: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Split token sequences into batches with ``input_ids`` and ``attention_mask``.

    Parameters
    ----------
    sequences : torch.Tensor
        Token ids of shape (sequences, tokens), without padding.
    batch_size : int
        Sequences per batch; the last batch may have fewer.

    Returns
    -------
    list of dict

    Examples
    --------
    >>> [batch["input_ids"].shape for batch in split_into_batches(torch.arange(30).view(3, 10), 2)]
    [torch.Size([2, 10]), torch.Size([1, 10])]
    """
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sequences.split(batch_size)]


def prepare_inputs(model: nn.Module, batch: Batch | Tensor) -> dict[str, Any]:
    """Convert a batch to the keyword arguments of a forward pass without a cache.

    Tensors are moved to the model's device. If padding precedes or interrupts a sequence, ``position_ids`` are computed
    from the attention mask, because many models count padding tokens. Models with several positions per token (such as
    Qwen2-VL) compute their positions from the mask, so none are added. For an encoder-decoder with ``labels`` alone, a
    label of −100 at the end of a row is padding, which ``decoder_attention_mask`` marks.

    Parameters
    ----------
    model : torch.nn.Module
    batch : mapping or torch.Tensor
        Arguments by name, or a tensor. An integer tensor is passed as ``input_ids``, a floating-point tensor as the
        model's ``main_input_name`` or ``pixel_values``; if the model does not accept these, as the first argument.

    Returns
    -------
    dict
        Keyword arguments of the model's forward.

    Examples
    --------
    >>> list(prepare_inputs(nn.Linear(4, 4), torch.zeros(2, 4)))
    ['input']
    """
    unwrapped = _unwrap_forward(model)
    parameters = inspect.signature(unwrapped.forward).parameters
    inputs: dict[str, Any] = (
        {_argument_of_tensor(unwrapped, parameters, batch): batch} if isinstance(batch, Tensor) else dict(batch)
    )
    device = device_of(model)
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    mask = inputs.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if "position_ids" not in inputs and real is not None and (real[:, 1:] & ~real[:, :-1]).any():
        positions = position_ids_from_mask(unwrapped, real)
        inputs |= {} if positions is None else {"position_ids": positions}
    if takes_use_cache(parameters):
        inputs.setdefault("use_cache", False)
    labels = inputs.get("labels")
    if (
        "decoder_attention_mask" in parameters
        and _DECODER_INPUTS.isdisjoint(inputs)
        and isinstance(labels, Tensor)
        and labels.ndim == 2
    ):
        has_answer = labels != IGNORE_INDEX
        is_real = has_answer.flip(1).cumsum(1).flip(1) > 0  # up to the last answer of each row
        is_real |= ~is_real.any(1, keepdim=True)  # a row without answers is not masked
        if not is_real.all():
            inputs["decoder_attention_mask"] = is_real.long()
    return inputs


_DECODER_INPUTS = frozenset({"decoder_attention_mask", "decoder_input_ids", "decoder_inputs_embeds"})


def position_ids_from_mask(model: nn.Module, mask: Tensor) -> Tensor | None:
    """Return position ids (batch, tokens) that count real tokens, or None.

    None is returned if the model does not accept position ids or uses several positions per token.
    """
    unwrapped = _unwrap_forward(model)
    first = _first_position(unwrapped) if "position_ids" in inspect.signature(unwrapped.forward).parameters else None
    return None if first is None else (mask.bool().long().cumsum(dim=1) - 1).clamp(min=0) + first


def takes_use_cache(takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a forward with these parameters accepts ``use_cache``, by name or in ``**kwargs`` with a cache."""
    has_kwargs = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
    return "use_cache" in takes or (has_kwargs and not takes.keys().isdisjoint(("cache", "past_key_values")))


def padding_mask(inputs: Mapping[str, Any]) -> Any:
    """Return the mask of real tokens from a forward's keyword arguments, or None.

    Key padding masks of PyTorch's encoders and decoders, where 1 marks padding, are inverted.
    """
    padding = inputs.get("tgt_key_padding_mask" if "tgt" in inputs and "src" not in inputs else "src_key_padding_mask")
    return padding == 0 if isinstance(padding, Tensor) else inputs.get("attention_mask")


def padding_mask_of_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outer: Any) -> Any:
    """Return the mask of real tokens for the blocks of a model that is being called, see `padding_mask`.

    The mask passed to the innermost model takes precedence: an encoder's mask does not describe the decoder's tokens,
    and a text mask does not describe image patches. If the call has no mask, the result is None for images, audio and
    decoders with a separate sequence, and `outer` otherwise. `outer` is also returned if the call's mask is indexed by
    query and key (BERT's encoder) or by type of attention (Gemma 3).
    """
    signature = inspect.signature(model.forward)
    inputs = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # the arguments that a wrapper forwards
            inputs |= inputs.pop(name, {})
    tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    is_decoder = ("encoder_hidden_states" in tensors and bool(tensors & _TOKEN_INPUTS)) or {"tgt", "memory"} <= tensors
    separate_sequence, mask = is_decoder or bool(tensors & _CONTINUOUS_INPUTS), padding_mask(inputs)
    if mask is None:
        return None if separate_sequence else outer
    if separate_sequence or not (isinstance(outer, Tensor) and outer.ndim == 2):
        return mask
    expanded = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim != 2 and len(mask) == len(outer))
    return outer if expanded else mask


def padding_mask_with_cache(mask: Any, kwargs: Mapping[str, Any]) -> Any:
    """Reduce the mask that ``generate`` builds for a static cache to the tokens of one call, (batch, tokens).

    A token is real if it attends to itself. Its column is computed from the number of cached tokens; a full sliding
    cache stores the current tokens last. A mask with another layout, or without a cache, is returned unchanged.
    """
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    if not callable(getattr(cache, "get_seq_length", None)):
        return mask
    full_mask = next((candidate for candidate in masks if isinstance(candidate, Tensor) and candidate.ndim == 4), None)
    if full_mask is None or full_mask.shape[-1] < full_mask.shape[-2]:
        return mask
    tokens, columns = full_mask.shape[-2:]
    position = kwargs.get("cache_position")
    seen = int(cache.get_seq_length() if position is None else position[0])
    allowed = full_mask == 0 if full_mask.is_floating_point() else full_mask.bool()
    return allowed[:, 0].diagonal(min(seen, columns - tokens), dim1=-2, dim2=-1)


def cached_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of cached tokens of a call, or None if it is unknown, as in compiled code."""
    arguments = dict(inspect.signature(module.forward).bind_partial(*args).arguments) | dict(kwargs)
    names = ("cache", "past_key_values", "cache_params", "state")  # RWKV has a state
    cache = next((arguments[name] for name in names if arguments.get(name) is not None), None)
    if cache is None:
        return 0
    if torch.compiler.is_compiling():
        return None
    try:
        return int(cache.get_seq_length())
    except Exception:  # a cache of recurrent states may have no length
        return None


def mask_of_tokens(mask: Tensor, tokens: int, cached: int | None, *, has_last_tokens: bool = False) -> Tensor:
    """Return the last columns of a mask (batch, columns) if they belong to the call's tokens, else all.

    The mask of a call with a cache also has the cached tokens. A mask of other tokens, such as the samples of which an
    audio encoder computes fewer states, says nothing about these states. `has_last_tokens` is for logits, which may be
    of the last tokens of a call.
    """
    is_known = cached is None or has_last_tokens or mask.shape[1] == cached + tokens
    return mask[:, -tokens:] if is_known and tokens else mask


def count_tokens(batch: Batch | Tensor) -> int:
    """Return the number of real tokens in a batch, or the number of images or audio clips."""
    mask = None if isinstance(batch, Tensor) else padding_mask(batch)
    if isinstance(mask, Tensor):
        return int(mask.bool().sum())
    if not isinstance(batch, Tensor):
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        name = next((key for key in ("input_ids", "inputs_embeds") if key in tensors), next(iter(tensors)))
        if name == "inputs_embeds":
            return tensors[name].shape[:-1].numel()
        batch = tensors[name]
    return len(batch) if batch.is_floating_point() and batch.ndim else batch.numel()


def is_text_batch(batch: Batch | Tensor) -> bool:
    """Whether a batch contains token ids."""
    return not batch.is_floating_point() if isinstance(batch, Tensor) else "input_ids" in batch


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs; for an offloaded model, the device that it runs on."""
    device = getattr(model, "device", None)
    if not isinstance(device, torch.device):
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return execution_device(model) or device if device.type == "meta" else device


def max_positions(config: Any) -> int | None:
    """Return ``max_position_embeddings`` of a model's text config, or None."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _first_position(model: nn.Module) -> int | None:
    """Return the first position id (RoBERTa starts after its padding index), or None if a token has several."""
    first = 0
    for name, module in model.named_modules():
        if hasattr(module, "get_rope_index"):
            return None
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding, int):
            first = padding + 1
        position_ids = module._buffers.get("position_ids")
        if position_ids is not None and not position_ids.is_meta and position_ids.numel():
            first = max(first, int(position_ids.flatten()[0]))
    return first


def _argument_of_tensor(model: nn.Module, parameters: Mapping[str, inspect.Parameter], batch: Tensor) -> str:
    """Return the name of the argument to which a bare tensor is passed."""
    if batch.is_floating_point():
        main = getattr(model, "main_input_name", None)
        for name in (main, "pixel_values"):
            if isinstance(name, str) and name in parameters and name != "input_ids":
                return name
    if "input_ids" in parameters:
        return "input_ids"
    first = next(iter(parameters.values()), None)
    has_name = first is not None and first.kind in (first.POSITIONAL_OR_KEYWORD, first.KEYWORD_ONLY)
    return first.name if first is not None and has_name else "input_ids"  # a wrapper with **kwargs only forwards it


def _unwrap_forward(model: nn.Module) -> nn.Module:
    """Return the module whose forward names its arguments, inside PEFT and other wrappers."""
    get_base_model = getattr(model, "get_base_model", None)
    if callable(get_base_model):
        return _unwrap_forward(get_base_model())
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        return model
    children = [_unwrap_forward(child) for child in model.children()]
    candidates = [child for child in children if not _INPUTS.isdisjoint(inspect.signature(child.forward).parameters)]
    return candidates[0] if len(candidates) == 1 else model


IGNORE_INDEX = -100  # the label of a position without a target, as in PyTorch and Transformers


def get_input_ids(batch: Batch | Tensor) -> Tensor:
    """Return the token ids of a batch, of shape (batch, tokens); raise StreamlineError if it has none."""
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    if ids is None or ids.is_floating_point():
        content = "a floating-point tensor" if isinstance(batch, Tensor) else ", ".join(batch)
        raise StreamlineError(
            f"A batch contains {content}, but no token ids (input_ids). Expected token ids, because only text has a "
            "likelihood. Pass batches of text."
        )
    return ids


def target_ids(batch: Batch | Tensor) -> Tensor:
    """Return the token ids of a batch, with `IGNORE_INDEX` where ``labels`` of the same shape equal it."""
    ids = get_input_ids(batch)
    labels = None if isinstance(batch, Tensor) else batch.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != ids.shape:
        return ids
    return ids.masked_fill(labels.to(ids.device) == IGNORE_INDEX, IGNORE_INDEX)


def label_mask(real: Tensor, positions: Any = None) -> Tensor:
    """Return a boolean mask of the tokens that are predicted from the previous token, (batch, tokens − 1).

    Both tokens must be real. In a packed row, where `positions` of shape (batch or 1, tokens) restart, the first token
    of each document is excluded.
    """
    mask = real[:, 1:] & real[:, :-1]
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == real.shape[1]:
        mask = mask & (positions.to(real.device).diff(dim=1) == 1)
    return mask


def shift_labels(ids: Tensor, real: Tensor, positions: Any = None) -> Tensor:
    """Return the next token for each position, or `IGNORE_INDEX`, (batch, tokens); see `label_mask`."""
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = torch.where(label_mask(real, positions), ids[:, 1:], IGNORE_INDEX)
    return labels
