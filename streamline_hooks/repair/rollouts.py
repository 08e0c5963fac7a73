"""What a model writes on from a batch of text, for it to be trained on; cut where it runs in a circle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from streamline_hooks.batch import Batch, device_of, has_tokens, positions_of
from streamline_hooks.calibration.packing import documents_of
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.generation import require_generates, seeded, written_on
from streamline_hooks.repair.on_policy import OnPolicyConfig
from streamline_hooks.task import Task
from streamline_hooks.wrapping import is_sharded

_LONGEST_PERIOD = 32  # tokens
_LEAST_LOOP = 8  # tokens: what is shorter, like a row of full stops, may be meant
_ROUNDS = 3  # the third time the same is written, it is a loop


@dataclass(frozen=True)
class Rollouts:
    """Texts that a model wrote.

    Attributes
    ----------
    batch : dict of str to torch.Tensor
        Prompts and what was written, ``input_ids`` and ``attention_mask`` of shape (texts, tokens), padded on the
        right.
    answered : torch.Tensor
        The places at which the model is compared, boolean, of the same shape: from a prompt's last token to the last of
        what was written, where it ended its text or would have gone on.
    counts : Counts
    """

    batch: dict[str, Tensor]
    answered: Tensor
    counts: Counts


@dataclass(frozen=True)
class Counts:
    """What was written.

    Attributes
    ----------
    texts, whole : int
        All, and those that were not cut.
    written : int
        New tokens.
    answers : int
        Places to be compared.
    """

    texts: int = 0
    whole: int = 0
    written: int = 0
    answers: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def roll_out(
    model: Any,
    batch: Batch | Tensor,
    *,
    prompt: int,
    new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: object = 0,
    share: float = 1.0,
) -> Rollouts:
    """Let a model write on from prompts of a batch, all at the same time and with its cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    batch : mapping or torch.Tensor
        Text, whose sequences may be padded on either side, or packed.
    prompt : int
        Tokens of a prompt, at most.
    new_tokens : int
        Of a text, at most.
    temperature, top_p : float
        Of the sampling.
    seed : object
        What is sampled follows from it and `share`; torch's own generators are left as they were.
    share : float
        Of the prompts, how many are written on at the same time, where memory does not suffice for all.

    Returns
    -------
    Rollouts
        Without a text where the batch is padding alone.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> found = roll_out(tiny_model("llama"), torch.arange(3, 27)[None], prompt=4, new_tokens=8)
    >>> found.batch["input_ids"][:, :4].tolist()
    [[3, 4, 5, 6], [15, 16, 17, 18]]
    """
    prompts = prompts_of(batch, prompt, new_tokens)
    sampling = {"temperature": temperature, "top_p": top_p}
    size = max(1, ceil(len(prompts) * share))
    written: list[list[int]] = []
    with seeded(device_of(model), "rollouts", seed):
        for start in range(0, len(prompts), size):
            few = prompts[start : start + size]
            written += [text for (text,) in written_on(model, None, few, new_tokens=new_tokens, sampling=sampling)]
    cut = [without_loop(text) for text in written]
    whole = sum(len(a) == len(b) for a, b in zip(cut, written, strict=True))
    width = max((len(a) + len(b) for a, b in zip(prompts, cut, strict=True)), default=0)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask, answered = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for row, (given, text) in enumerate(zip(prompts, cut, strict=True)):
        end = len(given) + len(text)
        ids[row, :end] = torch.tensor([*given, *text])
        mask[row, :end] = 1
        answered[row, len(given) - 1 : end] = True
    counts = Counts(len(cut), whole, sum(map(len, cut)), int(answered.sum()))
    return Rollouts({"input_ids": ids, "attention_mask": mask}, answered, counts)


def require_writes(model: Any, task: Task, settings: OnPolicyConfig, batches: Sequence[Batch | Tensor]) -> None:
    """Raise if a model cannot be trained on what it writes.

    Raises
    ------
    StreamlineError
        If it is not one that writes on, is sharded, has too few positions, or there is no text, or not text alone.
    """
    if task.name != "causal-lm":
        raise StreamlineError(
            f"{type(model).__name__} is for {task}, and a model is trained on its own text where it writes on "
            "(causal-lm). Leave on_policy out."
        )
    require_generates(model)
    if is_sharded(model):
        raise UnsupportedSurgery(
            f"{type(model).__name__} is sharded by fully_shard: its processes would have to write in step. Leave "
            "on_policy out, or shard nothing.",
            "sharded",
        )
    if not all(map(has_tokens, batches)):
        raise StreamlineError("A batch holds no input_ids, so that there is nothing to write on; leave on_policy out.")
    besides = sorted({name for batch in batches if isinstance(batch, Mapping) for name in _besides_text(batch)})
    if besides:
        raise StreamlineError(
            f"A batch holds {', '.join(besides)} beside its tokens, and a text would be written on from the tokens "
            "alone. Leave on_policy out, or give batches of text."
        )
    positions, needed = positions_of(model.config), settings.prompt + settings.longest
    if positions is not None and needed > positions:
        raise StreamlineError(
            f"A prompt of {settings.prompt} tokens and a text of {settings.longest} need {needed} positions; "
            f"{type(model).__name__} has {positions}. Ask for shorter ones (prompt, longest)."
        )


def _besides_text(batch: Mapping[str, Any]) -> list[str]:
    """What a model is given that is neither a token nor about one: images, sounds, embeddings."""
    return [
        name
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name != "attention_mask"
    ]


def prompts_of(batch: Batch | Tensor, prompt: int, new_tokens: int) -> list[list[int]]:
    """The beginnings of as many stretches of a prompt and a text as each document of a batch holds, one at least.

    Examples
    --------
    >>> prompts_of({"input_ids": torch.arange(7)[None], "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])}, 1, 1)
    [[2], [4]]
    """
    found = []
    for document in (document for row in documents_of(batch) for document in row):
        count = max(1, len(document) // (prompt + new_tokens))
        places = [k * (prompt + new_tokens) for k in range(count)]
        found += [document[place : place + prompt].tolist() for place in places]
    return found


def without_loop(tokens: Sequence[int]) -> list[int]:
    """A text up to where it says the same for the third time, one time after the other.

    What is said twice stays: at its first token the model went astray, which is the place to learn from.

    Parameters
    ----------
    tokens : sequence of int

    Examples
    --------
    >>> without_loop([9, 8, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4])
    [9, 8, 1, 2, 3, 4, 1, 2, 3, 4]
    >>> without_loop([5, 5, 5, 6])
    [5, 5, 5, 6]
    """
    ends = [end for period in range(1, _LONGEST_PERIOD + 1) if (end := _loop(tokens, period)) is not None]
    return list(tokens[: min(ends, default=len(tokens))])


def _loop(tokens: Sequence[int], period: int) -> int | None:
    """Where the third round of a loop of a period begins, if there is one."""
    least = max(_ROUNDS * period, _LEAST_LOOP)
    alike = 0
    for k in range(period, len(tokens)):
        alike = alike + 1 if tokens[k] == tokens[k - period] else 0
        if alike + period >= least:
            return k + 1 - least + (_ROUNDS - 1) * period
    return None
