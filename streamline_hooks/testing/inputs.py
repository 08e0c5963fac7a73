"""Random tokens for a tiny model."""

from __future__ import annotations

from typing import Any

import torch


def tiny_inputs(
    model_or_config: Any, *, batch: int = 2, tokens: int = 12, seed: int = 0, left_padding: bool = False
) -> dict[str, Any]:
    """Random tokens for a model.

    Parameters
    ----------
    model_or_config : PreTrainedModel or PretrainedConfig
        Whose vocabulary and special tokens to heed.
    batch, tokens : int
        The shape.
    seed : int
        Of the tokens. The global random state is left as it was.
    left_padding : bool
        Whether each row after the first is shorter, padded on its left.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` of shape (batch, tokens), int64. No special token is drawn. For Gemma 4's
        assistants, which read the states of a larger model, also random ``inputs_embeds`` and ``shared_kv_states``.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_config
    >>> tiny_inputs(tiny_config("gpt2"), batch=3, tokens=8, left_padding=True)["attention_mask"].sum(1)
    tensor([8, 6, 4])
    """
    config = getattr(model_or_config, "config", model_or_config)
    text = config.get_text_config(decoder=True)
    special = _special_tokens(config)
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    ids = ordinary[torch.randint(len(ordinary), (batch, tokens), generator=generator)]
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if left_padding:
        pad = getattr(text, "pad_token_id", None)
        for row in range(batch):
            shorter = min(2 * row, tokens - 1)
            mask[row, :shorter] = 0
            ids[row, :shorter] = 0 if pad is None else pad
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if hasattr(config, "backbone_hidden_size"):
        inputs |= _of_the_assisted(config, inputs["input_ids"], generator, getattr(model_or_config, "dtype", None))
    return inputs


def _special_tokens(config: Any) -> set[int]:
    """The ids that a configuration, or one nested in it, gives a meaning of their own."""
    found: set[int] = {0}  # the padding where none is named
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            found |= _special_tokens(value)
        elif name.endswith(("_token_id", "_token_ids", "_token_index", "_index")):
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return found


def _of_the_assisted(
    config: Any, ids: torch.Tensor, generator: torch.Generator, dtype: torch.dtype | None
) -> dict[str, Any]:
    """What Gemma 4's assistants are given beside the tokens: embeddings, keys and values of the larger model."""
    text, (batch, tokens) = config.get_text_config(decoder=True), ids.shape

    def random_states(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype or torch.float32)

    states = {}
    for block, kind in enumerate(text.layer_types):
        layer = text.per_layer_config[block]
        shape = batch, layer.num_key_value_heads, tokens, layer.head_dim
        states[kind] = random_states(*shape), random_states(*shape)
    return {
        "inputs_embeds": random_states(batch, tokens, 2 * config.backbone_hidden_size),
        "shared_kv_states": states,
    }
