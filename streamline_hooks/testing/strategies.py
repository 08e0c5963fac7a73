"""Hypothesis strategies for windows, padded batches and model types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from streamline_hooks.errors import StreamlineError
from streamline_hooks.testing.tiny import causal_model_types

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "streamline_hooks.testing.strategies needs hypothesis, which is not installed: pip install hypothesis. The "
        "assertions in streamline_hooks.testing work without it."
    ) from error


def windows(blocks: int, *, min_length: int = 1, max_length: int | None = None) -> SearchStrategy[range]:
    """Half-open ranges of consecutive blocks that leave at least one.

    Parameters
    ----------
    blocks : int
        How many the model has, two at least.
    min_length, max_length : int
        How many are in a window; never more than all but one.

    Returns
    -------
    SearchStrategy of range
        It shrinks towards short windows at the beginning.

    Raises
    ------
    StreamlineError
        If there is no such window.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(windows(6), lambda window: 3 in window)
    range(3, 4)
    """
    longest = blocks - 1 if max_length is None else min(max_length, blocks - 1)
    if not 1 <= min_length <= longest:
        raise StreamlineError(
            f"There is no window of {min_length} to {longest} of {blocks} blocks: expected at least one block in it, "
            "and one outside."
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
    """Batches of sequences of different lengths, padded on one side to the longest.

    Parameters
    ----------
    vocabulary : int
        Number of tokens.
    max_rows, max_tokens, min_tokens : int
        How many sequences at most, and how long each is.
    sides : sequence of {"left", "right"}
        On which side a batch is padded.
    special : iterable of int
        Tokens that are not drawn.
    pad_token : int
        What lies in the padding.

    Returns
    -------
    SearchStrategy of dict
        ``input_ids`` and ``attention_mask`` of shape (rows, tokens), int64. Every row has a real token.

    Raises
    ------
    StreamlineError
        If no ordinary token is left, or a size or a side is none.

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

    def laid_out(drawn: tuple[list[list[int]], str]) -> dict[str, torch.Tensor]:
        rows, side = drawn
        width = max(map(len, rows))
        ids, mask = torch.full((len(rows), width), pad_token), torch.zeros(len(rows), width, dtype=torch.long)
        for number, tokens in enumerate(rows):
            place = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
            ids[number, place], mask[number, place] = torch.tensor(tokens), 1
        return {"input_ids": ids, "attention_mask": mask}

    return st.tuples(st.lists(row, min_size=1, max_size=max_rows), st.sampled_from(list(sides))).map(laid_out)


def model_types(*, among: Iterable[str] | None = None, without: Iterable[str] = ()) -> SearchStrategy[str]:
    """Model types that `streamline_hooks.testing.tiny_model` can build in the installed Transformers.

    Parameters
    ----------
    among : iterable of str, optional
        Only these, as far as this Transformers knows them; all causal language models by default.
    without : iterable of str
        But not these.

    Returns
    -------
    SearchStrategy of str

    Raises
    ------
    StreamlineError
        If none is left.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(model_types(among=["gpt2", "llama"], without=["gpt2"]), lambda name: True)
    'llama'
    """
    left_out: set[Any] = set(without)
    known = causal_model_types()
    wanted = known if among is None else [name for name in among if name in known]
    names = [name for name in wanted if name not in left_out]
    if not names:
        raise StreamlineError(
            "No model type is left: none of those asked for is known to this Transformers and not left out. "
            "causal_model_types() lists what is known."
        )
    return st.sampled_from(names)
