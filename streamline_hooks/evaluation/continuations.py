"""How likely a model finds texts that continue others, and whether it would have written them itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import device_of, positions_by_mask, positions_of, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.questions import Question, joined
from streamline_hooks.generation import cache_argument
from streamline_hooks.passes import head_on_last, inference, progress
from streamline_hooks.precision import computes_alike
from streamline_hooks.task import logits_of


class NotFiniteLikelihood(StreamlineError):
    """A model gives a text a likelihood that is no number."""


@dataclass(frozen=True)
class Continuation:
    """What a model makes of a text that continues another.

    Attributes
    ----------
    loglikelihood : float
        In nats.
    tokens : int
        Scored ones.
    greedy : bool
        Whether each of them is the likeliest after those before it.
    """

    loglikelihood: float
    tokens: int
    greedy: bool


def score_continuations(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    add_bos: bool = False,
    what: str = "questions",
) -> list[tuple[Continuation, ...]]:
    """Score each continuation of each question after its context.

    Context and continuation are joined by a space, unless one of the two brings white space, and tokenised as one
    text. What is scored begins with the first token in which any choice's text differs from the context's own tokens:
    where a token spans the boundary, it is scored with the continuation, and for all choices of a question alike.

    These are lm-eval's numbers, but for what lies at the boundary: there a context that ends in white space is followed
    by one more, a text without a context begins with a space, and what is scored begins at the context's number of
    tokens; and texts that are too long are cut, which is refused here.

    A context that several choices share is run once, and its keys and values serve all of them. On the shortest and
    the longest question this is held against running each choice alone; where it gives something else, or cannot be
    done, all are run alone, and a warning says so.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    tokenizer : PreTrainedTokenizerBase
        Called as ``tokenizer(text, add_special_tokens=False)``; its ``input_ids`` are read.
    questions : sequence of Question
        One continuation each is enough here.
    batch_size : int
        Continuations at a time; a question with more of them is not divided.
    add_bos : bool
        Begin each text with the tokenizer's BOS token. A text that would have nothing before its first scored token
        begins with it, or with EOS where there is none, in any case.
    what : str
        What the bar says.

    Returns
    -------
    list of tuple of Continuation
        For each question, one a continuation.

    Raises
    ------
    NotFiniteLikelihood
        If a likelihood is not finite.
    StreamlineError
        If a question cannot be scored; the text says where it comes from.
    """
    if batch_size < 1:
        raise StreamlineError(f"batch_size={batch_size} must be 1 or more.")
    encode = Encoder(tokenizer, add_bos, positions_of(getattr(model, "config", None)))
    encoded = [encode(question) for question in questions]
    order = sorted(range(len(encoded)), key=lambda k: -max(len(s.tokens) for s in encoded[k]))
    found: list[tuple[Continuation, ...]] = [()] * len(encoded)
    with inference(model), progress(len(encoded), what, "questions") as bar:
        shared = _sharing_holds(model, encoded)
        for batch in _batches(order, encoded, batch_size):
            scored = [_alone, _with_shared_prefix][shared and _shares(encoded[batch[0]])]
            values = iter(scored(model, [encoded[k] for k in batch]))
            for k in batch:
                found[k] = tuple(next(values) for _ in encoded[k])
                nats = tuple(one.loglikelihood for one in found[k])
                if not all(map(math.isfinite, nats)):
                    raise NotFiniteLikelihood(
                        f"The log-likelihoods of {questions[k].where} are {nats}. Look at the model's weights, or run "
                        "in a wider precision (float32 or bfloat16)."
                    )
            bar.update(len(batch))
    return found


@dataclass(frozen=True)
class EncodedChoice:
    """The tokens of a context and a continuation, of which those from `start` on are scored."""

    tokens: tuple[int, ...]
    start: int


class Encoder:
    """Turns questions into tokens."""

    def __init__(self, tokenizer: Any, add_bos: bool, positions: int | None) -> None:
        self.tokenizer, self.add_bos, self.positions = tokenizer, add_bos, positions

    def __call__(self, question: Question) -> list[EncodedChoice]:
        """Return the token sequence of each choice."""
        pairs = zip(question.contexts, question.continuations, strict=True)
        contexts = {context: self.ids(context) for context in question.contexts}
        texts = [self.ids(joined(*pair)) for pair in pairs]
        starts = [common(ids, contexts[c]) for ids, c in zip(texts, question.contexts, strict=True)]
        if len(contexts) == 1:
            starts = [min(starts)] * len(starts)
        first = self.first() if self.add_bos or 0 in starts else ()
        return [self.sequence(question, first, *pair) for pair in zip(texts, starts, strict=True)]

    def sequence(self, question: Question, first: tuple[int, ...], ids: list[int], start: int) -> EncodedChoice:
        """Return the tokens of one choice, of which those from `start` on are scored."""
        if start == len(ids):
            raise StreamlineError(f"In {question.where} a continuation adds no token to its context.")
        tokens = (*first, *ids)
        if self.positions is not None and len(tokens) > self.positions:
            raise StreamlineError(
                f"{question.where} has {len(tokens)} tokens, more than the {self.positions} positions that the model "
                "has. Shorten it or leave it out."
            )
        return EncodedChoice(tokens, len(first) + start)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def first(self) -> tuple[int, ...]:
        """Return the special token that precedes every context."""
        names = ("bos_token_id",) if self.add_bos else ("bos_token_id", "eos_token_id")
        for name in names:
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return (int(token),)
        raise StreamlineError(
            f"The tokenizer has no {' and no '.join(names)} to begin a text with; give questions with a context, and "
            "add_bos=False."
        )


def _alone(model: nn.Module, questions: Sequence[Sequence[EncodedChoice]]) -> list[Continuation]:
    """Log-likelihoods, each text run whole; padded on the right, which no token of a causal model sees."""
    texts = [text for question in questions for text in question]
    width = max(len(text.tokens) for text in texts)
    given = _padded([(text.tokens, 0) for text in texts], 0, width)
    kept = head_on_last(model, width - min(text.start - 1 for text in texts))
    logits = logits_of(model(**prepare(model, given), **kept))
    left = width - logits.shape[1]
    return [_scored(logits[row], text.tokens[text.start :], text.start - 1 - left) for row, text in enumerate(texts)]


def _with_shared_prefix(model: nn.Module, questions: Sequence[Sequence[EncodedChoice]]) -> list[Continuation]:
    """Log-likelihoods, each question's context run once but for its last token, whose logits each choice needs.

    Contexts are padded on the left and continuations on the right, so that a text has no gap in it: positions,
    distances and sliding windows are those of the text alone.
    """
    texts = [text for question in questions for text in question]
    cut = max(text.start - 1 for text in texts)
    width = cut + max(len(text.tokens) - text.start + 1 for text in texts)
    rows = [row for row, question in enumerate(questions) for _ in question]
    whole = prepare(model, _padded([(text.tokens, cut - (text.start - 1)) for text in texts], cut, width))
    positions = positions_by_mask(model, whole["attention_mask"])  # behind a cache not every model counts on by itself
    whole |= {} if positions is None else {"position_ids": positions}
    first_of = [rows.index(row) for row in range(len(questions))]
    prefix = {name: whole[name][first_of, :cut] for name in _BY_TOKEN if name in whole}
    name = cache_argument(model)
    if name is None:
        raise StreamlineError(f"{type(model).__name__} takes no cache of keys and values.")
    cache = getattr(model(**(whole | prefix | head_on_last(model, 1) | {"use_cache": True})), name)
    cache.reorder_cache(torch.tensor(rows, device=device_of(model)))
    rest = {name: whole[name][:, cut:] for name in ("input_ids", "position_ids") if name in whole}
    logits = logits_of(model(**(whole | rest | {name: cache, "use_cache": True})))
    return [_scored(logits[row], text.tokens[text.start :], 0) for row, text in enumerate(texts)]


_BY_TOKEN = ("input_ids", "attention_mask", "position_ids")


def _sharing_holds(model: nn.Module, encoded: Sequence[Sequence[EncodedChoice]]) -> bool:
    """Whether a shared context gives what each choice alone does, on the two questions that are padded most."""
    sharing = sorted((question for question in encoded if _shares(question)), key=lambda question: question[0].start)
    if not sharing:
        return False
    probed = [sharing[0], sharing[-1]]
    alone = _nats(_alone(model, probed))
    try:
        shared = _nats(_with_shared_prefix(model, probed))
        reason = "it gives something else"
    except Exception as error:  # whatever a model without a cache, or with one of another kind, may raise
        shared, reason = torch.full_like(alone, math.nan), str(error)
    if not bool(alone.isfinite().all()) or computes_alike(model, shared, alone):
        return True
    text = f"Each choice is run alone: with a context that choices share, this {type(model).__name__} fails ({reason})."
    warnings.warn(text, stacklevel=3)
    return False


def _nats(scored: Sequence[Continuation]) -> Tensor:
    return torch.tensor([one.loglikelihood for one in scored], dtype=torch.float64)


def _shares(question: Sequence[EncodedChoice]) -> bool:
    """Whether the choices of a question share more of a context than its last token."""
    first = question[0]
    prefix = first.tokens[: first.start]
    return len(question) > 1 and first.start > 1 and all(t.tokens[: t.start] == prefix for t in question)


def _batches(order: Sequence[int], encoded: Sequence[Sequence[EncodedChoice]], size: int) -> Iterator[list[int]]:
    """Questions of about the same length, whose contexts are all shared or all not, with up to `size` choices."""
    for sharing in (True, False):
        batch: list[int] = []
        for k in (k for k in order if _shares(encoded[k]) is sharing):
            if batch and sum(len(encoded[j]) for j in (*batch, k)) > size:
                yield batch
                batch = []
            batch.append(k)
        if batch:
            yield batch


def _padded(texts: Sequence[tuple[tuple[int, ...], int]], least: int, width: int) -> dict[str, Tensor]:
    """Texts, each behind so many places of padding, and with as many after it as `width` leaves."""
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, pad) in enumerate(texts):
        ids[row, pad : pad + len(tokens)] = torch.tensor(tokens)
        mask[row, pad : pad + len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _scored(logits: Tensor, tokens: Sequence[int], place: int) -> Continuation:
    """What is made of tokens, of which the first is predicted at a place."""
    chosen = logits[place : place + len(tokens)]
    wide = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(dim=-1)
    targets = torch.tensor(tokens, device=wide.device)
    nats = wide.gather(1, targets[:, None]).flatten()
    return Continuation(math.fsum(nats.tolist()), len(tokens), bool((wide.argmax(dim=-1) == targets).all()))


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
