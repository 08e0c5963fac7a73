"""Perplexity of whole documents by a window that slides over them, and the agreement of two models on them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import positions_of, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.agreement import (
    Agreement,
    agreement_of,
    require_finite,
    require_one_vocabulary,
    require_two,
)
from streamline_hooks.evaluation.perplexity import NotFiniteLikelihood, Perplexity, negative_log_likelihoods
from streamline_hooks.passes import head_on_last, inference, progress
from streamline_hooks.predicted import UNCOUNTED
from streamline_hooks.task import logits_of, real_tokens

_USUAL_WINDOW = 1024
_BEGINNINGS = {"bos": ("bos_token_id", "eos_token_id"), "eos": ("eos_token_id",)}
_WHITE_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class TextPerplexity:
    """Negative log-likelihood of documents, in sums that can be added.

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
        """Return the sum if it is that of all bytes or words."""
        if self.unpredicted:
            raise StreamlineError(
                f"{self.unpredicted} tokens at the beginnings of documents were not predicted, so that no sum a {unit} "
                'can be given. Let documents begin with a token of their own: first="bos" or first="eos".'
            )
        if not count:
            raise StreamlineError(f"The documents have no {unit}; give some that are not empty.")
        return self.nll

    def __add__(self, other: TextPerplexity) -> TextPerplexity:
        return TextPerplexity(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        if not self.tokens:
            return "no token predicted"
        text = f"perplexity {self.value:.4g} a token"
        if not self.unpredicted and self.bytes:
            text += f", {self.word_perplexity:.4g} a word, {self.bits_per_byte:.4f} bits a byte"
        return f"{text} ({self.tokens} tokens)"


@dataclass(frozen=True)
class TextComparison:
    """Perplexity and agreement of two models on the same documents.

    Attributes
    ----------
    changed, original : TextPerplexity
    agreement : Agreement
        At each position whose next token is predicted.
    """

    changed: TextPerplexity
    original: TextPerplexity
    agreement: Agreement


@checked(window=1, stride=1, batch_size=1)
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
    """Compute the perplexity of whole documents of any length.

    The first window of a document predicts as many tokens as it is long; each further one lies `stride` tokens on and
    predicts those that are new. So every token is predicted once, from no less than ``window - stride + 1`` tokens
    where as many come before it. The last window is as long as the others: it reaches further back.

    With ``stride=window`` this is the ``loglikelihood_rolling`` of lm-eval, for a window of the model's positions. A
    smaller stride gives each token more context, and costs ``window / stride`` times as much.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    tokenizer : PreTrainedTokenizerBase
        Called as ``tokenizer(text, add_special_tokens=...)``; its ``input_ids`` are read.
    texts : sequence of str
        Documents; an empty one has nothing to predict.
    window : int, optional
        Tokens of the model's input; by default 1024, or the model's positions if they are fewer.
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
        Label of the progress bar.

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
    documents = _Documents(tokenizer, texts, first, add_special_tokens, *window_and_stride([model], window, stride))
    (found,), _ = documents.run([model], batch_size, what)
    return found


@checked(window=1, stride=1, batch_size=1)
def sliding_agreement(
    model: nn.Module,
    original: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    first: Literal["bos", "eos"] | None = "bos",
    add_special_tokens: bool = False,
    what: str = "perplexity and agreement",
) -> TextComparison:
    """Compute the perplexity of two models and their agreement, on whole documents of any length.

    Each window is run through both models before the next, so that no logits are kept.

    Parameters
    ----------
    model, original : torch.nn.Module
        Two modules of one vocabulary.
    tokenizer, texts, window, stride, batch_size, first, add_special_tokens, what
        See `sliding_perplexity`; a window has to fit both models.

    Returns
    -------
    TextComparison

    Raises
    ------
    NotFiniteLikelihood
        If a document's likelihood is not finite.
    StreamlineError
        If both are one module or differ in their vocabulary; see `sliding_perplexity` for the rest.
    """
    require_two(model, original)
    sizes = window_and_stride([model, original], window, stride)
    documents = _Documents(tokenizer, texts, first, add_special_tokens, *sizes)
    (changed, reference), agreement = documents.run([model, original], batch_size, what)
    return TextComparison(changed, reference, agreement)


def window_and_stride(
    models: Iterable[nn.Module], window: int | None = None, stride: int | None = None
) -> tuple[int, int]:
    """Return the window and stride with their defaults, see `sliding_perplexity`; raise if a model cannot run them."""
    positions = [(positions_of(getattr(one, "config", None)) or math.inf, type(one).__name__) for one in models]
    window = window or int(min([_USUAL_WINDOW, *(count for count, _ in positions)]))
    stride = stride or max(1, window // 2)
    if stride > window:
        raise StreamlineError(
            f"Got window={window}, stride={stride}. Expected a stride of no more than the window, so that no token is "
            "left out. Give a smaller stride or a larger window."
        )
    for count, name in positions:
        if window > count:
            raise StreamlineError(
                f"window={window} is more than the {count} positions that this {name} has. Give window={count} or less."
            )
    return window, stride


def first_tokens(tokenizer: Any, first: str | None) -> tuple[int, ...]:
    """Return the token that a document begins with, see `sliding_perplexity`; none for None."""
    names = _BEGINNINGS[first] if first is not None else ()
    found = [token for name in names if (token := getattr(tokenizer, name, None)) is not None]
    if names and not found:
        raise StreamlineError(
            f"The tokenizer has no {' and no '.join(names)} to begin a document with; give first=None, with which a "
            "document's own first token is not predicted."
        )
    return tuple(map(int, found[:1]))


class _Window(NamedTuple):
    """A part of a document's row: `start` to `end` is the input, whose last `scored` positions are scored."""

    document: int
    start: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def context(self) -> int:
        """Positions whose next token is not scored here."""
        return self.length - self.scored


def sliding_windows(document: int, predicted: int, window: int, stride: int) -> Iterator[_Window]:
    """Yield windows over a row of `predicted` tokens and a first one."""
    done, step = 0, window
    while done < predicted:
        end = min(done + step, predicted)
        yield _Window(document, max(0, end - window), end, end - done)
        done, step = end, stride


class _Documents:
    """Documents as rows of tokens, and the windows over them, in which each token is scored once."""

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], first: str | None, special: bool, window: int, stride: int
    ) -> None:
        begin = first_tokens(tokenizer, first)
        self.texts = texts
        self.rows = [(*begin, *tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]
        self.windows = [
            part for k, row in enumerate(self.rows) for part in sliding_windows(k, len(row) - 1, window, stride)
        ]
        self.unpredicted = 0 if begin else sum(1 for row in self.rows if row)

    def run(self, models: Sequence[nn.Module], size: int, what: str) -> tuple[list[TextPerplexity], Agreement]:
        """Return the perplexity of one or two models, and the agreement of the first with the second."""
        nlls = [[0.0] * len(self.windows) for _ in models]
        tokens = sum(part.scored for part in self.windows)
        agreement = Agreement()
        with ExitStack() as stack, progress(tokens, what) as bar:
            for model in models:
                stack.enter_context(inference(model))
            for number, batch in enumerate(self._batches(size)):
                parts = [self.windows[k] for k in batch]
                logits, targets = self._logits(models[0], parts)
                outputs = [logits]
                for original in models[1:]:
                    reference = self._logits(original, parts)[0].to(logits.device)
                    require_one_vocabulary(reference, logits)
                    scored = targets != UNCOUNTED
                    pair = real_tokens(reference, scored), real_tokens(logits, scored)
                    require_finite(dict(zip(("original", "changed model"), pair, strict=True)), number)
                    agreement += agreement_of(*pair)
                    outputs.append(reference)
                for sums, output in zip(nlls, outputs, strict=True):
                    self._score(sums, batch, output, targets)
                bar.update(sum(part.scored for part in parts))
        sizes = (
            tokens,
            sum(len(text.encode("utf-8")) for text in self.texts),
            sum(len(_WHITE_SPACE.split(text)) for text in self.texts),
            self.unpredicted,
        )
        return [TextPerplexity(math.fsum(each), *sizes) for each in nlls], agreement

    def _batches(self, size: int) -> Iterator[list[int]]:
        """Yield windows of similar length; fully scored ones apart, so that the LM head runs on few positions."""
        order = sorted(range(len(self.windows)), key=lambda k: (self.windows[k].context, -self.windows[k].length))
        for whole in (True, False):
            kind = [k for k in order if (self.windows[k].context == 0) is whole]
            yield from (kind[at : at + size] for at in range(0, len(kind), size))

    def _logits(self, model: nn.Module, parts: Sequence[_Window]) -> tuple[Tensor, Tensor]:
        """Return logits and the tokens that they predict, from the first scored position of any window on.

        Padded on the right, which no token of a causal model sees.
        """
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

    def _score(self, nlls: list[float], batch: Sequence[int], logits: Tensor, targets: Tensor) -> None:
        """Set the negative log-likelihood of each window of a batch."""
        for k, nll in zip(batch, negative_log_likelihoods(logits, targets), strict=True):
            if not math.isfinite(nll):
                raise NotFiniteLikelihood(
                    f"The negative log-likelihood of document {self.windows[k].document} is {nll}. Look at the model's "
                    "weights, or run in a wider precision (float32 or bfloat16)."
                )
            nlls[k] = nll
