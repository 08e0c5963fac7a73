"""Perplexity of whole documents with sliding windows, and the agreement of two models on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    IGNORE_INDEX,
    StreamlineError,
    max_positions,
    prepare_inputs,
    progress_bar,
    validate_arguments,
)
from streamline_hooks.evaluation.agreement import (
    Agreement,
    compare_logits,
    require_finite_outputs,
    require_same_shape,
    warn_that_prompts_are_run_in_full,
)
from streamline_hooks.evaluation.perplexity import (
    NotFiniteLikelihood,
    Perplexity,
    negative_log_likelihoods,
    require_causal_lm,
)
from streamline_hooks.modeling import get_logits, inference, logits_to_keep, select_tokens

_DEFAULT_WINDOW = 1024
_FIRST_TOKENS = {"bos": ("bos_token_id", "eos_token_id"), "eos": ("eos_token_id",)}


@dataclass(frozen=True)
class TextPerplexity(Perplexity):
    """Perplexity of documents; instances can be added.

    Attributes
    ----------
    nll, tokens
        See `Perplexity`.
    bytes : int
        Length of the documents in UTF-8 bytes.
    unpredicted : int
        Number of first tokens of documents that were not predicted (with ``first=None``).

    Examples
    --------
    >>> print(TextPerplexity(nll=10 * math.log(8), tokens=10, bytes=15))
    perplexity 8 per token, 2.0000 bits per byte (10 tokens)
    """

    bytes: int = 0
    unpredicted: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood per byte, in bits; it is comparable across tokenizers."""
        if self.unpredicted:
            raise StreamlineError(
                f"{self.unpredicted} first tokens of documents were not predicted, so bits per byte are undefined. "
                'Expected documents that begin with a special token. Set first="bos" or first="eos".'
            )
        if not self.bytes:
            raise StreamlineError("The documents have no byte. Expected at least one. Pass documents with text.")
        return self.nll / (self.bytes * math.log(2))

    def __str__(self) -> str:
        if not self.tokens:
            return "no token predicted"
        bits = f", {self.bits_per_byte:.4f} bits per byte" if self.bytes and not self.unpredicted else ""
        return f"perplexity {self.value:.4g} per token{bits} ({self.tokens} tokens)"


@dataclass(frozen=True)
class TextComparison:
    """Perplexity of two models on the same documents, and their agreement on the predicted tokens."""

    changed: TextPerplexity
    original: TextPerplexity
    agreement: Agreement


@validate_arguments(window=1, stride=1, batch_size=1)
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
) -> TextPerplexity:
    """Compute the perplexity of whole documents of any length.

    The first window of a document predicts all of its tokens. Each further window advances by `stride` tokens and
    predicts the new tokens, so every token is predicted once, from at least ``window - stride + 1`` tokens where that
    many precede it. The last window is shifted back to full length.

    With ``stride=window`` and a window of the model's positions, this equals lm-eval's ``loglikelihood_rolling``. A
    smaller stride gives each token more context and costs ``window / stride`` times as much.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer, called as ``tokenizer(text, add_special_tokens=...)["input_ids"]``.
    texts : sequence of str
        The documents.
    window : int, optional
        Number of input tokens. By default 1024, or the model's positions if fewer.
    stride : int, optional
        Number of tokens that each window except the first predicts, 1 to `window`. By default half a window.
    batch_size : int
        Number of windows per forward pass.
    first : {"bos", "eos"}, optional
        First token of a document. With "bos", the tokenizer's BOS, or EOS if it has no BOS, as in lm-eval. With "eos",
        the tokenizer's EOS. With None no token is added, and the first token of the document is not predicted.
    add_special_tokens : bool
        Whether the tokenizer adds special tokens after the first token. They are predicted and counted. lm-eval adds
        them unless ``add_bos_token=False``.

    Returns
    -------
    TextPerplexity

    Raises
    ------
    NotFiniteLikelihood
        If the likelihood of a document is not finite.
    StreamlineError
        If the model is not a causal language model, the window exceeds the model's positions, the stride exceeds the
        window, or the tokenizer has no first token.

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
    >>> result = sliding_perplexity(model, Bytes(), ["ein Satz", "noch einer für später"], window=8, first="eos")
    >>> result.tokens, result.bytes
    (31, 31)
    >>> abs(result.value - 2**result.bits_per_byte) < 1e-9
    True
    """
    documents = _Documents(tokenizer, texts, first, add_special_tokens, *window_and_stride([model], window, stride))
    (result,), _ = documents.run([model], batch_size, "perplexity")
    return result


def domain_perplexity(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, window: int | None, stride: int | None,
    batch_size: int, first: str | None, desc: str,
) -> TextPerplexity:  # fmt: skip
    """Compute the perplexity of the documents of a domain; `desc` labels the progress bar."""
    documents = _Documents(tokenizer, texts, first, False, *window_and_stride([model], window, stride))
    (result,), _ = documents.run([model], batch_size, desc)
    return result


def sliding_agreement(
    model: nn.Module, original: nn.Module, tokenizer: Any, texts: Sequence[str], *, window: int | None,
    stride: int | None, batch_size: int, first: str | None, desc: str,
) -> TextComparison:  # fmt: skip
    """Compute the perplexity of two models and their agreement; see `sliding_perplexity`."""
    sizes = window_and_stride([model, original], window, stride)
    documents = _Documents(tokenizer, texts, first, False, *sizes)
    (changed, reference), agreement = documents.run([model, original], batch_size, desc)
    return TextComparison(changed, reference, agreement)


def window_and_stride(
    models: Iterable[nn.Module], window: int | None = None, stride: int | None = None
) -> tuple[int, int]:
    """Return window and stride with defaults applied (see `sliding_perplexity`).

    Raises StreamlineError if the stride exceeds the window, or the window exceeds the positions of a model.
    """
    positions = [(max_positions(getattr(model, "config", None)) or math.inf, type(model).__name__) for model in models]
    window = window or int(min([_DEFAULT_WINDOW, *(count for count, _ in positions)]))
    stride = stride or max(1, window // 2)
    if stride > window:
        raise StreamlineError(
            f"stride={stride} is larger than window={window}, which would skip tokens. Expected a stride of no more "
            "than the window. Decrease stride, or increase window."
        )
    for count, name in positions:
        if window > count:
            raise StreamlineError(
                f"window={window} exceeds the {count} positions of this {name}. Expected at most {count}. Decrease "
                "window."
            )
    return window, stride


def first_tokens(tokenizer: Any, first: str | None) -> tuple[int, ...]:
    """Return the token id prepended to documents (see `sliding_perplexity`); empty for ``first=None``."""
    names = _FIRST_TOKENS[first] if first is not None else ()
    token_ids = [token for name in names if (token := getattr(tokenizer, name, None)) is not None]
    if names and not token_ids:
        raise StreamlineError(
            f"first={first!r}, but the tokenizer has no {' and no '.join(names)}. Expected a tokenizer with this "
            "token. Set first=None; the first token of a document is then not predicted."
        )
    return tuple(map(int, token_ids[:1]))


class _Window(NamedTuple):
    """Input tokens `start` to `end` of a document, of which the last `scored` predict a scored token."""

    document: int
    start: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def context(self) -> int:
        return self.length - self.scored


def sliding_windows(document: int, predicted: int, window: int, stride: int) -> Iterator[_Window]:
    """Yield windows over a row of a first token and `predicted` further tokens."""
    done, step = 0, window
    while done < predicted:
        end = min(done + step, predicted)
        yield _Window(document, max(0, end - window), end, end - done)
        done, step = end, stride


class _Documents:
    """Tokenized documents with their windows, in which each token is scored once."""

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

    def run(self, models: Sequence[nn.Module], size: int, desc: str) -> tuple[list[TextPerplexity], Agreement]:
        """Return the perplexity of one or two models, and the agreement of the first with the second."""
        for model in models:
            require_causal_lm(model)
        nlls = [[0.0] * len(self.windows) for _ in models]
        tokens = sum(part.scored for part in self.windows)
        agreement = Agreement()
        warn_that_prompts_are_run_in_full(*models)
        with ExitStack() as stack, progress_bar(tokens, desc) as bar:
            for model in models:
                stack.enter_context(inference(model))
            for number, batch in enumerate(self._batches(size)):
                parts = [self.windows[k] for k in batch]
                logits, targets = self._logits(models[0], parts)
                outputs = [logits]
                for original in models[1:]:
                    reference = self._logits(original, parts)[0].to(logits.device)
                    require_same_shape(reference, logits)
                    scored = targets != IGNORE_INDEX
                    pair = select_tokens(reference, scored), select_tokens(logits, scored)
                    require_finite_outputs(dict(zip(("original", "changed model"), pair, strict=True)), number)
                    agreement += compare_logits(*pair)
                    outputs.append(reference)
                for sums, output in zip(nlls, outputs, strict=True):
                    for k, nll in zip(batch, negative_log_likelihoods(output, targets), strict=True):
                        if not math.isfinite(nll):
                            raise NotFiniteLikelihood(
                                f"The negative log-likelihood of document {self.windows[k].document} is {nll}. "
                                "Expected a finite value. Check the model's weights, or run in float32 or bfloat16."
                            )
                        sums[k] = nll
                bar.update(sum(part.scored for part in parts))
        count = sum(len(text.encode("utf-8")) for text in self.texts)
        return [TextPerplexity(math.fsum(sums), tokens, count, self.unpredicted) for sums in nlls], agreement

    def _batches(self, size: int) -> Iterator[list[int]]:
        """Yield batches of windows of similar length; separate fully scored windows to run the LM head less."""
        order = sorted(range(len(self.windows)), key=lambda k: (self.windows[k].context, -self.windows[k].length))
        for whole in (True, False):
            kind = [k for k in order if (self.windows[k].context == 0) is whole]
            yield from (kind[at : at + size] for at in range(0, len(kind), size))

    def _logits(self, model: nn.Module, parts: Sequence[_Window]) -> tuple[Tensor, Tensor]:
        """Return logits and targets from the first scored position of all windows, with right padding."""
        width = max(part.length for part in parts)
        left = min(part.context for part in parts)
        ids = torch.zeros(len(parts), width, dtype=torch.long)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
        for k, part in enumerate(parts):
            row = self.rows[part.document]
            ids[k, : part.length] = torch.tensor(row[part.start : part.end])
            mask[k, : part.length] = 1
            targets[k, part.context : part.length] = torch.tensor(row[part.end - part.scored + 1 : part.end + 1])
        inputs = prepare_inputs(model, {"input_ids": ids, "attention_mask": mask})
        logits: Tensor = get_logits(model(**inputs, **logits_to_keep(model, width - left)))[:, left - width :]
        return logits, targets[:, left:].to(logits.device)
