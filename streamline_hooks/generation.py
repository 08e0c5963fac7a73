"""Let a model write on from prompts, many at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from streamline_hooks.batch import device_of, positions_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import inference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_generates(model: Any, name: str = "The model") -> None:
    """Raise if a model does not write.

    Raises
    ------
    StreamlineError
        If it has no ``generate``, or says that it cannot.
    """
    can = getattr(model, "can_generate", lambda: True)
    if not callable(getattr(model, "generate", None)) or not can():
        raise StreamlineError(f"{name}, a {type(model).__name__}, cannot generate; give a causal language model.")


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text; a chat model may have several."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ends, tokenizer.eos_token_id) if i is not None}


def written_on(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    samples: int = 1,
    sampling: Mapping[str, float] | None = None,
    stop: Sequence[str] = (),
) -> list[list[list[int]]]:
    """Let a model write on from each prompt, all of them at the same time.

    Prompts are padded on the left. Neither dropout nor the settings in the model's own generation configuration play a
    part: without `sampling` the likeliest token is taken each time.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    prompts : sequence of sequence of int
        Tokens, one or more each.
    new_tokens : int
        At most so many more.
    samples : int
        Texts a prompt.
    sampling : mapping, optional
        ``temperature`` and ``top_p``, say; random numbers are drawn from torch's own generator, see `seeded`.
    stop : sequence of str
        Where one of these has been written, a text is at its end; it may be a little longer than that.

    Returns
    -------
    list of list of list of int
        For each prompt, for each sample, the new tokens. A token that ends a text is left out, with all after it.

    Raises
    ------
    StreamlineError
        If the model cannot generate, a prompt is empty, or there is no room for a prompt and what is to be written.
    """
    require_generates(model)
    if not all(map(len, prompts)):
        raise StreamlineError("A prompt has no token; expected one at least, such as the token that begins a text.")
    width, positions = max(map(len, prompts)), positions_of(model.config)
    if positions is not None and width + new_tokens > positions:
        raise StreamlineError(
            f"A prompt of {width} tokens and {new_tokens} more need {width + new_tokens} positions; the model has "
            f"{positions}. Give shorter prompts, or ask for fewer tokens."
        )
    ends = end_tokens(model, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, *sorted(ends)) if i is not None), 0)
    device = device_of(model)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    chosen: dict[str, Any] = {} if sampling is None else {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **sampling}
    if stop:
        chosen |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    with inference(model), _without_settings(model):
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=sampling is not None,
            num_return_sequences=samples,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            use_cache=True,
            **chosen,
        )[:, width:].tolist()
    texts = [_until(row, ends) for row in found]
    return [texts[k : k + samples] for k in range(0, len(texts), samples)]


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
        # Not torch.manual_seed, which seeds every accelerator, also those that are not put back.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _until(ids: Sequence[int], ends: set[int]) -> list[int]:
    found = next((k for k, one in enumerate(ids) if one in ends), len(ids))
    return list(ids[:found])
