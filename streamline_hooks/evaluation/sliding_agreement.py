"""Two models on the same documents, in one pass: the perplexity of each, and how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.evaluation.agreement import (
    Agreement,
    agreement_of,
    require_finite,
    require_one_vocabulary,
    require_two,
)
from streamline_hooks.evaluation.sliding import Documents, TextPerplexity, WindowSettings, usual_window
from streamline_hooks.passes import inference, progress
from streamline_hooks.predicted import UNCOUNTED
from streamline_hooks.task import real_tokens


@dataclass(frozen=True)
class TextComparison:
    """What two models make of the same documents.

    Attributes
    ----------
    changed, original : TextPerplexity
    agreement : Agreement
        At each place whose next token is predicted.
    """

    changed: TextPerplexity
    original: TextPerplexity
    agreement: Agreement


@checked()
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
    """Perplexity of two models and their agreement, on whole documents of any length.

    Each window is run through both models before the next, so that no logits are kept. What is scored, and all
    settings, are those of `sliding_perplexity`.

    Parameters
    ----------
    model, original : torch.nn.Module
        Two modules of one vocabulary.
    tokenizer : PreTrainedTokenizerBase
    texts : sequence of str
    window, stride, batch_size, first, add_special_tokens, what
        See `sliding_perplexity`; a window has to fit both models, and the usual one is what fits both.

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
    sizes = [usual_window(one) if window is None else window for one in (model, original)]
    settings = WindowSettings(min(sizes), stride, batch_size, first, add_special_tokens)
    Documents(original, tokenizer, [], settings)  # it has to fit this one too
    documents = Documents(model, tokenizer, texts, settings)
    mine, theirs = ([0.0] * len(documents.windows) for _ in range(2))
    agreement = Agreement()
    with inference(model), inference(original), progress(documents.scored, what) as bar:
        for number, batch in enumerate(documents.batches()):
            logits, targets = documents.run(model, batch)
            reference, _ = documents.run(original, batch)
            require_one_vocabulary(reference, logits)
            reference, scored = reference.to(logits.device), targets != UNCOUNTED
            pair = real_tokens(reference, scored), real_tokens(logits, scored)
            require_finite(dict(zip(("original", "changed model"), pair, strict=True)), number)
            documents.collect(mine, batch, logits, targets)
            documents.collect(theirs, batch, reference, targets)
            agreement += agreement_of(*pair)
            bar.update(sum(documents.windows[k].scored for k in batch))
    return TextComparison(documents.perplexity(mine), documents.perplexity(theirs), agreement)
