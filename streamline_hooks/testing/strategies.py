"""Hypothesis strategies for windows, padded batches and model types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from streamline_hooks.core import StreamlineError
from streamline_hooks.testing.tiny_models import causal_model_types

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "streamline_hooks.testing.strategies requires hypothesis, which is not installed. Run pip install "
        "hypothesis. The assertions in streamline_hooks.testing work without it."
    ) from error


def windows(blocks: int, *, min_length: int = 1, max_length: int | None = None) -> SearchStrategy[range]:
    """Draw half-open ranges of consecutive blocks that do not contain all blocks.

    Parameters
    ----------
    blocks : int
        Number of blocks of the model, at least two.
    min_length, max_length : int
        Bounds of the length of a window. Default of `max_length`: ``blocks - 1``.

    Returns
    -------
    SearchStrategy of range
        Shrinks towards short windows at the start of the stack.

    Raises
    ------
    StreamlineError
        If no window satisfies the bounds.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(windows(6), lambda window: 3 in window)
    range(3, 4)
    """
    longest = blocks - 1 if max_length is None else min(max_length, blocks - 1)
    if not 1 <= min_length <= longest:
        raise StreamlineError(
            f"There is no window of {min_length} to {longest} of {blocks} blocks. Expected at least one block inside "
            "and one outside the window. Change min_length, max_length or blocks."
        )

    def of_length(length: int) -> SearchStrategy[range]:
        return st.integers(0, blocks - length).map(lambda start: range(start, start + length))

    return st.integers(min_length, longest).flatmap(of_length)


def padded_batches(
    vocabulary: int,
    *,
    max_rows: int = 3,
    max_tokens: int = 10,
    min_tokens: int = 1,
    sides: Sequence[Literal["left", "right"]] = ("left", "right"),
    special: Iterable[int] = (0, 1, 2),
    pad_token: int = 0,
) -> SearchStrategy[dict[str, torch.Tensor]]:
    """Draw batches of sequences of different lengths, padded on one side to the longest length.

    Parameters
    ----------
    vocabulary : int
        Size of the vocabulary.
    max_rows, max_tokens, min_tokens : int
        Largest number of sequences, and bounds of their lengths in tokens.
    sides : sequence of {"left", "right"}
        Sides on which a batch may be padded.
    special : iterable of int
        Token ids that are not drawn.
    pad_token : int
        Token id of the padding.

    Returns
    -------
    SearchStrategy of dict
        ``input_ids`` and ``attention_mask`` of shape (rows, tokens), int64. Every row has at least one real token.

    Raises
    ------
    StreamlineError
        If all token ids are special, or a size or side is invalid.

    Examples
    --------
    >>> from hypothesis import find
    >>> batch = find(padded_batches(64, sides=["left"]), lambda b: bool((b["attention_mask"] == 0).any()))
    >>> batch["attention_mask"].tolist()
    [[0, 1], [1, 1]]
    """
    ordinary = sorted(set(range(vocabulary)) - set(special))
    wrong_sides = [side for side in sides if side not in ("left", "right")]
    if not ordinary or not 1 <= min_tokens <= max_tokens or max_rows < 1 or wrong_sides or not sides:
        raise StreamlineError(
            f"No batch of 1 to {max_rows} rows of {min_tokens} to {max_tokens} tokens can be drawn from "
            f"{len(ordinary)} ordinary tokens with padding on {list(sides)}: expected at least one of each, and sides "
            "out of 'left' and 'right'."
        )
    row = st.lists(st.sampled_from(ordinary), min_size=min_tokens, max_size=max_tokens)

    def build_batch(drawn: tuple[list[list[int]], str]) -> dict[str, torch.Tensor]:
        rows, side = drawn
        width = max(map(len, rows))
        ids, mask = torch.full((len(rows), width), pad_token), torch.zeros(len(rows), width, dtype=torch.long)
        for number, tokens in enumerate(rows):
            columns = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
            ids[number, columns], mask[number, columns] = torch.tensor(tokens), 1
        return {"input_ids": ids, "attention_mask": mask}

    return st.tuples(st.lists(row, min_size=1, max_size=max_rows), st.sampled_from(list(sides))).map(build_batch)


def model_types(*, among: Iterable[str] | None = None, without: Iterable[str] = ()) -> SearchStrategy[str]:
    """Draw model types that `tiny_model` can build with the installed Transformers.

    Parameters
    ----------
    among : iterable of str, optional
        Types to choose from; types that the installed Transformers does not have are ignored. Default: all causal
        language models.
    without : iterable of str
        Types to exclude.

    Returns
    -------
    SearchStrategy of str

    Raises
    ------
    StreamlineError
        If no type remains.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(model_types(among=["gpt2", "llama"], without=["gpt2"]), lambda name: True)
    'llama'
    """
    known, excluded = causal_model_types(), set(without)
    names = [name for name in (known if among is None else among) if name in known and name not in excluded]
    if not names:
        raise StreamlineError(
            "No model type is left. Expected a type in among that this Transformers has and that is not in without. "
            "causal_model_types() lists the types."
        )
    return st.sampled_from(names)
