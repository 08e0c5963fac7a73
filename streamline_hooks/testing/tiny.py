"""A tiny random model of any causal language model that the installed Transformers knows."""

from __future__ import annotations

import difflib
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from streamline_hooks.errors import StreamlineError
from streamline_hooks.testing.peculiarities import STARTS, Size
from streamline_hooks.testing.redraw import redraw, unset_is_nan
from streamline_hooks.testing.shrink import SpecialTokens, declared_arguments, shrink_config

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
        raise StreamlineError(_unknown(f"the model type {model_type!r} is not one of", model_type, known))
    if blocks < 1 or width < 1 or width % _WIDTH_STEP or vocabulary < _LEAST_VOCABULARY:
        raise StreamlineError(
            f"blocks={blocks}, width={width}, vocabulary={vocabulary} is no size for a tiny model: "
            f"blocks must be at least 1, width a multiple of {_WIDTH_STEP}, vocabulary at least {_LEAST_VOCABULARY}"
        )
    with _quiet():
        try:
            default = CONFIG_MAPPING[model_type](**STARTS.get(model_type, {}))
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
    >>> model = tiny_model("llama", blocks=3)
    >>> len(model.model.layers), model(**tiny_inputs(model)).logits.shape
    (3, torch.Size([2, 12, 64]))
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, blocks=blocks, width=width, vocabulary=vocabulary, **overrides)
    with _quiet(), _own_random_state(seed), torch.device("cpu"):
        try:
            with unset_is_nan():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except Exception as error:
            raise StreamlineError(_cannot("built", model_type, blocks, overrides, error)) from error
        redraw(model, seed)
    return model.eval()


def tiny_inputs(
    model_or_config: Any, *, batch: int = 2, tokens: int = 12, seed: int = 0, left_padding: bool = False
) -> dict[str, torch.Tensor]:
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
        ``input_ids`` and ``attention_mask`` of shape (batch, tokens), int64. No special token is drawn.

    Examples
    --------
    >>> tiny_inputs(tiny_config("gpt2"), batch=3, tokens=8, left_padding=True)["attention_mask"].sum(1)
    tensor([8, 6, 4])
    """
    config = getattr(model_or_config, "config", model_or_config)
    text = config.get_text_config(decoder=True)
    special = special_tokens(config)
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
    return {"input_ids": ids, "attention_mask": mask}


def special_tokens(config: Any) -> set[int]:
    """The ids that a configuration, or one nested in it, gives a meaning of their own."""
    found: set[int] = {0}  # the padding where none is named
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            found |= special_tokens(value)
        elif name.endswith(("_token_id", "_token_ids", "_token_index", "_index")):
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return found


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
            raise StreamlineError(_unknown(f"{name!r} is not one of", name, names, f"arguments of {default.model_type}"))
    return placed


def _argument(config: Any, name: str) -> str | None:
    """The name under which a configuration class takes an argument, or None."""
    name = type(config).attribute_map.get(name, name)
    known = name in declared_arguments(type(config)) or hasattr(config, name) or name == "attn_implementation"
    return name if known else None


def _unknown(start: str, given: str, known: list[str], what: str = "that AutoModelForCausalLM knows") -> str:
    close = difflib.get_close_matches(given, known, n=5, cutoff=0.5)
    advice = f"did you mean {' or '.join(map(repr, close))}?" if close else "see causal_model_types() for all"
    return f"{start} the {len(known)} {what}: {advice}"


def _cannot(what: str, model_type: str, blocks: int, overrides: Mapping[str, Any], error: Exception) -> str:
    import transformers

    given = "".join(f", {name}={value!r}" for name, value in overrides.items())
    reason = " ".join(str(error).split())
    return (
        f"a tiny {model_type!r} cannot be {what} here with blocks={blocks}{given} by Transformers "
        f"{transformers.__version__}: {type(error).__name__}: {reason}"
    )


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seed torch and random for a while."""
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(seed)
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
