"""Generate with two models from the same prompts, and show the texts side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from streamline_hooks.core import StreamlineError, validate_arguments
from streamline_hooks.evaluation.samples import GeneratedText, TextGenerationConfig, generate_texts

_GAP = "  |  "
_MIN_WIDTH = 40


@validate_arguments()
def generate_with_both(
    model: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int = 64,
    temperature: float = 0.0,
    chat: bool = False,
    seed: int = 0,
) -> list[tuple[GeneratedText, GeneratedText]]:
    """Generate continuations of the same prompts with a model and its original.

    Parameters
    ----------
    model, reference : transformers.PreTrainedModel
        The compressed model and the original.
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer of both models.
    prompts : sequence of str
        The prompts.
    new_tokens, temperature, chat, seed
        See `TextGenerationConfig`.

    Returns
    -------
    list of (GeneratedText, GeneratedText)
        For each prompt, the text of `model` and of `reference`, as in `CompressionResult.samples`.

    Raises
    ------
    StreamlineError
        As `generate_texts`.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model, tiny_tokenizer
    >>> model, original = tiny_model("llama", seed=1), tiny_model("llama")
    >>> ((text, reference),) = generate_with_both(model, original, tiny_tokenizer(), ["Once"], new_tokens=4)
    >>> text.prompt == reference.prompt
    True
    """
    config = TextGenerationConfig(new_tokens, temperature=temperature, chat=chat, seed=seed)
    texts = generate_texts(model, tokenizer, prompts, config, desc="generate")
    originals = generate_texts(reference, tokenizer, prompts, config, desc="generate: original")
    return [(text, original) for (text,), (original,) in zip(texts, originals, strict=True)]


def side_by_side(
    texts: Sequence[tuple[GeneratedText, GeneratedText]],
    names: tuple[str, str] = ("original", "compressed"),
    *,
    width: int = 100,
) -> str:
    r"""Format the texts of two models in two columns, with the original on the left.

    Parameters
    ----------
    texts : sequence of (GeneratedText, GeneratedText)
        Pairs of the compressed model's and the original's text (see `generate_with_both`).
    names : tuple of two str
        Headings of the left and the right column.
    width : int
        Characters per line, at least 40.

    Returns
    -------
    str

    Raises
    ------
    StreamlineError
        If `width` is below 40, or the two texts of a pair have different prompts.

    Examples
    --------
    >>> compressed = GeneratedText("The capital of France is", " Paris, on the Seine.", (1, 2), ended=True)
    >>> original = GeneratedText("The capital of France is", " Paris.", (1,), ended=True)
    >>> print(side_by_side([(compressed, original)], width=40))
    The capital of France is ...
    original           |  compressed
    Paris.             |  Paris, on the
                       |  Seine.
    """
    if width < _MIN_WIDTH:
        raise StreamlineError(
            f"width={width} is too small for two columns. Expected at least {_MIN_WIDTH}. Increase width."
        )
    return "\n".join(line for pair in texts for line in _pair(*pair, names, (width - len(_GAP)) // 2)).strip("\n")


def _pair(text: GeneratedText, original: GeneratedText, names: tuple[str, str], column: int) -> Iterator[str]:
    if text.prompt != original.prompt:
        raise StreamlineError(
            f"The texts of a pair have different prompts, {text.prompt!r} and {original.prompt!r}. Expected two texts "
            "of the same prompt. Generate them with generate_with_both."
        )
    yield ""
    yield from textwrap.wrap(f"{text.prompt.strip()} ...", 2 * column + len(_GAP))
    columns = [[name, *_lines(each.text, column)] for name, each in zip(names, (original, text), strict=True)]
    for left, right in zip_longest(*columns, fillvalue=""):
        yield f"{left:<{column}}{_GAP}{right}".rstrip()


def _lines(text: str, column: int) -> list[str]:
    """Wrap a text without empty lines; an empty text becomes "(nothing)"."""
    return [line for part in text.split("\n") for line in textwrap.wrap(part, column)] or ["(nothing)"]
