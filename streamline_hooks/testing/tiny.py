"""Build tiny random causal language models, and inputs for them."""

from __future__ import annotations

import difflib
import math
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.testing.shrink import (
    PECULIARITIES,
    STARTS,
    Size,
    SpecialTokens,
    declared_arguments,
    shrink_config,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_WIDTH_STEP = 32  # a head then has 8 features, a quarter of them a whole pair to rotate
_LEAST_VOCABULARY = 32


def causal_model_types() -> list[str]:
    """Every model type that ``AutoModelForCausalLM`` can make, sorted.

    Reads Transformers' table of names; no file that defines a model is imported.

    Returns
    -------
    list of str
        Model types of the installed version.

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
    """The configuration of a tiny model of a type.

    The type's own class makes it, from its default values with every size made small by what its name tells.
    Attention has 4 heads, mixtures have at most 4 experts, windows and chunks are shorter than 12 tokens, special
    tokens lie in the vocabulary, nothing is dropped at random, and towers for images or sounds have 2 blocks.

    Parameters
    ----------
    model_type : str
        One of `causal_model_types`.
    blocks : int
        Number of blocks.
    width : int
        Features of the hidden state, a multiple of 32.
    vocabulary : int
        Number of tokens, 32 at least.
    **overrides
        Arguments of the configuration class that are taken as they are. One that only the nested text configuration
        has goes there; a dictionary for a nested configuration changes single arguments of that.

    Returns
    -------
    PretrainedConfig
        A configuration of the type's class.

    Raises
    ------
    StreamlineError
        If the type is not known, a size cannot be had, an override is no argument of the type, or the class refuses
        the result.

    Examples
    --------
    >>> config = tiny_config("qwen3", blocks=6, attention_bias=True)
    >>> config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, config.attention_bias
    (6, 32, 2, True)
    """
    from transformers import CONFIG_MAPPING

    known = causal_model_types()
    if model_type not in known:
        what = f"{model_type!r} is none of the {len(known)} model types that AutoModelForCausalLM knows here"
        raise StreamlineError(_unknown(model_type, known, what, "causal_model_types() lists them"))
    if blocks < 1 or width < 1 or width % _WIDTH_STEP or vocabulary < _LEAST_VOCABULARY:
        raise StreamlineError(
            f"blocks={blocks}, width={width}, vocabulary={vocabulary} is no size for a tiny model: "
            f"blocks must be at least 1, width a multiple of {_WIDTH_STEP}, vocabulary at least {_LEAST_VOCABULARY}"
        )
    with _quiet():
        try:
            default = CONFIG_MAPPING[model_type](**deepcopy(STARTS.get(model_type, {})))  # some classes empty it
            placed = _place(default, overrides)
            return shrink_config(default, Size(blocks, width, vocabulary), SpecialTokens(vocabulary), placed)
        except StreamlineError:
            raise
        except Exception as error:
            raise StreamlineError(_cannot("configured", model_type, blocks, overrides, error)) from error


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
    """A tiny model of a type, with random weights that matter, in evaluation mode on the CPU.

    The weights are larger than the ones a model starts training with: every block changes the state clearly, so
    that a block that is missing, or in the wrong place, shows in the logits.

    Parameters
    ----------
    model_type, blocks, width, vocabulary, **overrides
        As for `tiny_config`.
    seed : int
        Of the weights. The global random states are left as they were.
    dtype : torch.dtype
        Of the weights.

    Returns
    -------
    PreTrainedModel
        What ``AutoModelForCausalLM.from_config`` makes.

    Raises
    ------
    StreamlineError
        As for `tiny_config`, and if the model cannot be built here, for instance for want of a package.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_inputs
    >>> model = tiny_model("llama", blocks=3)
    >>> len(model.model.layers), model(**tiny_inputs(model)).logits.shape
    (3, torch.Size([2, 12, 64]))
    """
    config = tiny_config(model_type, blocks=blocks, width=width, vocabulary=vocabulary, **overrides)
    with _quiet(), _own_random_state(seed), torch.device("cpu"):
        try:
            model = _from_config(config, dtype)
        except Exception as error:
            raise StreamlineError(_cannot("built", model_type, blocks, overrides, error)) from error
        redraw(model, seed)
    return model.eval()


def _from_config(config: Any, dtype: torch.dtype) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if type(config) is not type(text) and getattr(model_class, "config_class", None) is type(text):
        return model_class(text).to(dtype)  # Musicgen's decoder, which the automatic class hands too much
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _place(default: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Put each override where it belongs: at the top, or in the text configuration."""
    text = default.get_text_config(decoder=True)
    inner = next((name for name, value in vars(default).items() if value is text and text is not default), None)
    placed: dict[str, Any] = {}
    for name, value in overrides.items():
        if (own := _argument(default, name)) is not None:
            placed[own] = {**placed.get(own, {}), **value} if isinstance(value, dict) and own in placed else value
        elif inner is not None and (nested := _argument(text, name)) is not None:
            placed.setdefault(inner, {})
            placed[inner] = {**placed[inner], nested: value}
        else:
            names = sorted({*declared_arguments(type(default)), *declared_arguments(type(text))})
            what = f"{name}={value!r} is no argument of {type(default).__name__}"
            raise StreamlineError(_unknown(name, names, what, f"it takes {', '.join(names)}"))
    return placed


def _argument(config: Any, name: str) -> str | None:
    """The name under which a configuration class takes an argument, or None."""
    name = type(config).attribute_map.get(name, name)
    others = {"attn_implementation", *PECULIARITIES.get(config.model_type, {})}
    return name if name in declared_arguments(type(config)) or name in others or hasattr(config, name) else None


def _unknown(given: str, known: list[str], start: str, otherwise: str) -> str:
    close = difflib.get_close_matches(given, known, n=5, cutoff=0.5)
    return f"{start}: " + (f"did you mean {' or '.join(map(repr, close))}?" if close else otherwise)


def _cannot(what: str, model_type: str, blocks: int, overrides: Mapping[str, Any], error: Exception) -> str:
    import transformers

    given = "".join(f", {name}={value!r}" for name, value in overrides.items())
    reason = " ".join(str(error).split())
    return (
        f"a tiny {model_type!r} cannot be {what} here with blocks={blocks}{given} by Transformers "
        f"{transformers.__version__}: {type(error).__name__}: {reason} "
        "(install what it asks for, or choose other sizes or overrides)"
    )


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seed torch and random for a while."""
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(seed)  # alone: torch.manual_seed would seed accelerators too
            random.seed(seed)
            yield
        finally:
            random.setstate(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Transformers from warning of default values that are about to be replaced."""
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


_NOISE = 0.05  # on what is not a matrix, and on what keeps the values it was made with
_GAIN = 0.2 * math.sqrt(32)  # a matrix of 32 inputs gets a standard deviation of 0.2


def redraw(model: nn.Module, seed: int) -> None:
    """Redraw the weights of a model in place, from a generator with the given seed.

    Matrices are normal with a standard deviation of 0.2 for 32 inputs, falling with their square root. Vectors, and
    tensors of one sign (the decay of a state space, a mixing weight), keep their values plus a little noise. Frozen
    parameters stay.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
        for parameter in model.parameters():
            if not (parameter.is_floating_point() and parameter.requires_grad):
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if parameter.ndim > 1 and not _of_one_sign(parameter):
                parameter.copy_(noise * deviation(owners[id(parameter)], parameter))
            else:
                parameter.copy_(parameter.float() + _NOISE * noise)


def deviation(owner: nn.Module, weight: torch.Tensor) -> float:
    """The standard deviation that a matrix is drawn with, from 0.1 to 0.5."""
    convolution = isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    inputs = weight[0].numel() if convolution else weight.shape[-1]
    return min(max(_GAIN / math.sqrt(inputs), 0.1), 0.5)


def _of_one_sign(values: torch.Tensor) -> bool:
    return bool(values.any()) and bool((values >= 0).all() or (values <= 0).all())
