"""Build tiny random causal language models and their inputs."""

from __future__ import annotations

import difflib
import math
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from streamline_hooks.core import StreamlineError, exclusive_global_state
from streamline_hooks.testing.tiny_configs import (
    CONFIG_RULES,
    REQUIRED_ARGUMENTS,
    Size,
    SpecialTokens,
    declared_arguments,
    shrink_config,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_WIDTH_STEP = 32  # 8 features per head, so that a quarter is a pair to rotate
_LEAST_VOCABULARY = 32


def causal_model_types() -> list[str]:
    """Return the sorted model types of the installed ``AutoModelForCausalLM``, without importing the models.

    Returns
    -------
    list of str

    Examples
    --------
    >>> "llama" in causal_model_types()
    True
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING.keys()))


def tiny_config(
    model_type: str, *, blocks: int = 8, width: int = 32, vocabulary: int = 64, **overrides: Any
) -> PretrainedConfig:
    """Return a tiny configuration of a model type.

    The configuration has the class of the model type and small sizes: 4 attention heads, at most 4 experts, windows and
    chunks of fewer than 12 tokens, special tokens within the vocabulary, no dropout, and vision or audio towers of 2
    blocks.

    Parameters
    ----------
    model_type : str
        A model type of `causal_model_types`.
    blocks : int
        Number of blocks.
    width : int
        Width of the hidden state, a multiple of 32.
    vocabulary : int
        Size of the vocabulary, at least 32.
    **overrides
        Arguments of the configuration class, used unchanged. An argument that only the nested text configuration has is
        passed to that configuration. A dictionary changes single arguments of a nested configuration.

    Returns
    -------
    PretrainedConfig

    Raises
    ------
    StreamlineError
        If the type is unknown, a size or an override is invalid, or the class rejects the arguments.

    Examples
    --------
    >>> config = tiny_config("qwen3", blocks=6, attention_bias=True)
    >>> config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, config.attention_bias
    (6, 32, 2, True)
    """
    from transformers import CONFIG_MAPPING

    known = causal_model_types()
    if model_type not in known:
        problem = f"{model_type!r} is not one of the {len(known)} model types of AutoModelForCausalLM"
        raise StreamlineError(_unknown_name_error(model_type, known, problem, "See causal_model_types()."))
    if blocks < 1 or width < 1 or width % _WIDTH_STEP or vocabulary < _LEAST_VOCABULARY:
        raise StreamlineError(
            f"blocks={blocks}, width={width}, vocabulary={vocabulary} is not a valid size. Expected blocks of at "
            f"least 1, width a multiple of {_WIDTH_STEP}, and vocabulary of at least {_LEAST_VOCABULARY}. Change the "
            "size."
        )
    with exclusive_global_state(), _without_warnings():
        try:
            required = deepcopy(REQUIRED_ARGUMENTS.get(model_type, {}))  # some classes modify it
            default = CONFIG_MAPPING[model_type](**required)
            placed = _assign_overrides(default, overrides)
            size, special = Size(blocks, width, vocabulary), SpecialTokens(vocabulary)
            config: PretrainedConfig = shrink_config(default, size, special, placed)
            return config
        except StreamlineError:
            raise
        except Exception as error:
            raise StreamlineError(_build_error("configured", model_type, blocks, overrides, error)) from error


def tiny_model(
    model_type: str,
    *,
    blocks: int = 8,
    width: int = 32,
    vocabulary: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """Return a tiny model with random weights, in evaluation mode on the CPU.

    The weights are larger than usual initial weights, so that every block changes the state clearly and a missing or
    misplaced block changes the logits.

    Parameters
    ----------
    model_type, blocks, width, vocabulary, **overrides
        See `tiny_config`.
    seed : int
        Seed of the weights. The global random states do not change.
    dtype : torch.dtype
        Dtype of the weights.

    Returns
    -------
    PreTrainedModel
        An instance of the class that ``AutoModelForCausalLM`` selects.

    Raises
    ------
    StreamlineError
        As for `tiny_config`, or if the model cannot be built, for example because a package is missing.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_inputs
    >>> model = tiny_model("llama", blocks=3)
    >>> len(model.model.layers), model(**tiny_inputs(model)).logits.shape
    (3, torch.Size([2, 12, 64]))
    """
    config = tiny_config(model_type, blocks=blocks, width=width, vocabulary=vocabulary, **overrides)
    with exclusive_global_state(), _without_warnings(), _seeded(seed), torch.device("cpu"):
        try:
            model = _from_config(config, dtype)
        except Exception as error:
            raise StreamlineError(_build_error("built", model_type, blocks, overrides, error)) from error
        _random_init(model, seed)
    model.eval()
    return model


def tiny_tokenizer() -> TinyTokenizer:
    """Return a tokenizer for tiny models, with one token per character.

    Returns
    -------
    TinyTokenizer

    Examples
    --------
    >>> tiny_tokenizer()("abc")
    {'input_ids': [13, 14, 15]}
    """
    return TinyTokenizer()


class TinyTokenizer:
    """A tokenizer with one token per character, for models with at least 32 tokens."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 2

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Return the token of each character, from 3 to 31."""
        return {"input_ids": [ord(character) % 29 + 3 for character in text]}

    def decode(self, tokens: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return one character per token."""
        return "".join(chr(int(token) + 94) for token in tokens)


def _from_config(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if type(config) is not type(text) and getattr(model_class, "config_class", None) is type(text):
        model: PreTrainedModel = model_class(text).to(dtype)
        return model  # Musicgen's decoder: the automatic class passes the wrong config
    return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=dtype))


def _assign_overrides(default: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Assign each override to the configuration or to its nested text configuration."""
    text = default.get_text_config(decoder=True)
    inner = next((name for name, value in vars(default).items() if value is text and text is not default), None)
    placed: dict[str, Any] = {}
    for name, value in overrides.items():
        if (key := _argument(default, name)) is not None:
            placed[key] = {**placed.get(key, {}), **value} if isinstance(value, dict) and key in placed else value
        elif inner is not None and (nested := _argument(text, name)) is not None:
            placed.setdefault(inner, {})
            placed[inner] = {**placed[inner], nested: value}
        else:
            names = sorted({*declared_arguments(type(default)), *declared_arguments(type(text))})
            problem = f"{name}={value!r} is not an argument of {type(default).__name__}"
            raise StreamlineError(_unknown_name_error(name, names, problem, f"Expected one of {', '.join(names)}."))
    return placed


def _argument(config: Any, name: str) -> str | None:
    """Return the name of an argument in the constructor of a configuration, or None if it is unknown."""
    name = type(config).attribute_map.get(name, name)
    others = {"attn_implementation", *CONFIG_RULES.get(config.model_type, {})}
    return name if name in declared_arguments(type(config)) or name in others or hasattr(config, name) else None


def _unknown_name_error(name: str, known: list[str], problem: str, otherwise: str) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"{problem}. " + (f"Did you mean {' or '.join(map(repr, close))}?" if close else otherwise)


def _build_error(action: str, model_type: str, blocks: int, overrides: Mapping[str, Any], error: Exception) -> str:
    import transformers

    arguments = "".join(f", {name}={value!r}" for name, value in overrides.items())
    reason = " ".join(str(error).split()).rstrip(".")
    return (
        f"A tiny {model_type!r} cannot be {action} with blocks={blocks}{arguments} by Transformers "
        f"{transformers.__version__}: {type(error).__name__}: {reason}. Install the required packages, or choose other "
        "sizes or overrides."
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch and random inside the context."""
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which also seeds accelerators
            random.seed(seed)
            yield
        finally:
            random.setstate(before)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide Transformers' warnings about default values that are replaced afterwards."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def tiny_inputs(
    model_or_config: Any, *, batch: int = 2, tokens: int = 12, seed: int = 0, left_padding: bool = False
) -> dict[str, Any]:
    """Return random inputs for a model.

    Parameters
    ----------
    model_or_config : PreTrainedModel or PretrainedConfig
        The model or configuration, which determines the vocabulary and the special tokens.
    batch, tokens : int
        Batch size and number of tokens.
    seed : int
        Seed of the tokens. The global random state does not change.
    left_padding : bool
        Whether each row is two tokens shorter than the previous row and padded on the left.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` of shape (batch, tokens), int64, without special tokens. For assistants of
        Gemma 4, which read the states of a larger model, also random ``inputs_embeds`` and ``shared_kv_states``.

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
        inputs |= _assistant_inputs(config, inputs["input_ids"], generator, getattr(model_or_config, "dtype", None))
    return inputs


def _special_tokens(config: Any) -> set[int]:
    """Return the special tokens of a configuration and its nested configurations."""
    special: set[int] = {0}  # padding by default
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            special |= _special_tokens(value)
        elif name.endswith(("_token_id", "_token_ids", "_token_index", "_index")):
            special |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return special


def _assistant_inputs(
    config: Any, ids: torch.Tensor, generator: torch.Generator, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return random embeddings, keys and values of the larger model for an assistant of Gemma 4."""
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


_NOISE = 0.05  # added to vectors and to tensors of one sign, which keep their initial values
_GAIN = 0.2 * math.sqrt(32)  # gives a matrix with 32 inputs a standard deviation of 0.2


def _random_init(model: nn.Module, seed: int) -> None:
    """Draw new weights for a model in place.

    Matrices are normal with a standard deviation of 0.2 for 32 inputs, inversely proportional to the square root of the
    inputs and limited to 0.1 to 0.5. Vectors and tensors of one sign (the decay of a state space, a mixing weight) keep
    their values plus a little noise. Frozen parameters are unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
        for parameter in model.parameters():
            if not (parameter.is_floating_point() and parameter.requires_grad):
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            one_sign = bool(parameter.any()) and bool((parameter >= 0).all() or (parameter <= 0).all())
            if parameter.ndim > 1 and not one_sign:
                convolution = isinstance(owners[id(parameter)], nn.Conv1d | nn.Conv2d | nn.Conv3d)
                inputs = parameter[0].numel() if convolution else parameter.shape[-1]
                parameter.copy_(noise * min(max(_GAIN / math.sqrt(inputs), 0.1), 0.5))
            else:
                parameter.copy_(parameter.float() + _NOISE * noise)
