"""Beginnings of a text in batches: none of padding, of several documents, and enough of them where rows are few."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamline_hooks.evaluation.samples import sample_prompts


class Numbers:
    """A tokenizer whose tokens are numbers, 0 a special one."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(int(i)) for i in ids if int(i))


def numbers(*starts: int, count: int) -> torch.Tensor:
    return torch.stack([torch.arange(start, start + count) for start in starts])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_beginning(side: str) -> None:
    ids = numbers(1, 101, count=6)
    padding = torch.zeros(2, 9, dtype=torch.long)
    parts = [padding, ids] if side == "left" else [ids, padding]
    batch = {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat([p > 0 for p in parts], 1).long()}
    empty = {name: torch.zeros_like(value) for name, value in batch.items()}
    assert sample_prompts(Numbers(), [empty, batch], count=2, length=3) == ["1 2 3", "101 102 103"]


def test_rows_are_spread_and_packed_ones_begin_with_their_first_document() -> None:
    rows = [numbers(1, 101, count=8), numbers(201, 301, count=8)]
    assert sample_prompts(Numbers(), rows, count=2, length=2) == ["1 2", "201 202"]
    packed = {"input_ids": rows[0], "position_ids": torch.tensor([[0, 1, *range(6)], [*range(7), 0]])}
    assert sample_prompts(Numbers(), [packed], count=2, length=3) == ["1 2", "101 102 103"]


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [
        (torch.tensor([[0, 1, *range(6)]]), ["1 2", "101 102"]),  # of both rows
        (torch.arange(8).expand(3, 2, 8), ["1 2 3", "101 102 103"]),  # several axes, as of images, are not looked at
    ],
)
def test_positions_may_be_those_of_all_rows_or_have_axes(positions: torch.Tensor, wanted: list[str]) -> None:
    batch = {"input_ids": numbers(1, 101, count=8), "position_ids": positions}
    assert sample_prompts(Numbers(), [batch], count=2, length=3) == wanted


def test_of_few_rows_there_are_later_pieces_that_do_not_overlap() -> None:
    found = sample_prompts(Numbers(), [numbers(1, 101, count=13)], count=5, length=2)
    assert found == ["1 2", "5 6", "9 10", "101 102", "105 106"]
    assert len(sample_prompts(Numbers(), [numbers(1, count=13)], count=50, length=2)) == 3
    packed = {"input_ids": numbers(1, count=8), "position_ids": torch.tensor([[0, 1, *range(6)]])}
    assert sample_prompts(Numbers(), [packed], count=3, length=2) == ["1 2", "3 4", "7 8"]


def test_what_is_special_alone_is_none() -> None:
    rows = torch.tensor([[0, 0, 0], [7, 8, 9]])
    assert sample_prompts(Numbers(), [rows], count=2, length=2) == ["7 8"]
    assert sample_prompts(Numbers(), [rows[:1]], count=2, length=2) == []
