from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, ByT5Tokenizer, PreTrainedTokenizerFast

from streamline_hooks.core import StreamlineError
from streamline_hooks.data import read_documents, text_parts

PARTS = {"calibration": 400, "validation": 100, "test": 200}
PADDING, FIRST, LAST, UNKNOWN = range(4)
TYPES = ["input_ids", "token_type_ids", "attention_mask"]


def tokenizer_of(words: int, template: str = "[CLS] $A [SEP]", **options: Any) -> PreTrainedTokenizerFast:
    """Gives the word n the number 4 + n, between special tokens."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *map(str, range(words))]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[CLS]", FIRST), ("[SEP]", LAST)]
    core.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_input_names": TYPES}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**named, **options})


TOKENIZER = tokenizer_of(3_000)


def documents_of(lengths: list[int]) -> list[str]:
    """Documents of which no two share a word."""
    numbers = iter(range(3_000))
    return [" ".join(str(next(numbers)) for _ in range(length)) for length in lengths]


def windows(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    rows = [
        (ids, mask) for batch in batches for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def words(batches: list[dict[str, Tensor]]) -> list[int]:
    return [token - 4 for window in windows(batches) for token in window if token > UNKNOWN]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(4, 20),
    st.tuples(st.integers(20, 200), st.integers(20, 80), st.integers(20, 120)),
    st.integers(1, 7),
    st.integers(0, 3),
)
def test_no_document_is_in_two_parts(
    lengths: list[int], length: int, sizes: tuple[int, int, int], batch_size: int, seed: int
) -> None:
    documents = documents_of(lengths)
    tokens = dict(zip(PARTS, sizes, strict=True))
    options: dict[str, Any] = {"sequence_length": length, "batch_size": batch_size, "seed": seed}
    try:
        parts = text_parts(documents, TOKENIZER, tokens, **options)
    except StreamlineError as error:
        assert "Give more documents" in str(error)
        return
    owner = {int(word): number for number, document in enumerate(documents) for word in document.split()}
    of_part = [{owner[word] for word in words(parts[name])} for name in PARTS]
    assert sum(map(len, of_part)) == len(set.union(*of_part))
    for name, batches in parts.items():
        found = words(batches)
        assert len(found) == len(set(found)) == tokens[name] // (length - 2) * (length - 2)
        for batch in batches:
            assert {value.dtype for value in batch.values()} == {torch.long}
            assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape
            assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1] <= length
            assert (batch["input_ids"][batch["attention_mask"] == 0] == PADDING).all()
            assert (batch["attention_mask"].diff(dim=1) <= 0).all()
        assert all(len(batch["input_ids"]) == batch_size for batch in batches[:-1])
        for window in windows(batches):
            assert (window[0], window[-1]) == (FIRST, LAST)
            assert len({owner[token - 4] for token in window[1:-1]}) == 1
    again = text_parts(documents[::-1] + documents[:3], TOKENIZER, tokens, **options)
    for name in PARTS:
        for one, other in zip(parts[name], again[name], strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_document_is_cut_into_windows() -> None:
    documents = documents_of([25] * 40)
    (batch,) = text_parts(documents, TOKENIZER, {"only": 100}, sequence_length=12, batch_size=99)["only"]
    rows = windows([batch])
    assert [len(row) for row in rows] == [12, 12, 7] * 4
    for start in range(0, 12, 3):
        inside = [token for row in rows[start : start + 3] for token in row[1:-1]]
        assert inside == list(range(inside[0], inside[0] + 25))


def test_a_planted_copy_is_used_once() -> None:
    shared = " ".join(str(2_000 + n) for n in range(40))  # a paragraph of more than 80 characters
    documents = [f"{document}\n\n{shared}" for document in documents_of([10] * 80)]
    for seed in range(5):
        parts = text_parts(documents, TOKENIZER, {"calibration": 300, "test": 300}, sequence_length=20, seed=seed)
        holding = [name for name, batches in parts.items() if 2_000 in words(batches)]
        assert holding == ["test"]


def test_more_for_calibration_does_not_change_the_test() -> None:
    documents = documents_of([20] * 100)
    few = text_parts(documents, TOKENIZER, PARTS, sequence_length=16)
    more = text_parts(documents, TOKENIZER, {**PARTS, "calibration": 800}, sequence_length=16)
    for name in ("validation", "test"):
        assert windows(few[name]) == windows(more[name])
    assert (
        len(
            {
                tuple(words(text_parts(documents, TOKENIZER, {"a": 60}, seed=s, sequence_length=16)["a"]))
                for s in range(5)
            }
        )
        == 5
    )


def test_types_are_given_only_where_the_tokenizer_gives_them() -> None:
    documents = documents_of([20] * 40)
    plain = tokenizer_of(3_000, model_input_names=["input_ids", "attention_mask"])
    (batch, *_) = text_parts(documents, plain, {"a": 40}, sequence_length=16)["a"]
    assert set(batch) == {"input_ids", "attention_mask"}
    typed = tokenizer_of(3_000, template="[CLS]:3 $A:1 [SEP]:2")
    (batch, *_) = text_parts(documents, typed, {"a": 40}, sequence_length=16)["a"]
    for window, types, mask in zip(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        expected = [3, *[1] * (length - 2), 2, *[typed.pad_token_type_id] * (len(window) - length)]
        assert types.tolist() == expected


@pytest.mark.parametrize("template", ["$A", "$A [SEP]", "[CLS] $A", "[CLS] [CLS] $A [SEP] [SEP]"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_whatever_special_tokens_there_are(template: str, side: str) -> None:
    tokenizer = tokenizer_of(3_000, template=template, padding_side=side)
    parts = text_parts(documents_of([7, 5] * 40), tokenizer, {"a": 100}, sequence_length=13)
    for window in windows(parts["a"]):
        text = " ".join(str(token - 4) for token in window if token > UNKNOWN)
        assert window == tokenizer(text)["input_ids"]
    assert all((batch["attention_mask"].diff(dim=1) <= 0).all() for batch in parts["a"])


def test_a_tokenizer_in_python() -> None:
    tokenizer = ByT5Tokenizer()
    texts = [f"This is the text {number}." for number in range(60)]
    parts = text_parts(texts, tokenizer, {"calibration": 300, "test": 100}, sequence_length=26)
    whole = [window for batches in parts.values() for window in windows(batches)]
    assert sum(window in [list(tokenizer(text)["input_ids"]) for text in texts] for window in whole) > 0.8 * len(whole)
    assert set(parts["test"][0]) == {"input_ids", "attention_mask"}


def test_a_model_takes_them() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    documents = [" ".join(str((n * k) % 60) for k in range(20)) for n in range(60)]
    model = BertForMaskedLM(config).eval()
    for batch in text_parts(documents, tokenizer_of(60), {"a": 100}, sequence_length=16)["a"]:
        assert model(**batch).logits.shape == (*batch["input_ids"].shape, 64)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_window_has_a_place_to_fill_in(batch_size: int) -> None:
    """Even one of unknown words alone, or of a special token that a text spells out; others have none of these."""
    documents = documents_of([3] * 30) + [f"x{k} y{k} z{k}" for k in range(30)] + ["[SEP] [SEP]"]
    tokenizer = tokenizer_of(3_000, mask_token="2999", cls_token="[CLS]", sep_token="[SEP]")
    parts = text_parts(documents, tokenizer, {"calibration": 150}, sequence_length=6, batch_size=batch_size, masked=0.3)
    unknown = 0
    for batch in parts["calibration"]:
        labels, mask = batch["labels"], batch["input_ids"] == 2999 + 4
        assert bool((labels != -100).any(dim=1).all())
        assert torch.equal(mask, labels != -100) and not labels[:, 0].eq(FIRST).any()
        whole = labels.where(mask, batch["input_ids"])
        for row, (ids, told) in enumerate(zip(whole.tolist(), labels.tolist(), strict=True)):
            inside = ids[1 : int(batch["attention_mask"][row].sum()) - 1]
            assert told[len(inside) + 1] == -100, "the last token is no text"
            unknown += UNKNOWN in told
            assert UNKNOWN not in told or set(inside) == {UNKNOWN}
    assert unknown > 5


def test_real_text(stories: tuple[Any, Any]) -> None:
    tokenizer = copy.deepcopy(stories[1])
    tokenizer.pad_token = tokenizer.eos_token
    parts = text_parts(read_documents("pydoc"), tokenizer, {"calibration": 8_192, "test": 2_048}, sequence_length=128)
    special = tokenizer("a", verbose=False)["input_ids"]
    for window in [window for batches in parts.values() for window in windows(batches)]:
        assert 1 < len(window) <= 128
        assert (window[0] == tokenizer.bos_token_id) == (special[0] == tokenizer.bos_token_id)
    text = {name: {tuple(window) for window in windows(batches)} for name, batches in parts.items()}
    assert text["calibration"].isdisjoint(text["test"])


@pytest.mark.parametrize(
    ("documents", "tokens", "options", "message"),
    [
        (["1"], {}, {}, r"No part.*Expected.*for each part"),
        (["1"], {"a": 0}, {}, r"0 tokens.*'a'"),
        (["1"], {"a": 99}, {"batch_size": 0}, "batch_size=0 .*Expected"),
        ([], {"a": 99}, {}, r"No text.*Expected.*read_documents"),
        (
            ["1"],
            {"a": 13},
            {"sequence_length": 16},
            r"13 tokens.*'a'.*sequence_length=16.*2 are",
        ),
        (["1"], {"a": 99}, {"sequence_length": 2}, r"Expected at least one text token.*Request 1 tokens"),
        (
            documents_of([5] * 10),
            {"a": 99},
            {"sequence_length": 12},
            r"a 99.*\d+ tokens in 10 documents.*at most 10",
        ),
        (documents_of([2_000]), {"a": 99}, {}, r"1 documents.*Give more documents"),
    ],
)
def test_errors(documents: list[str], tokens: dict[str, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        text_parts(documents, TOKENIZER, tokens, **{"sequence_length": 16, **options})


def test_tokenizers_that_are_refused() -> None:
    documents = documents_of([20] * 40)
    with pytest.raises(StreamlineError, match=r"sequence_length=32.*16 tokens"):
        text_parts(documents, tokenizer_of(99, model_max_length=16), PARTS, sequence_length=32)
    with pytest.raises(StreamlineError, match=r"pad_token ="):
        text_parts(documents, tokenizer_of(99, pad_token=None), PARTS, sequence_length=32)

    class Strange:
        pad_token_id = 0

        def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, 7, 2] if add_special_tokens else [5, 6]}

    with pytest.raises(StreamlineError, match=r"\[5.*6\].*\[1.*7.*2\]"):
        text_parts(documents, Strange(), PARTS, sequence_length=32)  # type: ignore[arg-type]
