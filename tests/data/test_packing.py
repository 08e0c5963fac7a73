from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, combinations, count, islice
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import profile
from streamline_hooks.core import IGNORE_INDEX, StreamlineError
from streamline_hooks.data import document_starts, pack, packed_batches
from streamline_hooks.data.packing import Packer, fill_sequence
from streamline_hooks.distillation import DistillationConfig, Student, train
from streamline_hooks.evaluation import negative_log_likelihoods, perplexity
from streamline_hooks.repair import LinearConfig, fit_windows
from streamline_hooks.statistics import measure_moments
from tests.tiny_models import VOCABULARY, tiny_model

LENGTHS = st.lists(st.integers(0, 40), max_size=30)
RESPECTFUL = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma3")  # with Transformers 5; see test_boundaries


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths, of which no two tokens are the same."""
    numbers = count()
    return [list(islice(numbers, length)) for length in lengths]


@given(LENGTHS, st.integers(1, 17), st.integers(1, 9))
def test_every_token_is_in_one_row_and_none_is_invented(lengths: list[int], row_length: int, buffer: int) -> None:
    documents = numbered(lengths)
    rows = list(pack(documents, row_length, buffer=buffer))
    sizes = [sum(map(len, row)) for row in rows]
    assert all(size == row_length for size in sizes[:-1])
    assert not rows or 0 < sizes[-1] <= row_length
    pieces = sorted(list(piece) for row in rows for piece in row)
    assert [token for piece in pieces for token in piece] == list(range(sum(lengths)))
    assert all(piece == list(range(piece[0], piece[-1] + 1)) for piece in pieces)
    owner = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert all(owner[piece[0]] == owner[piece[-1]] for piece in pieces), "a piece of two documents"


@given(LENGTHS, st.integers(1, 17), st.integers(1, 9))
def test_cuts_are_counted_and_few(lengths: list[int], row_length: int, buffer: int) -> None:
    packer = Packer(row_length, buffer)
    rows = [row for document in numbered(lengths) for row in packer.add(document)] + packer.rest()
    assert packer.cuts == sum(map(len, rows)) - sum(map(bool, lengths))
    assert packer.cuts <= len(rows) + sum(math.ceil(n / row_length) - 1 for n in lengths if n)
    assert packer.waiting == 0


def test_fewer_are_cut_than_by_joining_them() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 200, (2000,), generator=generator).tolist()
    cuts = {}
    for buffer in (1, 16, 256):
        packer = Packer(512, buffer)
        full = [row for document in numbered(lengths) for row in packer.add(document)]
        assert all(sum(map(len, row)) == 512 for row in full)
        packer.rest()
        cuts[buffer] = packer.cuts
    joined = sum(lengths) // 512
    assert 0.9 * joined < cuts[1] <= joined
    assert cuts[16] < 0.2 * joined and cuts[256] < 0.02 * joined


@given(st.lists(st.integers(1, 12), max_size=8), st.integers(0, 30))
def test_the_best_filling_is_found(lengths: list[int], gap: int) -> None:
    subsets = chain.from_iterable(combinations(range(len(lengths)), size) for size in range(len(lengths) + 1))
    sums = [sum(lengths[i] for i in subset) for subset in subsets]
    chosen = fill_sequence(lengths, gap)
    filled = sum(lengths[i] for i in chosen)
    assert filled == max(total for total in sums if total <= gap)
    assert all(length > gap - filled for i, length in enumerate(lengths) if i not in chosen)


def test_a_document_is_not_passed_over_for_long() -> None:
    documents = [[-1], *([1] * 10 for _ in range(100))]  # the first fits in best nowhere
    rows = list(islice(pack(documents, 20, buffer=8), 1))
    assert any(-1 in piece for piece in rows[0])


def test_documents_are_read_no_further_than_the_buffer_reaches() -> None:
    read = []

    def documents() -> Iterator[list[int]]:
        for n in range(10**9):
            read.append(n)
            yield [n] * 5

    rows = pack(documents(), 10, buffer=4)
    assert read == []
    list(islice(rows, 3))
    assert len(read) <= 3 * 2 + 4


@pytest.mark.parametrize(("length", "buffer", "name"), [(0, 1, "sequence_length=0"), (4, 0, "buffer=0")])
def test_sizes_below_one(length: int, buffer: int, name: str) -> None:
    with pytest.raises(StreamlineError, match=rf"{name}.*1 or"):
        pack([[1]], length, buffer=buffer)


def test_batches() -> None:
    batches = packed_batches(pack([[1, 2, 3, 4, 5], [6], [7, 8], [9], [10, 11, 12, 13]], 4), 2)
    ids = [batch["input_ids"].tolist() for batch in batches]
    positions = [batch["position_ids"].tolist() for batch in batches]
    assert ids == [[[1, 2, 3, 4], [10, 11, 12, 13]], [[5, 6, 7, 8]], [[9]]]
    assert positions == [[[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 0, 0, 1]], [[0]]]
    assert all(value.dtype == torch.long for batch in batches for value in batch.values())
    assert packed_batches([], 2) == []
    with pytest.raises(StreamlineError, match=r"batch_size=0.*1 row"):
        packed_batches([], 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_beginnings_are_where_the_pieces_begin(lengths: list[int]) -> None:
    (batch,) = packed_batches([[range(n) for n in lengths]], 1)  # type: ignore[list-item]
    expected = [place == 0 for n in lengths for place in range(n)]
    assert document_starts(batch["position_ids"])[0].tolist() == expected


def texts(seed: int = 0) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Documents packed, and each alone."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (1, 30, 7, 12, 5, 9, 21, 3, 8, 2, 19, 11)
    rows = list(pack([torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths], 32))
    return packed_batches(rows, 2), [torch.tensor([list(piece)]) for row in rows for piece in row]


def close(one: torch.Tensor, other: torch.Tensor, relative: float) -> bool:
    return bool((one - other).abs().max() <= relative * other.abs().max())


@pytest.mark.parametrize("family", RESPECTFUL)
def test_what_is_measured_is_that_of_the_documents_alone(family: str) -> None:
    model, (packed, alone) = tiny_model(family, torch.float64), texts()
    relative = 1e-7 if family in ("llama", "qwen3", "gemma3") else 1e-9  # whose norms are float32 in any model
    of_rows, of_documents = profile(model, packed), profile(model, alone)
    assert of_rows.tokens == of_documents.tokens == 128
    for statistic in ("cosine", "angular", "norms", "relative_magnitude"):
        assert close(getattr(of_rows, statistic), getattr(of_documents, statistic), relative), statistic
    windows = [range(0, 2), range(1, 5), range(5, 6)]
    for rows, documents in zip(
        measure_moments(model, packed, windows), measure_moments(model, alone, windows), strict=True
    ):
        assert rows.tokens == documents.tokens == 128
        assert close(rows.xx, documents.xx, relative) and close(rows.xd, documents.xd, relative)
        assert rows.dd == pytest.approx(documents.dd, rel=relative)


def test_a_repair_is_fitted_and_judged_on_packed_rows_as_on_documents_alone() -> None:
    model, (packed, alone), (more, more_alone) = tiny_model("llama"), texts(), texts(seed=1)
    errors, divergences = [], []
    for batches, held_out in ((packed, more), (alone, more_alone)):
        (repair,) = fit_windows(model, [range(2, 4)], LinearConfig(), batches, held_out)
        errors.append(repair.repaired_error)
        student = Student(model, [(repair.window, cast(nn.Module, repair.replacement_module))])
        trained = train(student, batches, held_out, DistillationConfig(epochs=1, validations=1))
        divergences.append(trained.distance_before)
        assert trained.distance <= trained.distance_before
        assert errors[-1] < repair.removal_error
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-4)


def test_the_nats_of_packed_rows_are_those_of_the_documents_alone_without_their_first_tokens() -> None:
    model, (packed, alone) = tiny_model("llama"), texts()
    expected, nats, counted = perplexity(model, alone), 0.0, 0
    for batch in packed:
        targets = batch["input_ids"].masked_fill(document_starts(batch["position_ids"]), IGNORE_INDEX)[:, 1:]
        with torch.no_grad():
            nats += sum(negative_log_likelihoods(model(**batch, use_cache=False).logits[:, :-1], targets))
        counted += int((targets != IGNORE_INDEX).sum())
    assert counted == expected.tokens == 128 - len(alone)
    assert nats == pytest.approx(expected.nll, rel=1e-5)
