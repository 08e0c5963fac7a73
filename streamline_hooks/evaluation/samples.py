"""Generate texts from prompts, and measure length, repetition and agreement with another model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from operator import and_, eq
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    Config,
    StreamlineError,
    device_of,
    get_logger,
    max_positions,
    progress_bar,
    validate_arguments,
)
from streamline_hooks.data import documents_of
from streamline_hooks.evaluation.speed import SpeedReport, TimedModel, max_prompt_tokens, measure_speed
from streamline_hooks.modeling import SamplingConfig, generate_tokens, seeded_sampling
from streamline_hooks.surgery import LayerSurgeon

logger = get_logger(__name__)

_NGRAM = 4


@dataclass(frozen=True)
class GeneratedText:
    """Generated text.

    Attributes
    ----------
    prompt, text : str
        The prompt and the generated text.
    tokens : tuple of int
        The generated token ids.
    ended : bool
        Whether generation ended before the limit of new tokens.

    Examples
    --------
    >>> GeneratedText("Once", " upon a time", (5, 6, 7), ended=False).tokens
    (5, 6, 7)
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    ended: bool

    @property
    def repetition(self) -> float:
        """Fraction of repeated 4-grams of tokens (seq-rep-4, arXiv 1908.04319); NaN for fewer than four tokens.

        Examples
        --------
        >>> round(GeneratedText("", "", (1, 2, 3, 4, 1, 2, 3, 4), ended=True).repetition, 3)
        0.2
        """
        ngrams = [self.tokens[k : k + _NGRAM] for k in range(len(self.tokens) - _NGRAM + 1)]
        return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else math.nan


@dataclass(frozen=True)
class GenerationStatistics:
    """Statistics of a non-empty tuple of generated texts."""

    texts: tuple[GeneratedText, ...]

    @property
    def repetition(self) -> float:
        """Mean fraction of repeated 4-grams over the texts with at least four tokens; NaN without such a text."""
        repetitions = [text.repetition for text in self.texts if not math.isnan(text.repetition)]
        return statistics.fmean(repetitions) if repetitions else math.nan

    @property
    def length(self) -> float:
        """Mean length in tokens."""
        return statistics.fmean(len(text.tokens) for text in self.texts)

    @property
    def ended(self) -> float:
        """Fraction of the texts that ended before the limit of new tokens."""
        return statistics.fmean(text.ended for text in self.texts)

    def __str__(self) -> str:
        return (
            f"{len(self.texts)} texts, {self.length:.0f} tokens on average, {self.ended:.0%} ended; "
            f"{self.repetition:.1%} of the {_NGRAM}-grams are repeated"
        )


@dataclass(frozen=True)
class GenerationAgreement:
    """Agreement of the greedy generations of two models.

    Attributes
    ----------
    lengths : tuple of int
        Length of the common prefix in tokens, by prompt.
    same : tuple of bool
        Whether both texts are identical and both or neither ended, by prompt.

    Examples
    --------
    >>> changed = GeneratedText("", "", (5, 6, 7), ended=False)
    >>> original = GeneratedText("", "", (5, 6, 8), ended=False)
    >>> print(GenerationAgreement.of([changed, changed], [original, changed]))
    2.5 tokens of common prefix, 50% of 2 texts identical
    """

    lengths: tuple[int, ...]
    same: tuple[bool, ...]

    @classmethod
    def of(cls, texts: Sequence[GeneratedText], reference: Sequence[GeneratedText]) -> GenerationAgreement:
        """Compare the texts of two models. Raises StreamlineError unless the prompts are equal."""
        if not texts or [text.prompt for text in texts] != [text.prompt for text in reference]:
            raise StreamlineError(
                f"GenerationAgreement received {len(texts)} texts and {len(reference)} of the original. Expected texts "
                "of the same prompts in the same order, at least one. Generate them again."
            )
        pairs = list(zip(texts, reference, strict=True))
        lengths = tuple(sum(accumulate(map(eq, a.tokens, b.tokens), and_)) for a, b in pairs)
        return cls(lengths, tuple(a.tokens == b.tokens and a.ended == b.ended for a, b in pairs))

    @property
    def length(self) -> float:
        """Mean length of the common prefix in tokens."""
        return statistics.fmean(self.lengths)

    @property
    def share(self) -> float:
        """Fraction of the texts that are identical."""
        return statistics.fmean(self.same)

    def __str__(self) -> str:
        count = len(self.same)
        return f"{self.length:.1f} tokens of common prefix, {self.share:.0%} of {count} texts identical"


@dataclass(frozen=True)
class TextGenerationConfig(Config):
    """Settings of `generate_texts`.

    Attributes
    ----------
    new_tokens : int
        Maximum number of generated tokens.
    samples : int
        Number of texts per prompt. More than one requires a temperature above 0.
    temperature, top_p : float
        Sampling settings. Temperature 0 is greedy decoding.
    stop : sequence of str
        Strings before which a text ends.
    chat : bool
        Whether to apply the chat template to each prompt.
    batch_size : int
        Number of texts that are generated together. Samples depend on it.
    seed : int
        Seed of sampling.

    Raises
    ------
    StreamlineError
        If a setting is out of range.

    Examples
    --------
    >>> TextGenerationConfig(new_tokens=32, samples=4, temperature=0.8).top_p
    1.0
    """

    new_tokens: int = 64
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    chat: bool = False
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.new_tokens, self.samples, self.batch_size) < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise StreamlineError(
                f"TextGenerationConfig: new_tokens={self.new_tokens}, samples={self.samples}, "
                f"batch_size={self.batch_size}, temperature={self.temperature}, top_p={self.top_p}. Expected "
                "new_tokens, samples and batch_size of 1 or more, temperature of 0 or more, and 0 < top_p <= 1. Change "
                "the value that is out of range."
            )
        if self.samples > 1 and not self.temperature:
            raise StreamlineError(
                f"samples={self.samples} with temperature=0 would return the same text {self.samples} times. Expected "
                "a temperature above 0. Set temperature, or samples=1."
            )


@validate_arguments()
def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    config: TextGenerationConfig | None = None,
    *,
    desc: str = "generate",
) -> list[list[GeneratedText]]:
    """Generate continuations of prompts.

    Prompts of similar length are batched with left padding. The model's generation config is ignored. The random state
    of torch is restored.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model with ``generate``.
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer of the model.
    prompts : sequence of str
        The prompts. A prompt without tokens is replaced by the tokenizer's BOS, or its EOS if it has no BOS.
    config : TextGenerationConfig, optional
        Number of tokens and sampling settings. By default greedy decoding of 64 tokens.
    desc : str
        Label of the progress bar.

    Returns
    -------
    list of list of GeneratedText
        By prompt and sample.

    Raises
    ------
    StreamlineError
        If there is no prompt, or the model cannot generate or has too few positions.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model, tiny_tokenizer
    >>> config = TextGenerationConfig(new_tokens=4)
    >>> texts = generate_texts(tiny_model("llama"), tiny_tokenizer(), ["Once", "One day"], config)
    >>> [len(samples) for samples in texts], len(texts[0][0].tokens) <= 4
    ([1, 1], True)
    """
    if not prompts:
        raise StreamlineError("generate_texts: prompts is empty. Expected at least one prompt. Pass a list of str.")
    config = config or TextGenerationConfig()
    new_tokens, samples, stop = config.new_tokens, config.samples, config.stop
    rows = [tokenize_prompt(tokenizer, prompt, config.chat) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda k: -len(rows[k]))
    at_once = min(samples, config.batch_size)
    size = config.batch_size // at_once
    options: dict[str, Any] = {"new_tokens": new_tokens, "stop": stop}
    generated: list[list[GeneratedText]] = [[] for _ in rows]
    with progress_bar(len(rows) * samples * new_tokens, desc) as bar:
        for number, start in enumerate(range(0, len(order), size)):
            batch = order[start : start + size]
            batch_rows = [rows[k] for k in batch]
            with seeded_sampling(device_of(model), config.seed, number):
                for done in range(0, samples, at_once):
                    count = min(at_once, samples - done)
                    sampling = SamplingConfig(count, config.temperature, config.top_p)
                    texts = generate_tokens(
                        model, tokenizer, batch_rows, sampling=sampling, on_step=bar.update, **options
                    )
                    for k, token_lists in zip(batch, texts, strict=True):
                        generated[k] += [
                            _generated_text(tokenizer, prompts[k], tokens, new_tokens, stop) for tokens in token_lists
                        ]
            bar.update((start + len(batch)) * samples * new_tokens - bar.n)  # texts may end early
    return generated


def tokenize_prompt(tokenizer: Any, prompt: str, chat: bool = False) -> list[int]:
    """Return the token ids of a prompt as `generate_texts` uses them, at least one."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise StreamlineError(
            "chat=True, but the tokenizer has no chat template. Expected a tokenizer with a chat template. Set "
            "chat=False."
        )
    if chat:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"]) if prompt else []
    if ids and not chat and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers append EOS
    if not ids:
        ids = [k for k in (tokenizer.bos_token_id, tokenizer.eos_token_id) if k is not None][:1]
    if not ids:
        raise StreamlineError(
            f"The prompt {prompt!r} has no token, and the tokenizer has no BOS or EOS token to begin a text with. "
            "Expected a prompt with at least one token. Change the prompt."
        )
    return ids


def _generated_text(
    tokenizer: Any, prompt: str, tokens: list[int], new_tokens: int, stop: Sequence[str]
) -> GeneratedText:
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    ends = [position for string in stop if (position := text.find(string)) >= 0]
    return GeneratedText(
        prompt, text[: min(ends)] if ends else text, tuple(tokens), bool(ends) or len(tokens) < new_tokens
    )


def sample_prompts(tokenizer: Any, batches: Sequence[Batch | Tensor], *, count: int, length: int) -> list[str]:
    """Return up to `count` prompts of `length` tokens from batches, as texts without special tokens.

    The prompts are the beginnings of evenly spaced rows, which may be padded or packed. If there are fewer rows than
    `count`, non-overlapping later pieces of the documents are used.
    """
    rows = [documents for batch in batches for documents in documents_of(batch)]
    pieces = [row[0][:length] for row in rows]
    if len(pieces) < count:  # with gaps, so that no prompt continues another
        documents = [document for row in rows for document in row]
        pieces = [d[k : k + length] for d in documents for k in range(0, max(1, len(d) - length + 1), 2 * length)]
    texts = [text for piece in pieces if (text := tokenizer.decode(piece, skip_special_tokens=True)).strip()]
    number = min(count, len(texts))
    return [texts[k * len(texts) // number] for k in range(number)]


_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 24, 32
_TIMED_TOKENS, _TIMED_NEW, _ROUNDS = 128, 8, 3


class GenerationComparison:
    """Generate with the original before surgery, and compare generations and speed with the compressed model.

    The prompts are beginnings of `batches`, which must not be used for selection or fitting. If a model cannot
    generate, the reason is logged. With ``write=False`` only speed is compared.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batches: Sequence[Batch | Tensor], *,
        write: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        if write and getattr(tokenizer, "image_processor", None) is not None:
            write = False
            logger.info("No text was generated: prompts from the test part would need their images.")
        self._new = min(_NEW_TOKENS, (max_positions(model.config) or 10**9) // 2)
        length = min(_PROMPT_TOKENS, self._new)
        self._prompts = sample_prompts(tokenizer, batches, count=_PROMPTS, length=length)
        self._before = self._write(model, "original") if write else []

    @property
    def can_generate(self) -> bool:
        """Whether the original generated texts."""
        return bool(self._before)

    def speed(self, model: nn.Module, change: Callable[[LayerSurgeon], None], stack: str) -> SpeedReport | None:
        """Measure the speed with and without a change, which a surgeon applies in each round; None if it fails."""

        @contextmanager
        def changed() -> Iterator[nn.Module]:
            with LayerSurgeon(model, stack, probe=False) as surgeon:
                change(surgeon)
                yield model

        models: dict[str, TimedModel] = {"original": self.model, "compressed": changed}
        tokens = max_prompt_tokens(self.model, _TIMED_NEW, _TIMED_TOKENS)
        try:
            return measure_speed(models, tokens=tokens, new_tokens=_TIMED_NEW, repeats=_ROUNDS)
        except Exception as error:  # any error of the model's generate must not abort the compression
            logger.info(f"No speed was measured: {type(error).__name__}: {error}")
            return None

    def samples(self, model: Any) -> list[tuple[GeneratedText, GeneratedText]]:
        """Return pairs of the texts generated by a model and by the original."""
        after = self._write(model, "compressed") if self._before else []
        return list(zip(after, self._before, strict=True)) if after else []

    def _write(self, model: Any, label: str) -> list[GeneratedText]:
        try:
            texts = generate_texts(
                model, self.tokenizer, self._prompts, TextGenerationConfig(self._new), desc=f"generate: {label}"
            )
        except Exception as error:  # any error of the model's generate must not abort the compression
            logger.info(f"No text was generated: {type(error).__name__}: {error}")
            return []
        return [text for (text,) in texts]
