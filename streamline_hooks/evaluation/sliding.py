"""Perplexity of whole documents by a window that slides over them, and bits per byte."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import positions_of, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.perplexity import NotFiniteLikelihood, Perplexity, negative_log_likelihoods
from streamline_hooks.passes import head_on_last, inference, progress
from streamline_hooks.predicted import UNCOUNTED
from streamline_hooks.task import logits_of

_USUAL_WINDOW = 1024
_BEGINNINGS = {"bos": ("bos_token_id", "eos_token_id"), "eos": ("eos_token_id",)}
_WHITE_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class TextPerplexity:
    """What documents cost a model, in sums that can be added.

    Attributes
    ----------
    nll : float
        Sum of −log p(token | those before it in its window), in nats.
    tokens : int
        Predicted tokens.
    bytes : int
        Of the documents in UTF-8.
    words : int
        Pieces of the documents between runs of white space; as lm-eval counts them, white space at an end of a
        document parts off one more, and an empty document has one.
    unpredicted : int
        First tokens of documents that nothing came before, and that were therefore not predicted.
    """

    nll: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    unpredicted: int = 0

    @property
    def value(self) -> float:
        """Exp of the mean negative log-likelihood a token."""
        return Perplexity(self.nll, self.tokens).value

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood a byte, in bits; it compares models whose tokenizers differ."""
        return self._of_all(self.bytes, "byte") / (self.bytes * math.log(2))

    @property
    def word_perplexity(self) -> float:
        """Exp of the negative log-likelihood a word."""
        return Perplexity(self._of_all(self.words, "word"), self.words).value

    def _of_all(self, count: int, unit: str) -> float:
        """The sum, where it is that of all that was counted."""
        if self.unpredicted:
            raise StreamlineError(
                f"{self.unpredicted} tokens at the beginnings of documents were not predicted, so that no sum a {unit} "
                'can be given. Let documents begin with a token of their own: first="bos" or first="eos".'
            )
        if not count:
            raise StreamlineError(f"The documents have no {unit}; give some that are not empty.")
        return self.nll

    def __add__(self, other: TextPerplexity) -> TextPerplexity:
        return TextPerplexity(
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.words + other.words,
            self.unpredicted + other.unpredicted,
        )

    def __str__(self) -> str:
        if not self.tokens:
            return "no token predicted"
        said = f"perplexity {self.value:.4g} a token"
        if not self.unpredicted and self.bytes:
            said += f", {self.word_perplexity:.4g} a word, {self.bits_per_byte:.4f} bits a byte"
        return f"{said} ({self.tokens} tokens)"


@checked(batch_size=1)
def sliding_perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    first: Literal["bos", "eos"] | None = "bos",
    add_special_tokens: bool = False,
    what: str = "perplexity",
) -> TextPerplexity:
    """Perplexity of whole documents of any length.

    A document is a row of tokens behind a first one. The first window predicts as many tokens as it is long; each
    further one lies `stride` tokens on and predicts those that are new, from all the others in it. So every token is
    predicted once, from no less than ``window - stride + 1`` tokens where as many come before it. The last window is
    as long as the others: it reaches further back.

    With ``stride=window`` this is the ``loglikelihood_rolling`` of lm-eval, for a window of the model's positions. A
    smaller stride gives each token more to be predicted from, and costs ``window / stride`` times as much.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    tokenizer : PreTrainedTokenizerBase
        Called as ``tokenizer(text, add_special_tokens=...)``; its ``input_ids`` are read.
    texts : sequence of str
        Documents; an empty one has nothing to predict.
    window : int, optional
        Tokens that the model is given at a time; by default 1024, or the positions that it has, if they are fewer.
    stride : int, optional
        Tokens that a window predicts from the second one on, 1 to `window`; by default half of a window.
    batch_size : int
        Windows at a time.
    first : {"bos", "eos"}, optional
        What a document begins with: the tokenizer's BOS token, or its EOS where it has none, as in lm-eval; its EOS;
        or, with None, the document's own first token, which is then not predicted.
    add_special_tokens : bool
        Let the tokenizer put its own special tokens around a document, behind the first one; they are predicted and
        counted like any other. lm-eval does so unless it is told ``add_bos_token=False``.
    what : str
        What the bar says.

    Returns
    -------
    TextPerplexity

    Raises
    ------
    NotFiniteLikelihood
        If a document's likelihood is not finite.
    StreamlineError
        If the window is above the model's positions, the stride above the window, or the tokenizer has no token to
        begin with.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(
    ...     LlamaConfig(
    ...         vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ...     )
    ... )
    >>> class Bytes:
    ...     eos_token_id = 0
    ...
    ...     def __call__(self, text, add_special_tokens):
    ...         return {"input_ids": list(text.encode())}
    >>> found = sliding_perplexity(model, Bytes(), ["ein Satz", "noch einer für später"], window=8, first="eos")
    >>> found.tokens, found.bytes, found.words
    (31, 31, 6)
    >>> abs(found.value - 2**found.bits_per_byte) < 1e-9
    True
    """
    settings = WindowSettings(window, stride, batch_size, first, add_special_tokens)
    documents = Documents(model, tokenizer, texts, settings)
    found = [0.0] * len(documents.windows)
    with inference(model), progress(documents.scored, what) as bar:
        for batch in documents.batches():
            logits, targets = documents.run(model, batch)
            documents.collect(found, batch, logits, targets)
            bar.update(sum(documents.windows[k].scored for k in batch))
    return documents.perplexity(found)


@dataclass(frozen=True)
class WindowSettings:
    """How documents are read; see `sliding_perplexity`."""

    window: int | None = None
    stride: int | None = None
    batch_size: int = 8
    first: Literal["bos", "eos"] | None = "bos"
    add_special_tokens: bool = False

    def __post_init__(self) -> None:
        window, stride = self.window, self.stride
        far = window is not None and stride is not None and stride > window
        if far or min(one for one in (window, stride, self.batch_size) if one is not None) < 1:
            raise StreamlineError(
                f"Got window={window}, stride={stride}, batch_size={self.batch_size}; expected all to be 1 or more, "
                "and the stride no more than the window, so that no token is left out."
            )
        if self.first is not None and self.first not in _BEGINNINGS:
            raise StreamlineError(f'first={self.first!r} is not known; expected "bos", "eos" or None.')


class Documents:
    """Documents as rows of tokens, and the windows over them, in which each token is scored once."""

    def __init__(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], settings: WindowSettings) -> None:
        window, stride = _checked(model, texts, settings)
        begin = _first_token(tokenizer, settings.first)
        self.texts, self.size = texts, settings.batch_size
        special = settings.add_special_tokens
        self.rows = [(*begin, *tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]
        self.windows = [
            part
            for number, row in enumerate(self.rows)
            for part in sliding_windows(number, len(row) - 1, window, stride)
        ]
        self.unpredicted = 0 if begin else sum(1 for row in self.rows if row)
        self.scored = sum(part.scored for part in self.windows)

    def batches(self) -> Iterator[list[int]]:
        """Windows of about one length; those of which every place is scored stay alone, for the sake of the LM head."""
        order = sorted(range(len(self.windows)), key=lambda k: (self.windows[k].context, -self.windows[k].length))
        for whole in (True, False):
            kind = [k for k in order if (self.windows[k].context == 0) is whole]
            yield from (kind[at : at + self.size] for at in range(0, len(kind), self.size))

    def run(self, model: nn.Module, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits and the tokens that they are to predict, from the first place on that any of the windows scores.

        Padded on the right, which no token of a causal model sees.
        """
        parts = [self.windows[k] for k in batch]
        width = max(part.length for part in parts)
        left = min(part.context for part in parts)
        ids = torch.zeros(len(parts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        targets = torch.full((len(parts), width), UNCOUNTED)
        for k, part in enumerate(parts):
            row = self.rows[part.document]
            ids[k, : part.length] = torch.tensor(row[part.start : part.end])
            mask[k, : part.length] = 1
            targets[k, part.context : part.length] = torch.tensor(row[part.end - part.scored + 1 : part.end + 1])
        given = prepare(model, {"input_ids": ids, "attention_mask": mask})
        logits: Tensor = logits_of(model(**given, **head_on_last(model, width - left)))[:, left - width :]
        return logits, targets[:, left:].to(logits.device)

    def collect(self, found: list[float], batch: Sequence[int], logits: Tensor, targets: Tensor) -> None:
        """Put the negative log-likelihood of each window of a batch in its place."""
        for k, nll in zip(batch, negative_log_likelihoods(logits, targets), strict=True):
            if not math.isfinite(nll):
                raise NotFiniteLikelihood(
                    f"The negative log-likelihood of document {self.windows[k].document} is {nll}. Look at the model's "
                    "weights, or run in a wider precision (float32 or bfloat16)."
                )
            found[k] = nll

    def perplexity(self, found: Sequence[float]) -> TextPerplexity:
        """Of all documents, by what each window came to."""
        return TextPerplexity(
            math.fsum(found),
            self.scored,
            sum(len(text.encode("utf-8")) for text in self.texts),
            sum(len(_WHITE_SPACE.split(text)) for text in self.texts),
            self.unpredicted,
        )


class _Window(NamedTuple):
    """A part of a document's row: from `start` up to `end` it is run, and what follows its last `scored` is scored."""

    document: int
    start: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def context(self) -> int:
        """Places whose next token is not scored here."""
        return self.length - self.scored


def usual_window(model: nn.Module) -> int:
    """Tokens of a window where no number is given: 1024, or the positions that a model has."""
    return min(_USUAL_WINDOW, positions_of(getattr(model, "config", None)) or _USUAL_WINDOW)


def sliding_windows(document: int, predicted: int, window: int, stride: int) -> Iterator[_Window]:
    """Windows over a row of so many tokens and a first one."""
    done, step = 0, window
    while done < predicted:
        end = min(done + step, predicted)
        yield _Window(document, max(0, end - window), end, end - done)
        done, step = end, stride


def _checked(model: nn.Module, texts: Sequence[str], settings: WindowSettings) -> tuple[int, int]:
    """The window and the stride, once it is sure that they can be used."""
    window, stride = settings.window, settings.stride
    positions = positions_of(getattr(model, "config", None))
    if window is None:
        window = usual_window(model)
    if stride is None:
        stride = max(1, window // 2)
    replace(settings, window=window, stride=stride)  # it refuses what cannot be used
    if positions is not None and window > positions:
        raise StreamlineError(
            f"window={window} is more than the {positions} positions that this {type(model).__name__} has. Give "
            f"window={positions} or less."
        )
    return window, stride


def _first_token(tokenizer: Any, first: str | None) -> tuple[int, ...]:
    if first is None:
        return ()
    for name in _BEGINNINGS[first]:
        token = getattr(tokenizer, name, None)
        if token is not None:
            return (int(token),)
    raise StreamlineError(
        f"The tokenizer has no {' and no '.join(_BEGINNINGS[first])} to begin a document with; give first=None, with "
        "which a document's own first token is not predicted."
    )
