"""What a model is run on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.offload import execution_device

Batch = Mapping[str, Tensor]
_NO_TOKENS = frozenset({"pixel_values", "input_features", "input_values"})
_BEGINS = frozenset({"input_ids", "inputs_embeds", "query_embeds"})
_INPUTS = _NO_TOKENS | _BEGINS | {"attention_mask", "src_key_padding_mask"}


def batches_of(sequences: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Cut token sequences of shape (sequences, tokens) into batches with ``input_ids`` and ``attention_mask``."""
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sequences.split(batch_size)]


def prepare(model: nn.Module, batch: Batch | Tensor) -> dict[str, Any]:
    """Complete a batch with what the model's forward takes and a bare call would get wrong.

    Tokens are moved to the model's device, and no cache is built. Where padding stands before a text, or in it, it is
    given ``position_ids`` from the mask, without which many models count the padding; not a model that counts several
    positions a token (Qwen2-VL), which does so by the mask itself.

    Parameters
    ----------
    model : torch.nn.Module
    batch : mapping or torch.Tensor
        What the model's forward takes, by name. A bare tensor stands for what the model takes first: ``input_ids``
        where it takes such and the tensor holds integers, ``pixel_values`` (or what else a Transformers model names as
        its ``main_input_name``) where it holds floating numbers, and otherwise the first argument of the forward,
        such as the ``x`` of timm's models.

    Returns
    -------
    dict
        Keyword arguments for the model.

    Examples
    --------
    >>> list(prepare(nn.Linear(4, 4), torch.zeros(2, 4)))
    ['input']
    """
    inside = _that_names(model)
    takes = inspect.signature(inside.forward).parameters
    given: dict[str, Any] = {_name_of_bare(inside, takes, batch): batch} if isinstance(batch, Tensor) else dict(batch)
    device = device_of(model)
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    mask = given.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if "position_ids" not in given and real is not None and (real[:, 1:] & ~real[:, :-1]).any():
        positions = positions_by_mask(inside, real)
        given |= {} if positions is None else {"position_ids": positions}
    if takes_use_cache(takes):
        given.setdefault("use_cache", False)
    return given


def positions_by_mask(model: nn.Module, mask: Tensor) -> Tensor | None:
    """Return position ids that count the real tokens of each row, in the mask's shape (batch, tokens).

    Return None if the model takes no position ids, or several per token.
    """
    inside = _that_names(model)
    first = _first_position(inside) if "position_ids" in inspect.signature(inside.forward).parameters else None
    return None if first is None else (mask.bool().long().cumsum(dim=1) - 1).clamp(min=0) + first


def takes_use_cache(takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a forward with these parameters accepts ``use_cache``, by name or through ``**kwargs`` beside a cache."""
    others = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
    return "use_cache" in takes or (others and not takes.keys().isdisjoint(("cache", "past_key_values")))


def real_tokens(given: Mapping[str, Any]) -> Any:
    """Return the mask of real tokens among a forward's keyword arguments, True (or 1) for a real token, or None.

    Transformers' ``attention_mask`` is returned as it is; the key padding masks of PyTorch's encoders and decoders are
    inverted.
    """
    padding = given.get("tgt_key_padding_mask" if "tgt" in given and "src" not in given else "src_key_padding_mask")
    return padding == 0 if isinstance(padding, Tensor) else given.get("attention_mask")


def mask_of_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outer: Any) -> Any:
    """Return the mask of real tokens for the blocks inside a model that is being called, see `real_tokens`.

    The innermost model's mask counts: an encoder's mask does not describe its decoder's tokens, nor a text's the
    patches of an image. Without a mask in the call the result is None for images, sounds and decoders with another
    sequence, and otherwise the `outer` one; so it is for masks laid out by query and key (BERT's encoder) or by kind of
    attention (Gemma 3).
    """
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # a wrapper's, which hands them on
            given |= given.pop(name, {})
    tensors = {name for name, value in given.items() if isinstance(value, Tensor)}
    decodes = ("encoder_hidden_states" in tensors and bool(tensors & _BEGINS)) or {"tgt", "memory"} <= tensors
    another, own = decodes or bool(tensors & _NO_TOKENS), real_tokens(given)
    if own is None:
        return None if another else outer
    if another or not (isinstance(outer, Tensor) and outer.ndim == 2):
        return own
    laid_out = isinstance(own, dict) or (isinstance(own, Tensor) and own.ndim != 2 and len(own) == len(outer))
    return outer if laid_out else own


def mask_beside_cache(mask: Any, kwargs: Mapping[str, Any]) -> Any:
    """Reduce the mask that ``generate`` builds for a static cache to the tokens of one call, (batch, tokens).

    A token is real if it attends to itself. Its column follows from the number of cached tokens; a full sliding cache
    holds the current tokens last. A mask of another layout, or of a call without a cache, is returned unchanged.
    """
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    if not callable(getattr(cache, "get_seq_length", None)):
        return mask
    laid_out = next((each for each in masks if isinstance(each, Tensor) and each.ndim == 4), None)
    if laid_out is None or laid_out.shape[-1] < laid_out.shape[-2]:
        return mask
    tokens, columns = laid_out.shape[-2:]
    position = kwargs.get("cache_position")
    seen = int(cache.get_seq_length() if position is None else position[0])  # type: ignore[union-attr]
    allowed = laid_out == 0 if laid_out.is_floating_point() else laid_out.bool()
    return allowed[:, 0].diagonal(min(seen, columns - tokens), dim1=-2, dim2=-1)


def tokens_of(batch: Batch | Tensor) -> int:
    """The number of real tokens of a batch; of images and sounds, which have none, that of these."""
    mask = None if isinstance(batch, Tensor) else real_tokens(batch)
    if isinstance(mask, Tensor):
        return int(mask.bool().sum())
    if not isinstance(batch, Tensor):
        found = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        named = next((name for name in ("input_ids", "inputs_embeds") if name in found), next(iter(found)))
        if named == "inputs_embeds":
            return found[named].shape[:-1].numel()
        batch = found[named]
    first = batch
    return len(first) if first.is_floating_point() and first.ndim else first.numel()


def has_tokens(batch: Batch | Tensor) -> bool:
    """Whether a batch is of text."""
    return not batch.is_floating_point() if isinstance(batch, Tensor) else "input_ids" in batch


def device_of(model: nn.Module) -> torch.device:
    """The device that a model takes its input on; of a model that accelerate offloads, the one that it runs on."""
    device = getattr(model, "device", None)
    if not isinstance(device, torch.device):
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return execution_device(model) or device if device.type == "meta" else device


def positions_of(config: Any) -> int | None:
    """How many tokens a model of a configuration has positions for; None where that is not said."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _first_position(model: nn.Module) -> int | None:
    """Return the position that a model gives a text's first token; None if it counts several per token.

    RoBERTa and its relatives count from behind the padding index, as Nystromformer does.
    """
    first = 0
    for name, module in model.named_modules():
        if hasattr(module, "get_rope_index"):
            return None
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding, int):
            first = padding + 1
        held = module._buffers.get("position_ids")
        if held is not None and not held.is_meta and held.numel():
            first = max(first, int(held.flatten()[0]))
    return first


def _name_of_bare(model: nn.Module, takes: Mapping[str, inspect.Parameter], batch: Tensor) -> str:
    """Under which name a model takes a tensor that came without one."""
    if batch.is_floating_point():
        main = getattr(model, "main_input_name", None)
        for name in (main, "pixel_values"):
            if isinstance(name, str) and name in takes and name != "input_ids":
                return name
    if "input_ids" in takes:
        return "input_ids"
    first = next(iter(takes.values()), None)
    named = first is not None and first.kind in (first.POSITIONAL_OR_KEYWORD, first.KEYWORD_ONLY)
    return first.name if first is not None and named else "input_ids"  # a wrapper that names nothing hands it on


def _that_names(model: nn.Module) -> nn.Module:
    """The model whose forward names what it takes: inside PEFT's wrapper, and those that hand on whatever comes."""
    unadapted = getattr(model, "get_base_model", None)
    if callable(unadapted):
        return _that_names(unadapted())
    takes = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in takes):
        return model
    inside = [_that_names(child) for child in model.children()]
    taking = [child for child in inside if not _INPUTS.isdisjoint(inspect.signature(child.forward).parameters)]
    return taking[0] if len(taking) == 1 else model
