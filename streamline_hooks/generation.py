"""Let a model write on from prompts, many at a time."""

from __future__ import annotations

import hashlib
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import device_of, positions_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import forward_arguments, head_on_last, inference
from streamline_hooks.precision import speaks_alike
from streamline_hooks.surgery.forward_state import preserve_forward_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_generates(model: Any, name: str = "The model") -> None:
    """Raise if a model has no usable ``generate``."""
    can = getattr(model, "can_generate", lambda: True)
    if not callable(getattr(model, "generate", None)) or not can():
        raise StreamlineError(f"{name}, a {type(model).__name__}, cannot generate; give a causal language model.")


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """The tokens that end a text; a chat model may have several."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    own = () if tokenizer is None else (tokenizer.eos_token_id,)
    return {i for i in (*ends, *own) if i is not None}


def written_on(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    samples: int = 1,
    sampling: Mapping[str, float] | None = None,
    stop: Sequence[str] = (),
    keep_end: bool = False,
    told: Callable[[int], object] | None = None,
) -> list[list[list[int]]]:
    """Generate up to `new_tokens` tokens for each prompt, batched, and return them by prompt and sample.

    Prompts are padded on the left if that changes nothing for the shortest of them; else only prompts of one length
    share a batch, with a warning. A model without a key-value cache that answers differently in a batch runs each text
    alone. If the cache holds keys and values only, each prompt is prefilled once for all samples. Dropout and the
    model's generation configuration play no part: without `sampling` (``temperature``, ``top_p``) decoding is greedy.

    A text ends at the end token, or with the token that completes a `stop` string; that token is dropped unless
    `keep_end`. Without a tokenizer the model's configuration names the end token. `told` receives the number of running
    texts after each step.
    """
    from transformers import StoppingCriteriaList

    require_generates(model)
    if stop and tokenizer is None:
        raise StreamlineError(f"Where {list(stop)} stands in a text, a tokenizer has to tell; give one.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise StreamlineError(
            f"{type(model).__name__} reads a text and writes another one; what is needed here is a causal language "
            "model, which writes on."
        )
    if not all(map(len, prompts)):
        raise StreamlineError("A prompt has no token; expected one at least, such as the token that begins a text.")
    width, positions = max(map(len, prompts)), positions_of(model.config)
    if positions is not None and width + new_tokens > positions:
        raise StreamlineError(
            f"A prompt of {width} tokens and {new_tokens} more need {width + new_tokens} positions; the model has "
            f"{positions}. Give shorter prompts, or ask for fewer tokens."
        )
    ends = end_tokens(model, tokenizer)
    pad = min(ends, default=0)  # a row that has come to its end goes on with it, and is cut there
    chosen: dict[str, Any] = {} if sampling is None else {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **sampling}
    chosen |= {"do_sample": sampling is not None, "max_new_tokens": new_tokens, "pad_token_id": pad}
    found: list[list[list[int]]] = [[] for _ in prompts]
    with inference(model), _without_settings(model):
        with preserve_forward_state(model):
            groups = _run_together(model, prompts, samples, pad)
        for together, copies in groups:
            given = _padded(model, [prompts[k] for k in together], pad)
            width = given["input_ids"].shape[1]
            watching: list[Any] = [_Stopped(tokenizer, width, stop)] if stop else []
            watching += [_Told(told)] if told is not None else []
            watched = {"stopping_criteria": StoppingCriteriaList(watching)} if watching else {}
            # RecurrentGemma goes on from the state of an earlier call when a prompt has a single token.
            with preserve_forward_state(model):
                rows = model.generate(
                    **{name: value.repeat_interleave(copies, dim=0) for name, value in given.items()},
                    **shared_prefill(model, given, copies),
                    **chosen,
                    **watched,
                    eos_token_id=sorted(ends) or None,
                    use_cache=True,
                )[:, width:].tolist()
            texts = [_up_to(tokenizer, _until(row, ends, keep_end), stop) for row in rows]
            for place, k in enumerate(together):
                found[k] += texts[place * copies : (place + 1) * copies]
    return found


def _padded(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Prompts of different length as one batch, padded on the left, with the mask that says so."""
    width, device = max(map(len, prompts)), device_of(model)
    ids = [[pad] * (width - len(row)) + list(row) for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _run_together(model: Any, prompts: Sequence[Sequence[int]], samples: int, pad: int) -> list[tuple[list[int], int]]:
    """Return the prompts of one batch with the number of texts of each: all, those of one length, or one text."""
    if len(prompts) * samples > 1 and (reason := batch_dependence(model, max(prompts, key=len), pad)):
        warnings.warn(
            f"{len(prompts) * samples} texts are written one at a time: beside another, this {type(model).__name__} "
            f"{reason}.",
            stacklevel=3,
        )
        return [([k], 1) for k in range(len(prompts)) for _ in range(samples)]
    by_length: dict[int, list[int]] = {}
    for k, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(k)
    if len(by_length) < 2 or not (reason := padding_dependence(model, prompts, pad)):
        return [(list(range(len(prompts))), samples)]
    warnings.warn(
        f"Prompts of {len(by_length)} lengths are written on apart: behind padding, this {type(model).__name__} "
        f"{reason}.",
        stacklevel=3,
    )
    return [(alike, samples) for alike in by_length.values()]


def batch_dependence(model: Any, prompt: Sequence[int], pad: int) -> str:
    """Describe how a second token changes if a prompt runs beside a copy of itself; empty if it does not.

    Only models without a key-value cache are tested: RWKV in Transformers 5.24 mixes the states of all texts.
    """
    if cache_argument(model) is not None:
        return ""
    two = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": pad, "use_cache": True}
    two |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.autocast(device_of(model).type, enabled=False):
        try:
            alone = model.generate(**_padded(model, [prompt], pad), **two).logits
        except Exception:  # whatever it raises: it will when it writes, and nothing is known of company
            return ""
        try:
            beside = model.generate(**_padded(model, [prompt] * 2, pad), **two).logits
        except Exception as error:
            return f"fails ({error})"
    same = all(speaks_alike(model, b[:1], a) for a, b in zip(alone, beside, strict=True))
    return "" if same else "says something else"


def padding_dependence(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> str:
    """Describe how the shortest prompt changes when padded to the longest; empty if it does not. Autocast is off."""
    pair = [min(prompts, key=len), max(prompts, key=len)]
    one = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.autocast(device_of(model).type, enabled=False):
        try:
            expected, got = (
                model.generate(**_padded(model, few, pad), **one, pad_token_id=pad).logits[0][:1]
                for few in (pair[:1], pair)
            )
        except Exception as error:  # whatever a model that takes no mask may raise; it can still be run without padding
            return f"fails ({error})"
    return "" if speaks_alike(model, got, expected) else "says something else"


def cache_argument(model: nn.Module) -> str | None:
    """What a model calls its cache of keys and values: Transformers changed the name on its way to 5.40."""
    taken = forward_arguments(model)
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def shared_prefill(model: Any, prompts: Mapping[str, Tensor], samples: int) -> dict[str, Any]:
    """Return the cache of a prompt without its last token, run once and expanded to all samples.

    Return {} for one sample, for a cache that holds more than keys and values (recurrent states, ``rope_deltas``), and
    if the model does not continue from it as from the prompt.
    """
    name = cache_argument(model)
    if samples == 1 or name is None or not prompts["attention_mask"][:, :-1].any(dim=1).all():
        return {}
    if any(hasattr(module, "rope_deltas") for module in model.modules()) or not _goes_on(model, prompts, name):
        return {}
    cache = _keys_and_values(model, prompts, name)
    cache.batch_repeat_interleave(samples)
    return {name: cache}


def _goes_on(model: Any, prompts: Mapping[str, Tensor], name: str) -> bool:
    """Whether the two most different prompts end with the same logits with and without a cache. Autocast is off."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    lengths = prompts["attention_mask"].sum(dim=1)
    probed = torch.stack([lengths.argmin(), lengths.argmax()])
    few = {part: value[probed] for part, value in prompts.items()}
    one = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    try:
        with torch.autocast(device_of(model).type, enabled=False):
            cache = _keys_and_values(model, few, name)
            layers = getattr(cache, "layers", ())
            if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
                return False
            got, expected = (model.generate(**few, **one, **begun).logits[0] for begun in ({name: cache}, {}))
            return speaks_alike(model, got, expected)
    except Exception:  # whatever a model with a cache of another kind may raise: it can still run the whole
        return False


def _keys_and_values(model: Any, prompts: Mapping[str, Tensor], name: str) -> Any:
    """The cache before the last tokens, at the positions that `generate` gives them."""
    mask = prompts["attention_mask"]
    whole = {**prompts, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    taken = forward_arguments(model)
    first = {part: value[:, :-1] for part, value in whole.items() if part in taken}
    return getattr(model(**first, **head_on_last(model, 1), use_cache=True), name, None)


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """Let a model generate by what it is called with alone: its own settings would fill in what is not given."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def seeded(device: torch.device, *parts: object) -> Iterator[None]:
    """Seed the generators that sampling uses by all of `parts`, and put them back as they were."""
    seed = int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:7])
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        seed_generators(device, seed)
        yield


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed torch's generators of the CPU and of one device; ``torch.manual_seed`` would seed every accelerator."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _until(ids: Sequence[int], ends: set[int], keep_end: bool) -> list[int]:
    found = next((k for k, one in enumerate(ids) if one in ends), len(ids))
    return list(ids[: found + keep_end])


class _Stopped:
    """Whether each text holds one of several strings, after the prompt."""

    def __init__(self, tokenizer: Any, width: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.width, self.stop = tokenizer, width, stop

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(ids[:, self.width :])
        return torch.tensor([_holds(text, self.stop) for text in texts], dtype=torch.bool, device=ids.device)


class _Told:
    """Stops nothing, and says that a step was made."""

    def __init__(self, told: Callable[[int], object]) -> None:
        self.told = told

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.told(len(ids))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _up_to(tokenizer: Any, ids: list[int], stop: Sequence[str]) -> list[int]:
    """The tokens up to the one by which a string is complete."""
    if not stop or not _holds(tokenizer.decode(ids), stop):
        return ids
    return ids[: bisect_left(range(len(ids)), True, key=lambda count: _holds(tokenizer.decode(ids[:count]), stop))]


def _holds(text: str, stop: Sequence[str]) -> bool:
    return any(one in text for one in stop)
