"""Generate text from a batch of prompts."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Bound,
    Config,
    StreamlineError,
    device_of,
    exclusive_global_state,
    max_positions,
    to_float64,
    warn_caller,
)
from streamline_hooks.modeling.forward import forward_parameters, inference, logits_to_keep, preserve_forward_state

_LOGITS = {"output_logits": True, "return_dict_in_generate": True}


def require_generate(model: Any, name: str = "The model") -> None:
    """Raise if a model has no usable ``generate``."""
    can = getattr(model, "can_generate", lambda: True)
    if not callable(getattr(model, "generate", None)) or not can():
        raise StreamlineError(
            f"{name}, a {type(model).__name__}, cannot generate. Expected a causal language model. Pass one."
        )


def eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids of the end tokens of a model; a chat model may have several."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ends, getattr(tokenizer, "eos_token_id", None)) if i is not None}


@dataclass(frozen=True)
class SamplingConfig(Config):
    """Settings for choosing the next token, and the number of texts generated for each prompt.

    Attributes
    ----------
    samples : int
        Number of texts for each prompt. Default: 1.
    temperature : float
        Sampling temperature. 0, the default, is greedy decoding.
    top_p : float
        Sample from the most likely tokens whose probabilities sum to this value. Default: 1.0.

    Examples
    --------
    >>> SamplingConfig(samples=4, temperature=0.8, top_p=0.95)
    SamplingConfig(samples=4, temperature=0.8, top_p=0.95)
    """

    bounds: ClassVar[Mapping[str, Bound]] = {"samples": 1, "temperature": 0, "top_p": "(0, 1]"}

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


def generate_tokens(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    sampling: SamplingConfig | None = None,
    stop: Sequence[str] = (),
    keep_end: bool = False,
    on_step: Callable[[int], object] = lambda running: None,
) -> list[list[list[int]]]:
    """Generate up to `new_tokens` tokens for each prompt.

    Prompts are batched with padding on the left if padding does not change the logits of the shortest prompt. Otherwise
    only prompts of equal length share a batch, and a warning is issued. A model without a key-value cache whose output
    changes in a batch generates one text at a time. If the cache contains only keys and values, each prompt is
    prefilled once for all samples. Dropout and the model's generation configuration are ignored.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        Names the end token and decodes for `stop`. With None the model's configuration names the end token.
    prompts : sequence of sequence of int
        Token ids of each prompt; at least one token each.
    new_tokens : int
        Largest number of tokens generated for each text.
    sampling : SamplingConfig, optional
        Default: greedy decoding, one text for each prompt.
    stop : sequence of str
        Strings that end a text. The token that completes a stop string is kept.
    keep_end : bool
        Keep the end token in the result.
    on_step : callable
        Called after every decoding step with the number of rows in the batch.

    Returns
    -------
    list of list of list of int
        Token ids by prompt and sample, without the prompt.

    Raises
    ------
    StreamlineError
        If the model cannot generate or is an encoder-decoder, a prompt is empty, or the texts exceed the model's
        positions.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> texts = generate_tokens(tiny_model("llama"), None, [[5, 6, 7], [8, 9]], new_tokens=4)
    >>> [len(samples) for samples in texts], len(texts[0][0]) <= 4
    ([1, 1], True)
    """
    from transformers import StoppingCriteriaList

    require_generate(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise StreamlineError(
            f"{type(model).__name__} is an encoder-decoder. Expected a causal language model. Pass one."
        )
    if not all(map(len, prompts)):
        raise StreamlineError("A prompt is empty. Expected at least one token. Add the token that begins a text.")
    width, positions = max(map(len, prompts)), max_positions(model.config)
    if positions is not None and width + new_tokens > positions:
        raise StreamlineError(
            f"A prompt of {width} tokens and new_tokens={new_tokens} need {width + new_tokens} positions; the model "
            f"has {positions}. Shorten the prompts or reduce new_tokens."
        )
    ends = eos_token_ids(model, tokenizer)
    pad = min(ends, default=0)  # fills rows that have ended, and is removed from the result
    sampling = sampling or SamplingConfig()
    is_random = sampling.temperature > 0
    options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    options = options if is_random else {}
    options |= {"do_sample": is_random, "max_new_tokens": new_tokens, "pad_token_id": pad}
    options |= {"eos_token_id": sorted(ends) or None, "use_cache": True}
    texts_by_prompt: list[list[list[int]]] = [[] for _ in prompts]

    def stops(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(ids) if stop else ""
        return any(string in text for string in stop)

    def stopped(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        on_step(len(ids))
        return torch.tensor([stops(row) for row in ids[:, width:]], dtype=torch.bool, device=ids.device)

    def cut(ids: list[int]) -> list[int]:
        """Truncate a text at its end token, or after the token that completes a stop string."""
        end = next((k for k, token in enumerate(ids) if token in ends), len(ids))
        ids = ids[: end + keep_end]
        return ids[: bisect_left(range(len(ids)), True, key=lambda n: stops(ids[:n]))] if stops(ids) else ids

    with inference(model), default_generation_config(model):
        with preserve_forward_state(model):
            groups = _batch_prompts(model, prompts, sampling.samples, pad)
        for indices, copies in groups:
            batch = _left_pad(model, [prompts[k] for k in indices], pad)
            width = batch["input_ids"].shape[1]
            # RecurrentGemma would continue from the state of an earlier call if a prompt has a single token.
            with preserve_forward_state(model):
                rows = model.generate(
                    **{name: value.repeat_interleave(copies, dim=0) for name, value in batch.items()},
                    **shared_prefill(model, batch, copies),
                    **options,
                    stopping_criteria=StoppingCriteriaList([stopped]),
                )[:, width:].tolist()
            texts = [cut(row) for row in rows]
            for row, k in enumerate(indices):
                texts_by_prompt[k] += texts[row * copies : (row + 1) * copies]
    return texts_by_prompt


def _left_pad(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Return a batch of prompts, padded on the left, with its attention mask."""
    width, device = max(map(len, prompts)), device_of(model)
    ids = [[pad] * (width - len(row)) + list(row) for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _batch_prompts(model: Any, prompts: Sequence[Sequence[int]], samples: int, pad: int) -> list[tuple[list[int], int]]:
    """Return batches of prompt indices, each with its number of texts per prompt."""
    if len(prompts) * samples > 1 and (reason := batch_dependence(model, max(prompts, key=len), pad)):
        warn_caller(
            f"{len(prompts) * samples} texts are generated one at a time: in a batch, this {type(model).__name__} "
            f"{reason}."
        )
        return [([k], 1) for k in range(len(prompts)) for _ in range(samples)]
    by_length: dict[int, list[int]] = {}
    for k, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(k)
    if len(by_length) < 2 or not (reason := padding_dependence(model, prompts, pad)):
        return [(list(range(len(prompts))), samples)]
    warn_caller(
        f"Prompts of {len(by_length)} lengths are generated in separate batches: with padding, this "
        f"{type(model).__name__} {reason}."
    )
    return [(alike, samples) for alike in by_length.values()]


def batch_dependence(model: Any, prompt: Sequence[int], pad: int) -> str:
    """Describe how the second generated token changes if a prompt is batched with a copy; empty if it does not.

    Only models without a key-value cache are tested: RWKV in Transformers 5.24 mixes the states of all rows.
    """
    if cache_argument(model) is not None:
        return ""
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": pad, "use_cache": True}
    options |= _LOGITS
    with torch.autocast(device_of(model).type, enabled=False):
        try:
            single = model.generate(**_left_pad(model, [prompt], pad), **options).logits
        except Exception:  # the same error will be raised when the model generates
            return ""
        try:
            paired = model.generate(**_left_pad(model, [prompt] * 2, pad), **options).logits
        except Exception as error:
            return f"fails ({error})"
    same = all(logits_allclose(model, b[:1], a) for a, b in zip(single, paired, strict=True))
    return "" if same else "computes different logits"


def padding_dependence(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> str:
    """Describe how padding to the longest prompt changes other prompts; empty if it does not. Autocast is off.

    Tested are the shortest prompt and the longest one with padding.
    """
    longest = max(prompts, key=len)
    padded = [prompt for prompt in prompts if len(prompt) < len(longest)]
    for prompt in {len(prompt): prompt for prompt in (min(padded, key=len), max(padded, key=len))}.values():
        if reason := _padding_dependence(model, [prompt, longest], pad):
            return reason
    return ""


def _padding_dependence(model: Any, pair: Sequence[Sequence[int]], pad: int) -> str:
    """Describe how padding to the second prompt changes the first; empty if it does not."""
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": pad, **_LOGITS}
    with torch.autocast(device_of(model).type, enabled=False):
        try:
            runs = [model.generate(**_left_pad(model, rows, pad), **options).logits[0][:1] for rows in (pair[:1], pair)]
        except Exception as error:  # a model without a mask may raise anything; it can still run without padding
            return f"fails ({error})"
    return "" if logits_allclose(model, runs[1], runs[0]) else "computes different logits"


def cache_argument(model: nn.Module) -> str | None:
    """Return the name of the key-value cache argument (newer Transformers call it ``cache``), or None."""
    parameters = forward_parameters(model)
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def shared_prefill(model: Any, prompts: Mapping[str, Tensor], samples: int) -> dict[str, Any]:
    """Prefill each prompt without its last token once, and return the cache repeated for all samples.

    Return {} for one sample, for a cache that contains more than keys and values (recurrent states, ``rope_deltas``),
    and if the logits after the cache differ from those of the whole prompt.
    """
    name = cache_argument(model)
    if samples == 1 or name is None or not prompts["attention_mask"][:, :-1].any(dim=1).all():
        return {}
    if any(hasattr(module, "rope_deltas") for module in model.modules()) or not _continues_from_cache(
        model, prompts, name
    ):
        return {}
    cache = _prefill(model, prompts, name)
    cache.batch_repeat_interleave(samples)
    return {name: cache}


def _continues_from_cache(model: Any, prompts: Mapping[str, Tensor], name: str) -> bool:
    """Whether the shortest and longest prompts give the same logits with and without a cache. Autocast is off."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    lengths = prompts["attention_mask"].sum(dim=1)
    extremes = torch.stack([lengths.argmin(), lengths.argmax()])
    subset = {part: value[extremes] for part, value in prompts.items()}
    options = {"max_new_tokens": 1, "do_sample": False, **_LOGITS}
    try:
        with torch.autocast(device_of(model).type, enabled=False):
            cache = _prefill(model, subset, name)
            layers = getattr(cache, "layers", ())
            if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
                return False
            actual, expected = (
                model.generate(**subset, **options, **cached).logits[0] for cached in ({name: cache}, {})
            )
            return logits_allclose(model, actual, expected)
    except Exception:  # a model with another cache may raise anything; it can still run the whole prompt
        return False


def _prefill(model: Any, prompts: Mapping[str, Tensor], name: str) -> Any:
    """Run the prompts without their last tokens, at the positions that `generate` uses, and return the cache."""
    mask = prompts["attention_mask"]
    inputs = {**prompts, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    parameters = forward_parameters(model)
    prefix = {part: value[:, :-1] for part, value in inputs.items() if part in parameters}
    return getattr(model(**prefix, **logits_to_keep(model, 1), use_cache=True), name, None)


@contextmanager
def default_generation_config(model: Any) -> Iterator[None]:
    """Replace the model's generation configuration by the default, so that it adds no settings."""
    from transformers import GenerationConfig

    original = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original


@contextmanager
def seeded_sampling(device: torch.device, *parts: object) -> Iterator[None]:
    """Seed the random generators from `parts`, and restore their states on exit."""
    seed = int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:7])
    cuda = device.type == "cuda"
    with exclusive_global_state(), torch.random.fork_rng(devices=[device] if cuda else []):
        seed_device(device, seed)
        yield


def seed_device(device: torch.device, seed: int) -> None:
    """Seed torch's generators of the CPU and of one device; ``torch.manual_seed`` seeds every accelerator."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def logits_allclose(model: nn.Module, actual: Tensor, expected: Tensor) -> bool:
    """Whether logits of shape (..., vocabulary) agree up to rounding, row by row.

    The standard deviation of the difference, which ignores a constant offset, may be 0.1 % of that of the logits, or
    5 % with weights in half precision or under autocast.
    """
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    rounding = 5e-2 if half or torch.is_autocast_enabled(device_of(model).type) else 1e-3
    deviation, spread = (to_float64(values).std(dim=-1) for values in (actual - expected, expected))
    return bool((deviation <= rounding * spread).all())
