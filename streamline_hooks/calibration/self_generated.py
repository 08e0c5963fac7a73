"""Calibration text that an instruct model writes itself, through its chat template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm

from streamline_hooks.batch import device_of, positions_of
from streamline_hooks.calibration.generated_cache import GeneratedCache, GeneratedText
from streamline_hooks.calibration.near_copies import NearCopies
from streamline_hooks.calibration.prompts import FORMS, TOPICS, prompts
from streamline_hooks.digests import autocast_dtype, modules_digest, texts_digest, weights_digest
from streamline_hooks.errors import StreamlineError
from streamline_hooks.generation import end_tokens, seeded, written_on
from streamline_hooks.passes import inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A text of fewer tokens is an evasion or a title.
_SHORTEST = 16
# Of all runs of four tokens in a text, at least this share is different from the others; prose has above 0.9.
_LEAST_DISTINCT = 0.6
# So many batches one after the other without a single text that can be used: the model does not answer.
_PATIENCE = 8


def self_generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    cache: str | Path | None = None,
    sequence_length: int = 512,
    temperature: float = 0.8,
    top_p: float = 0.95,
    keep_fraction: float = 0.9,
    batch_size: int = 32,
    conversation: bool = False,
) -> list[str]:
    """Let an instruct model write text about many topics in many forms, and keep what it wrote well.

    Calibration text in the model's own words keeps a pruned model closer to what it was than foreign text does:
    arXiv 2410.09982 (self-data distillation) has the original model write the answers, and arXiv 2410.17711 filters
    what a model wrote by its own perplexity. Here texts that are short, say mostly what an earlier one said (a refusal
    that comes again and again, say), or repeat themselves are dropped, and of the others the ``keep_fraction`` of
    lowest perplexity is kept. What was cut off at the longest answer is kept as it is.

    A model that is used through its chat template sees the template's own words around every answer. With
    `conversation` they are kept: the text is what the model saw and said, special tokens written out, a system prompt
    that the template adds by itself included, and tokenises to the same tokens.

    The texts depend on the model, the settings and the seed, and not on ``tokens``: asking for more continues where
    less would have stopped. The random state of PyTorch on the CPU and on a CUDA device, and the model's training
    mode, are as before afterwards.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model that was trained to answer.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer, with a chat template.
    tokens : int
        Write until the texts that are kept have so many tokens together.
    seed : int, default 0
        Decides the order of the prompts and what is sampled.
    cache : str or Path, optional
        A folder for what was written. After an interrupt, the batches that are in it are not written again; nor on
        another day, where a chat template tells the model the date.
    sequence_length : int, default 512
        The longest answer, in tokens.
    temperature, top_p : float, default 0.8 and 0.95
        Of the sampling.
    keep_fraction : float, default 0.9
        Share of the usable texts to keep, above 0 and at most 1.
    batch_size : int, default 32
        Answers written at the same time.
    conversation : bool, default False
        Return whole conversations, one that does not tokenise to the same tokens left out, and count their tokens. They
        are written with other random numbers than the answers of the same seed, so that a mixture may hold both. Deal
        them with `mixed_split`, which leaves them whole.

    Returns
    -------
    list of str
        The answers (or conversations) that are kept, in the order in which they were written.

    Raises
    ------
    StreamlineError
        If a setting is out of range, the tokenizer has no chat template, the model cannot generate or has no room
        for an answer, the model writes nothing that can be used, the tokenizer does not read conversations back as
        the same tokens, or the cache's file is damaged.
    """
    _check(model, tokenizer, tokens, sequence_length, temperature, top_p, keep_fraction, batch_size)
    sampling = {"temperature": temperature, "top_p": top_p}
    settings: dict[str, Any] = {"sequence_length": sequence_length, "batch_size": batch_size, "seed": seed, **sampling}
    settings["ends"] = sorted(end_tokens(model, tokenizer))
    device = device_of(model)  # `model.device` is meta where weights are offloaded
    if products := autocast_dtype(model):
        settings["products"] = products
    if conversation:
        _require_read_back(tokenizer)
        settings["conversation"] = True
    draw = ("conversation",) if conversation else ()
    store = GeneratedCache(cache, _identity(model, tokenizer, settings) if cache is not None else {})
    queue = prompts(f"conversation {seed}" if conversation else seed)
    written: list[GeneratedText] = []
    usable: list[GeneratedText] = []
    copies = NearCopies()
    idle = 0
    with tqdm(total=tokens, unit="token", desc="Writing calibration text", disable=None) as bar, inference(model):
        for number in count():
            asked = list(islice(queue, batch_size))
            known = number < len(store.batches)
            if not known:
                with seeded(device, seed, number, *draw):
                    store.append(_write(model, tokenizer, asked, sequence_length, sampling, conversation))
            before = len(usable)
            written += store.batches[number]
            usable += usable_texts(store.batches[number], tokenizer, copies, conversation)
            kept = best_texts(usable, keep_fraction)
            total = sum(text.conversation_tokens if conversation else text.tokens for text in kept)
            bar.update(min(total, tokens) - bar.n)
            if known:
                bar.initial = bar.n  # the rate counts what is written now
            if total >= tokens:
                return [text.conversation if conversation else text.text for text in kept]
            idle = 0 if len(usable) > before else idle + 1
            if idle == _PATIENCE:
                break
    lost = sum(bool(text.text) and not text.conversation for text in written) if conversation else 0
    if lost > len(written) // 2:
        raise _not_read_back(tokenizer, f"{lost} of {len(written)} conversations")
    raise StreamlineError(
        f"{type(model).__name__} wrote {len(written):,} texts, of which {len(kept):,} with {total:,} tokens can be "
        f"used; {tokens:,} tokens were asked for. Expected answers of at least {_SHORTEST} tokens that do not repeat "
        "themselves or one another. The model may not be trained to answer: give text of your own with --calibration "
        "FILE."
    )


def _check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    sequence_length: int,
    temperature: float,
    top_p: float,
    keep_fraction: float,
    batch_size: int,
) -> None:
    for name, value, good, expected in (
        ("tokens", tokens, tokens >= 1, "at least 1"),
        ("sequence_length", sequence_length, sequence_length >= _SHORTEST, f"at least {_SHORTEST}"),
        ("temperature", temperature, temperature > 0, "a number above 0"),
        ("top_p", top_p, 0 < top_p <= 1, "a number above 0 and at most 1"),
        ("keep_fraction", keep_fraction, 0 < keep_fraction <= 1, "a number above 0 and at most 1"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ):
        if not good:
            raise StreamlineError(f"{name}={value!r}: expected {expected}. Change it, or leave it at its default.")
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise StreamlineError(
            f"The tokenizer {name!r} has no chat template, so its model cannot be asked to write its own calibration "
            "text. Expected the tokenizer of an instruct model. Give text with --calibration FILE."
        )
    if not model.can_generate():
        raise StreamlineError(
            f"{type(model).__name__} cannot generate, so it cannot write its own calibration text. Expected a causal "
            "language model. Give text with --calibration FILE."
        )


def _identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides what is written, but the day, where a chat template tells that."""
    ids = [_ids(tokenizer, text) for text in (*FORMS, *TOPICS)]
    config = model.config.to_dict()
    for incidental in ("_name_or_path", "transformers_version", "_commit_hash"):
        config.pop(incidental, None)
    return {
        "config": config,
        "weights": weights_digest(model),
        "modules": modules_digest(model),
        "template": tokenizer.chat_template,
        "tokenizer": texts_digest(map(str, (sorted(tokenizer.get_vocab().items()), ids))),
        "prompts": [FORMS, TOPICS],
        **settings,
    }


def _require_read_back(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless a prompt as text is read as the tokens that its chat template comes to."""
    chat = _asked(next(prompts(0)))
    ids = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
    if list(cast("list[int]", ids)) != _ids(tokenizer, _chat_text(tokenizer, chat)):
        raise _not_read_back(tokenizer, "a prompt in its chat template")


def _not_read_back(tokenizer: PreTrainedTokenizerBase, what: str) -> StreamlineError:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return StreamlineError(
        f"The tokenizer {name!r} does not read the same tokens back from {what}, written out as text with special "
        "tokens. Expected one that does, so that a model is calibrated on what it sees in use. Take the answers alone: "
        "--calibration self, or conversation=False."
    )


def _written_out(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens as text, with special ones."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[str],
    sequence_length: int,
    sampling: dict[str, float],
    conversation: bool,
) -> list[GeneratedText]:
    """Sample one answer to each prompt."""
    texts = [_chat_text(tokenizer, _asked(prompt)) for prompt in asked]
    rows = [_ids(tokenizer, text) for text in texts]
    width = max(map(len, rows))
    room = positions_of(model.config) or math.inf
    if room - width < _SHORTEST:
        raise StreamlineError(
            f"{type(model).__name__} has room for {room} tokens, and a prompt in its chat template has {width}. "
            f"Expected room for an answer of {_SHORTEST} tokens at least. Give text with --calibration FILE."
        )
    length = int(min(sequence_length, room - width))
    answers = written_on(model, tokenizer, rows, new_tokens=length, sampling=sampling, keep_end=conversation)
    judged = []
    for prompt, row, (answer,) in zip(texts, rows, answers, strict=True):
        ended = bool(conversation and answer and answer[-1] in end_tokens(model, tokenizer))
        text = _judged(model, tokenizer, row, answer[: len(answer) - ended])
        judged.append(_whole(tokenizer, text, prompt, row, answer) if conversation and text.text else text)
    return judged


def _asked(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _chat_text(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def _whole(
    tokenizer: PreTrainedTokenizerBase, text: GeneratedText, prompt: str, row: list[int], answer: list[int]
) -> GeneratedText:
    """Add the conversation, where it is read back as the same tokens: what was sampled may be no usual spelling."""
    seen = _written_out(tokenizer, row)
    every = _written_out(tokenizer, row + answer)
    written = prompt + every.removeprefix(seen)  # some tokenizers write a prompt otherwise than it was given
    if not every.startswith(seen) or _ids(tokenizer, written) != row + answer:
        return text
    return replace(text, conversation=written, conversation_tokens=len(row + answer))


def _judged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int]
) -> GeneratedText:
    """Score one answer alone, unpadded, so that the score does not depend on its batch."""
    text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
    if not text:
        return GeneratedText("", 0, 0.0, 0.0)
    ids = torch.tensor([prompt + answer], device=device_of(model))
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])
    runs = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
    return GeneratedText(
        text=text,
        tokens=len(_ids(tokenizer, text)),
        perplexity=math.exp(loss.item()),
        distinct=len(set(runs)) / max(1, len(runs)),
    )


def usable_texts(
    texts: Sequence[GeneratedText], tokenizer: PreTrainedTokenizerBase, copies: NearCopies, conversation: bool
) -> list[GeneratedText]:
    """Leave out what is short, repeats itself, is a near-copy of an earlier text, or has no conversation to it."""
    return [
        text
        for text in texts
        if text.tokens >= _SHORTEST
        and text.distinct >= _LEAST_DISTINCT
        and (text.conversation or not conversation)
        and copies.keep(_ids(tokenizer, text.text))
    ]


def best_texts(texts: Sequence[GeneratedText], fraction: float) -> list[GeneratedText]:
    """Keep a fraction of lowest perplexity, in the order given."""
    ranked = sorted(range(len(texts)), key=lambda i: texts[i].perplexity)
    return [texts[i] for i in sorted(ranked[: math.ceil(fraction * len(texts))])]
