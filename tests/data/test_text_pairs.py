from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from streamline_hooks.core import StreamlineError
from streamline_hooks.data import TextPair, pair_parts, read_pairs

PADDING, END, UNKNOWN, START = range(4)
WORDS = 200
SMALL = {"d_model": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8, "d_ff": 8}
with torch.random.fork_rng():
    MODEL = T5ForConditionalGeneration(T5Config(vocab_size=WORDS + 4, decoder_start_token_id=START, **SMALL)).eval()
BART = {
    "vocab_size": WORDS + 4, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1,
    "decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "pad_token_id": PADDING,
    "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START, "forced_eos_token_id": END,
    "max_position_embeddings": 64,
}  # fmt: skip


def tokenizer_of(**options: Any) -> PreTrainedTokenizerFast:
    """Gives the word n the number 4 + n, and ends each text."""
    names = ["<pad>", "</s>", "<unk>", "<s>", *map(str, range(WORDS))]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    )


TOKENIZER = tokenizer_of()


def rows(batches: list[dict[str, Tensor]], ids: str = "input_ids", mask: str = "attention_mask") -> list[list[int]]:
    return [row[kept.bool()].tolist() for batch in batches for row, kept in zip(batch[ids], batch[mask], strict=True)]


def pairs_of(count: int) -> list[tuple[str, str]]:
    return [(" ".join([str(n)] * (1 + n % 5)), " ".join([str(n)] * (1 + n % 3))) for n in range(count)]


def write(path: Path, objects: list[Any]) -> Path:
    text = "".join(json.dumps(each) + "\n" for each in objects).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


class TestRead:
    @pytest.mark.parametrize("names", [("source", "target"), ("text", "summary"), ("question", "answer")])
    @pytest.mark.parametrize("kind", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
    def test_columns_that_are_looked_for(self, tmp_path: Path, names: tuple[str, str], kind: str) -> None:
        cells = [(" one ", "eins"), ("two", "zwei"), ("", "null"), ("three", " "), ("two", "zwei"), ("two", "deux")]
        objects = [{"id": n, names[1]: other, names[0]: one} for n, (one, other) in enumerate(cells)]
        if kind == "a.parquet":
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist([*objects, {names[0]: None, names[1]: "x"}]), tmp_path / kind)
        else:
            write(tmp_path / kind, objects)
        expected = [TextPair("one", "eins"), TextPair("two", "zwei"), TextPair("two", "deux")]
        assert read_pairs(tmp_path / kind) == read_pairs(str(tmp_path)) == expected

    def test_folders_and_several_sources(self, tmp_path: Path) -> None:
        (tmp_path / "a" / ".hidden").mkdir(parents=True)
        write(tmp_path / "a" / "2.jsonl", [{"source": "two", "target": "zwei"}])
        write(tmp_path / "a" / "1.jsonl", [{"text": "one", "summary": "eins"}])
        write(tmp_path / "a" / ".hidden" / "0.jsonl", [{"source": "x", "target": "y"}])
        (tmp_path / "a" / "notes.txt").write_text("no pair")
        last = write(tmp_path / "3.jsonl", [{"question": "three", "answer": "drei"}])
        assert [pair.target for pair in read_pairs([last, tmp_path / "a"])] == ["drei", "eins", "zwei"]

    def test_named_columns(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", [{"article": "long", "highlights": "short", "source": "x", "target": "y"}])
        assert read_pairs(path, columns=("article", "highlights")) == [("long", "short")]
        message = r"line 1.*\['article'.*Expected `a` and `b`.*Rename"
        with pytest.raises(StreamlineError, match=message):
            read_pairs(path, columns=("a", "b"))

    def test_half_a_character(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"source": "a\\ud800", "target": "b"}\n')
        assert read_pairs(tmp_path / "a.jsonl") == [("a?", "b")]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", r"No pair.*a\.jsonl'.*Expected.*JSONL.*both"),
            (
                '{"source": "a"}',
                r"line 1.*\['source'\].*Expected `source` and `target` or `text` and `sum",
            ),
            (
                '\n{"source": 1, "target": null}',
                r"line 2: `source` is a int.*Expected a string",
            ),
            (
                "[1]",
                r"line 1 is a list.*Expected.*\"source\".*\"target\"",
            ),
            (
                "{",
                r'line 1.*not JSON.*Expected.*\{"source": "\.\.\."',
            ),
        ],
    )
    def test_lines_that_are_refused(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(StreamlineError, match=message):
            read_pairs(tmp_path / "a.jsonl")

    def test_other_errors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(StreamlineError, match=r"'nowhere'.*no such file or folder"):
            read_pairs("nowhere")
        (tmp_path / "a.csv").write_text("a,b")
        with pytest.raises(StreamlineError, match=r"a\.csv'.*'\.csv'.*write a JSONL"):
            read_pairs(tmp_path / "a.csv")
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"source": ["a"], "target": [1]}), tmp_path / "a.parquet")
        with pytest.raises(StreamlineError, match=r"a\.parquet, row 0: `target` is a int.*Expected"):
            read_pairs(tmp_path / "a.parquet")
        pq.write_table(pa.table({"de": ["a"], "en": ["b"]}), tmp_path / "a.parquet")
        with pytest.raises(StreamlineError, match=r"a\.parquet.*\['de'.*'en'\].*Expected `source`"):
            read_pairs(tmp_path / "a.parquet")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(StreamlineError, match=r"`datasets`.*streamline_hooks\[datasets\]"):
            read_pairs(tmp_path / "a.parquet")


texts = st.lists(st.integers(0, 6), min_size=1, max_size=4).map(lambda numbers: " ".join(map(str, numbers)))


class TestParts:
    @given(
        st.lists(st.tuples(texts, texts), min_size=1, max_size=60),
        st.lists(st.integers(1, 12), min_size=1, max_size=3),
        st.integers(2, 5),
        st.integers(0, 3),
        st.randoms(use_true_random=False),
    )
    def test_no_source_is_in_two_parts(
        self, pairs: list[tuple[str, str]], sizes: list[int], length: int, seed: int, rng: Any
    ) -> None:
        counts = dict(zip(("calibration", "validation", "test"), sizes, strict=False))
        options: dict[str, Any] = {"batch_size": 3, "lengths": (length, 128), "seed": seed}
        try:
            parts = pair_parts(pairs, TOKENIZER, counts, MODEL, **options)
        except StreamlineError as error:
            assert "Give more pairs" in str(error)
            if length == 5:  # where nothing is cut
                assert len({source for source, _ in pairs}) < sum(sizes)
            return
        sources = [{tuple(row) for row in rows(parts[name])} for name in counts]
        assert sum(map(len, sources)) == len(set.union(*sources))
        tokens = {
            (
                tuple(TOKENIZER(one, truncation=True, max_length=length)["input_ids"]),
                tuple(TOKENIZER(other)["input_ids"]),
            )
            for one, other in pairs
        }
        for name, batches in parts.items():
            found = list(zip(rows(batches), rows(batches, "labels", "decoder_attention_mask"), strict=True))
            assert len(found) == counts[name]
            assert {(tuple(one), tuple(other)) for one, other in found} <= tokens
        mixed = [*pairs, *pairs[:4]]
        rng.shuffle(mixed)
        again = pair_parts(mixed, TOKENIZER, counts, MODEL, **options)
        for name in counts:
            for one, other in zip(parts[name], again[name], strict=True):
                assert all(torch.equal(one[key], other[key]) for key in one)

    def test_a_paragraph_of_another_part_is_left_out(self) -> None:
        context = " ".join(str(n) for n in range(100, 140))  # more than 80 characters
        pairs = [(f"{n}\n\n{context}", f"{n}") for n in range(10)] + [(f"{n}", context) for n in range(10, 20)]
        pairs += pairs_of(80)[20:]
        for seed in range(5):
            counts = {"calibration": 20, "test": 20}
            parts = pair_parts(pairs, TOKENIZER, counts, MODEL, seed=seed)
            holding = [
                any(104 in row for row in [*rows(each), *rows(each, "labels", "decoder_attention_mask")])
                for each in parts.values()
            ]
            assert sum(holding) <= 1
        with pytest.raises(StreamlineError, match=r"80 different.*\d+ of"):
            pair_parts(pairs, TOKENIZER, {"calibration": 40, "test": 39}, MODEL)

    def test_what_is_in_a_batch(self) -> None:
        pairs = [("1 2 3", "7"), ("4", "8 9")]
        (batch,) = pair_parts(pairs, TOKENIZER, {"only": 2}, MODEL)["only"]
        assert {value.dtype for value in batch.values()} == {torch.long}
        first = int(batch["input_ids"][0, 0] != 5)
        order = [first, 1 - first]
        assert {name: value[order].tolist() for name, value in batch.items()} == {
            "input_ids": [[5, 6, 7, END], [8, END, PADDING, PADDING]],
            "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
            "decoder_input_ids": [[START, 11, END], [START, 12, 13]],
            "decoder_attention_mask": [[1, 1, 0], [1, 1, 1]],
            "labels": [[11, END, -100], [12, 13, END]],
        }

    def test_lengths_and_a_prefix(self) -> None:
        pairs = [(" ".join(map(str, range(n, n + 20))), " ".join(map(str, range(n, n + 20)))) for n in range(40)]
        parts = pair_parts(pairs, tokenizer_of(padding_side="left"), {"a": 30}, MODEL, lengths=(8, 5), prefix="199 ")
        for batch in parts["a"]:
            assert batch["input_ids"].shape == (len(batch["input_ids"]), 8)
            assert batch["labels"].shape[1] == batch["decoder_input_ids"].shape[1] == 5
            assert (batch["input_ids"][:, 0] == 203).all()
            assert (batch["input_ids"][:, -1] == END).all()
            assert (batch["labels"][:, -1] == END).all()

    def test_more_for_calibration_does_not_change_the_test(self) -> None:
        few, more = (pair_parts(pairs_of(90), TOKENIZER, {"a": n, "test": 20}, MODEL) for n in (5, 60))
        assert rows(few["test"]) == rows(more["test"])
        seeds = [rows(pair_parts(pairs_of(90), TOKENIZER, {"a": 9}, MODEL, seed=seed)["a"]) for seed in range(4)]
        assert len({str(each) for each in seeds}) == 4

    def test_a_model_takes_them(self) -> None:
        for batch in pair_parts(pairs_of(40), TOKENIZER, {"a": 20}, MODEL)["a"]:
            output = MODEL(**batch)
            assert output.logits.shape == (*batch["labels"].shape, WORDS + 4)
            by_labels = MODEL(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
            # What is masked stands behind what has a label, so that it makes no difference there.
            assert torch.allclose(output.loss, by_labels.loss, atol=1e-6)


MODELS = {
    "t5": ("T5ForConditionalGeneration", {"vocab_size": WORDS + 4, "decoder_start_token_id": START, **SMALL}),
    "bart": ("BartForConditionalGeneration", BART),
    "mbart": ("MBartForConditionalGeneration", BART),
    "marian": ("MarianMTModel", BART),
    "m2m": ("M2M100ForConditionalGeneration", BART),
    "blenderbot": ("BlenderbotForConditionalGeneration", BART),
    "pegasus": ("PegasusForConditionalGeneration", BART),
}  # fmt: skip


class TestShift:
    @pytest.mark.parametrize("name", MODELS)
    def test_it_is_the_models_own(self, name: str) -> None:
        kind, settings = MODELS[name]
        made = getattr(transformers, kind)
        config = made.config_class(**settings)
        with torch.random.fork_rng():
            model = made(config).eval()
        pairs = pairs_of(30)
        for one in pair_parts(pairs, TOKENIZER, {"a": 12}, model, batch_size=5)["a"]:
            assert (one["labels"][one["decoder_attention_mask"] == 0] == -100).all()
            assert (one["labels"][one["decoder_attention_mask"] == 1] > 0).all()
            assert (one["decoder_input_ids"] >= 0).all()
            real = one["decoder_attention_mask"][:, 1:] == 1
            assert torch.equal(one["decoder_input_ids"][:, 1:][real], one["labels"][:, :-1][real])
            # mBART begins with the last token of the target, the others with one that the configuration names.
            wrapped = name == "mbart"
            assert one["decoder_input_ids"][:, 0].tolist() == [END if wrapped else START] * len(one["labels"])
            with torch.no_grad():
                mine = model(**{key: value for key, value in one.items() if key != "labels"})
                theirs = model(
                    input_ids=one["input_ids"], attention_mask=one["attention_mask"], labels=one["labels"].clone()
                )
            assert torch.allclose(mine.logits[:, 0], theirs.logits[:, 0], atol=1e-5)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (None, r"NoneType.*cannot shift targets.*Expected"),
            (nn.Linear(1, 1), r"Linear cannot shift targets.*decoder_start_token_id.*Set"),
            (
                T5ForConditionalGeneration(T5Config(vocab_size=204, **SMALL)),
                r"T5.*cannot shift.*decoder_start",
            ),
        ],
    )
    def test_models_that_are_refused(self, model: Any, message: str) -> None:
        with pytest.raises(StreamlineError, match=message):
            pair_parts(pairs_of(9), TOKENIZER, {"a": 8}, model)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({}, {}, r"No part.*Expected.*for each part"),
        ({"a": 0}, {}, r"0 pairs.*'a'"),
        ({"a": 1}, {"batch_size": 0}, "batch_size=0"),
        ({"a": 1}, {"lengths": (0, 9)}, r"lengths=\(0, 9\).*Expected"),
        ({"a": 1}, {"lengths": (9, -1)}, r"lengths=\(9, -1\).*Expected"),
        ({"a": 6, "b": 5}, {}, r"a 6, b 5.*10 different.*0 of"),
    ],
)
def test_numbers_that_are_refused(counts: dict[str, int], options: dict[str, int], message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        pair_parts(pairs_of(10), TOKENIZER, counts, MODEL, **options)


def test_a_tokenizer_that_cannot_pad() -> None:
    with pytest.raises(StreamlineError, match=r"tokenizer\.pad_token ="):
        pair_parts(pairs_of(10), tokenizer_of(pad_token=None), {"a": 4}, MODEL)
