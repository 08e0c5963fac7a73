"""Let a model write from prompts: what it wrote, how long it is, and how much it repeats itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from streamline_hooks.arguments import checked
from streamline_hooks.batch import device_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.generation import seeded, written_on
from streamline_hooks.passes import progress

_RUN = 4  # tokens


@dataclass(frozen=True)
class Written:
    """A generated text.

    Attributes
    ----------
    prompt, text : str
    tokens : tuple of int
        The new ones.
    ended : bool
        Whether it ended before the limit of new tokens.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    ended: bool

    @property
    def repetition(self) -> float:
        """Share of the runs of four tokens that occurred before in the text; NaN for a text without one.

        seq-rep-4 of Welleck et al., arXiv 1908.04319.

        Examples
        --------
        >>> round(Written("", "", (1, 2, 3, 4, 1, 2, 3, 4), ended=True).repetition, 3)
        0.2
        """
        runs = [self.tokens[k : k + _RUN] for k in range(len(self.tokens) - _RUN + 1)]
        return 1.0 - len(set(runs)) / len(runs) if runs else math.nan


@dataclass(frozen=True)
class WritingScores:
    """Statistics of at least one generated text."""

    texts: tuple[Written, ...]

    @property
    def repetition(self) -> float:
        """Mean share of repeated runs of four tokens, of the texts that have such runs; NaN where none has."""
        found = [text.repetition for text in self.texts if not math.isnan(text.repetition)]
        return statistics.fmean(found) if found else math.nan

    @property
    def length(self) -> float:
        """Mean length in tokens."""
        return statistics.fmean(len(text.tokens) for text in self.texts)

    @property
    def ended(self) -> float:
        """Share of the texts that came to an end."""
        return statistics.fmean(text.ended for text in self.texts)

    def __str__(self) -> str:
        return (
            f"{len(self.texts)} texts of {self.length:.0f} tokens, {self.ended:.0%} of them ended; "
            f"{self.repetition:.1%} of the runs of {_RUN} tokens are repeated"
        )


@dataclass(frozen=True)
class Matched:
    """Agreement of the greedy generations of two models.

    Attributes
    ----------
    lengths : tuple of int
        Length of the common prefix in tokens, by prompt.
    same : tuple of bool
        Whether the texts are the same, the end included.

    Examples
    --------
    >>> mine = Written("", "", (5, 6, 7), ended=False)
    >>> theirs = Written("", "", (5, 6, 8), ended=False)
    >>> print(Matched.of([mine, mine], [theirs, mine]))
    2.5 tokens until the first that differs, 50% of 2 texts the same
    """

    lengths: tuple[int, ...]
    same: tuple[bool, ...]

    @classmethod
    def of(cls, texts: Sequence[Written], reference: Sequence[Written]) -> Matched:
        """Compare what was generated from the same prompts, in the same order.

        Raises
        ------
        StreamlineError
            If the prompts differ, or there are none.
        """
        if not texts or [text.prompt for text in texts] != [text.prompt for text in reference]:
            raise StreamlineError(
                f"Got {len(texts)} texts and {len(reference)} of the original. Expected both of the same prompts in "
                "one order. Generate them again."
            )
        pairs = list(zip(texts, reference, strict=True))
        return cls(
            tuple(
                sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a.tokens, b.tokens, strict=False)))
                for a, b in pairs
            ),
            tuple(a.tokens == b.tokens and a.ended == b.ended for a, b in pairs),
        )

    @property
    def length(self) -> float:
        """Mean length of the common prefix in tokens."""
        return statistics.fmean(self.lengths)

    @property
    def share(self) -> float:
        """Share of the texts that are the same."""
        return statistics.fmean(self.same)

    def __str__(self) -> str:
        count = len(self.same)
        return f"{self.length:.1f} tokens until the first that differs, {self.share:.0%} of {count} texts the same"


@checked()
def write_on(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int = 64,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    chat: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    what: str = "write",
) -> list[list[Written]]:
    """Let a model write on from each prompt.

    Prompts of about the same length are run together, padded on the left. At temperature 0 the likeliest token is taken
    each time, by the model's own logits: its generation configuration plays no part.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    prompts : sequence of str
        One that has no token begins with the tokenizer's BOS, or EOS where there is none.
    new_tokens : int
        At most so many more.
    samples : int
        Texts a prompt; more than one asks for a temperature above 0.
    temperature, top_p : float
        Of the sampling.
    stop : sequence of str
        A text ends before the first of these.
    chat : bool
        Put each prompt through the chat template.
    batch_size : int
        Texts at a time. What is sampled depends on it.
    seed : int
        Of the sampling. The random state of torch is as before afterwards.
    what : str
        What the bar says.

    Returns
    -------
    list of list of Written
        For each prompt, for each sample.

    Raises
    ------
    StreamlineError
        If a setting is out of range, the model cannot write, or has too few positions.
    """
    if not prompts:
        raise StreamlineError("There is no prompt; give one at least.")
    require_writable(new_tokens, samples, temperature, top_p, batch_size)
    rows = [prompt_tokens(tokenizer, prompt, chat) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda k: -len(rows[k]))
    sampling = {"temperature": temperature, "top_p": top_p} if temperature else None
    found: list[list[Written]] = [[] for _ in rows]
    at_once = min(samples, batch_size)
    size = batch_size // at_once
    with progress(len(rows) * samples * new_tokens, what) as bar:
        for number, start in enumerate(range(0, len(order), size)):
            batch = order[start : start + size]
            with seeded(device_of(model), seed, number):
                for done in range(0, samples, at_once):
                    texts = written_on(
                        model,
                        tokenizer,
                        [rows[k] for k in batch],
                        new_tokens=new_tokens,
                        samples=min(at_once, samples - done),
                        sampling=sampling,
                        stop=stop,
                        told=bar.update,
                    )
                    for k, several in zip(batch, texts, strict=True):
                        found[k] += [_written(tokenizer, prompts[k], tokens, new_tokens, stop) for tokens in several]
            bar.update((start + len(batch)) * samples * new_tokens - bar.n)  # some texts came to an end before
    return found


def require_writable(
    new_tokens: int, samples: int = 1, temperature: float = 0.0, top_p: float = 1.0, batch_size: int = 1
) -> None:
    """Raise if a setting of `write_on` is out of range."""
    if min(new_tokens, samples, batch_size) < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise StreamlineError(
            f"Got new_tokens={new_tokens}, samples={samples}, batch_size={batch_size}, temperature={temperature}, "
            f"top_p={top_p}; expected the first three 1 or more, a temperature of 0 or more, and 0 < top_p <= 1."
        )
    if samples > 1 and not temperature:
        raise StreamlineError(f"{samples} samples at temperature 0 are one text {samples} times; give a temperature.")


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool = False) -> list[int]:
    """Return the tokens of a prompt, as `write_on` passes them to a model: at least one."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise StreamlineError("The tokenizer has no chat template; give the prompts as they are (chat=False).")
    if chat:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"]) if prompt else []
    if ids and not chat and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end each text, which is to be written on
    if not ids:
        ids = [k for k in (tokenizer.bos_token_id, tokenizer.eos_token_id) if k is not None][:1]
    if not ids:
        raise StreamlineError(f"The prompt {prompt!r} has no token, and the tokenizer none to begin a text with.")
    return ids


def _written(tokenizer: Any, prompt: str, tokens: list[int], new_tokens: int, stop: Sequence[str]) -> Written:
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    ends = [place for one in stop if (place := text.find(one)) >= 0]
    return Written(prompt, text[: min(ends)] if ends else text, tuple(tokens), bool(ends) or len(tokens) < new_tokens)
