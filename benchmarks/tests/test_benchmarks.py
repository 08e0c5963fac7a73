"""The parts of the benchmarks that others lean on: scores of a model, questions, and the training of a small OPT."""

from __future__ import annotations

import copy
import json
import math
import zipfile
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import quality_scores, small_opt
from benchmarks.bigram import Bigram, discount
from benchmarks.multiple_choice import TASKS, blimp, task_of
from benchmarks.quality_scores import Quality, Scores, fingerprint
from benchmarks.real_text import SEQUENCE, heldout
from benchmarks.small_opt import Recipe, Training, compare, new_model, stream_of, train_tokenizer
from benchmarks.training_text import training_text
from streamline_hooks import LayerSurgeon, perplexity
from streamline_hooks.evaluation import agreement

WORDS = ["the", "a", "cat", "dog", "house", "runs", "sleeps", "green", "small", "and", "under", "over", "near"]
TINY = Recipe(width=16, blocks=4, heads=2, vocabulary=320, sequence=32, batch=2, steps=8, warmup=2, rate=1e-2)


@pytest.mark.parametrize("script", sorted(p.stem for p in Path(quality_scores.__file__).parent.glob("[!_]*.py")))
def test_every_script_says_how_it_is_run(script: str) -> None:
    module = import_module(f"benchmarks.{script}")
    if hasattr(module, "main"):
        assert f"python -m benchmarks.{script}" in (module.__doc__ or "")


def sentences(count: int, seed: int) -> str:
    random = Random(seed)
    return " ".join(" ".join(random.choices(WORDS, k=random.randrange(4, 9))) + "." for _ in range(count))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [sentences(12, seed) for seed in range(12)]


@pytest.fixture(scope="module")
def tokenizer(documents: list[str]) -> Any:
    return train_tokenizer(documents, TINY.vocabulary)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as the benchmarks expect it, with two tasks and BLiMP."""
    (tmp_path / "text" / "heldout").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    for k, name in enumerate(("news", "blog")):
        (tmp_path / "text" / "heldout" / f"{name}.txt").write_text(sentences(400, 100 + k))
    random = Random(0)
    asked = [
        {"query": sentences(1, k), "choices": [sentences(1, 1000 + 3 * k + c) for c in range(3)], "gold": k % 3}
        for k in range(30)
    ]
    yes = [{"query": sentences(1, k), "choices": ["no", "yes"], "gold": int(random.random() < 0.7)} for k in range(30)]
    for name, lines in {"copa": asked, "boolq": yes}.items():
        (tmp_path / "bench" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with zipfile.ZipFile(tmp_path / "bench" / "blimp.zip", "w") as archive:
        archive.writestr("__MACOSX/data/._one.jsonl", b"\xb0\x00")
        for name in ("one", "two"):
            pairs = [{"sentence_good": f"good {name} {k}", "sentence_bad": f"bad {name} {k}"} for k in range(50)]
            archive.writestr(f"data/{name}.jsonl", "\n".join(map(json.dumps, pairs)) + "\n")
    return tmp_path


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return new_model(Recipe(width=16, blocks=4, heads=2, vocabulary=TINY.vocabulary, sequence=SEQUENCE)).eval()


def changed(original: nn.Module) -> nn.Module:
    model = copy.deepcopy(original)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        surgeon.commit()
    return model


# Text


def test_held_out_text_starts_where_it_is_told(data: Path, tokenizer: Any) -> None:
    whole, later = heldout(data, tokenizer, 3), heldout(data, tokenizer, 2, first=1)
    for name, batches in whole.items():
        rows = torch.cat([batch["input_ids"] for batch in batches])
        assert torch.equal(rows[1:], torch.cat([batch["input_ids"] for batch in later[name]]))
    with pytest.raises(SystemExit, match=r"blog.txt.*900 on.*0 tokens"):
        heldout(data, tokenizer, 2, first=900)


def test_what_is_scored_is_not_trained_on(data: Path, tokenizer: Any) -> None:
    """A document that quotes a paragraph of the held-out text is left out, whatever else stands in it."""
    quoted = "zz " * 25
    (data / "text" / "heldout" / "quoted.txt").write_text(f"{sentences(3, 0)}\n\n{quoted}\n\n{sentences(3, 1)}")
    (data / "text" / "train").mkdir()
    texts = [sentences(60, 200 + k) for k in range(60)]
    texts[::2] = [f"{text}\n\n {quoted}\n{text}" for text in texts[::2]]
    (data / "text" / "train" / "blog.txt").write_text("\n\n\n".join(texts))
    found = training_text(data, tokenizer, 4 * SEQUENCE)
    said = tokenizer.batch_decode(torch.cat([found.train, found.validation]))
    assert found.train.shape == (4, SEQUENCE) and not any("zz" in text for text in said)
    (data / "text" / "heldout" / "quoted.txt").unlink()
    found = training_text(data, tokenizer, 4 * SEQUENCE)
    assert any("zz" in text for text in tokenizer.batch_decode(found.train))


# Questions


def rows_of(name: str, data: Path, items: int | None, seed: int = 0) -> list[dict[str, Any]]:
    return list(task_of(name, data / "bench", items, seed)["custom_dataset"]()["test"])


def test_subsets_are_seeded_and_asked_as_the_task_says(data: Path) -> None:
    first = rows_of("boolq", data, 10)
    assert first == rows_of("boolq", data, 10) != rows_of("boolq", data, 10, seed=1)
    assert len({row["query"] for row in first}) == 10
    assert task_of("boolq", data / "bench", 10, 0)["doc_to_text"].endswith("\nAnswer:")
    assert len(rows_of("copa", data, 500)) == 30


def test_blimp_takes_as_many_of_each_paradigm(data: Path) -> None:
    pairs = blimp(data / "bench" / "blimp.zip", 20, seed=0)
    assert len(pairs) == 40 == len({pair["sentence_good"] for pair in pairs})
    assert sum("one" in pair["sentence_good"] for pair in pairs) == 20


def test_a_row(data: Path, tokenizer: Any, original: nn.Module) -> None:
    cache = data / "cache.json"
    quality = Quality(original, tokenizer, data, sequences=2, items=20, tasks=("copa", "boolq"), cache=cache)
    model = changed(original)
    row = json.loads(json.dumps(quality.row(model)))
    batches = heldout(data, tokenizer, 2)
    assert list(batches) == ["blog", "news"] and {b["input_ids"].shape for v in batches.values() for b in v} == {
        (2, 512)
    }
    for name, given in batches.items():
        assert row["perplexity"][name] == pytest.approx(perplexity(model, given).value, rel=1e-6)
        ratio = perplexity(model, given).value / perplexity(original, given).value
        assert row["perplexity_ratio"][name] == pytest.approx(ratio, rel=1e-6)
        assert row["kl_by_domain"][name] == pytest.approx(agreement(model, original, given).kl, rel=1e-6)
    whole = agreement(model, original, [b for given in batches.values() for b in given])
    assert (row["kl"], row["top1"], row["tokens"]) == (pytest.approx(whole.kl), whole.top1, whole.tokens)
    assert row["mean_perplexity_ratio"] == pytest.approx(np.mean(list(row["perplexity_ratio"].values())))
    assert row["accuracy"]["boolq"] == row["right"]["boolq"].count("1") / 20
    itself = quality.row(copy.deepcopy(original))
    assert itself["kl"] == 0.0 and itself["mean_perplexity_ratio"] == pytest.approx(1.0)
    assert itself["right"] == quality.scores.right


def test_what_is_retained(data: Path, tokenizer: Any, original: nn.Module) -> None:
    """Only of what the original clearly has; against a computation by hand."""
    quality = Quality(original, tokenizer, data, sequences=1, items=20, tasks=(), cache=data / "cache.json")
    quality.chance = {"a": 0.25, "b": 0.5, "c": 0.5}
    quality.scores = Scores({}, {"a": "1" * 60 + "0" * 40, "b": "1" * 70 + "0" * 30, "c": "1" * 59 + "0" * 41})
    assert quality.counted == ["a", "b"]  # c is 0.09 above chance, and two standard errors are 0.099
    mine = Scores({}, {"a": "1" * 50 + "0" * 50, "b": "0" * 45 + "1" * 55, "c": "1" * 100})
    got = quality.retained_scores(mine)
    assert got["retained"] == {"a": pytest.approx(0.25 / 0.35), "b": pytest.approx(0.05 / 0.2)}
    assert got["mean_retained"] == pytest.approx((0.25 / 0.35 + 0.05 / 0.2) / 2)
    random = np.random.default_rng(0)
    arrays = {
        t: np.array([list(map(int, s.right[t])) for s in (mine, quality.scores)]) for t in ("a", "b")
    }  # bootstrap over the questions of each task
    drawn = []
    for _ in range(4000):
        parts = []
        for t, both in arrays.items():
            x, x0 = both[:, random.integers(0, 100, 100)].mean(1)
            parts.append((x - quality.chance[t]) / (x0 - quality.chance[t]))
        drawn.append(np.mean(parts))
    assert got["mean_retained_standard_error"] == pytest.approx(np.std(drawn), rel=0.25)


def test_the_original_is_scored_once(data: Path, tokenizer: Any, original: nn.Module, monkeypatch: Any) -> None:
    cache, calls = data / "cache.json", []
    monkeypatch.setattr(quality_scores, "perplexity", counted(quality_scores.perplexity, calls))

    def made(model: nn.Module, **options: Any) -> Quality:
        return Quality(model, tokenizer, data, **{"sequences": 1, "tasks": ("copa",), "cache": cache, **options})

    scores = made(original).scores
    assert len(calls) == 2
    assert made(original).scores == scores and len(calls) == 2
    made(original, items=7)
    made(original, seed=1, items=7)
    made(original, sequences=2)
    made(changed(original))  # another model under the same name
    assert len(calls) == 10 and len(json.loads(cache.read_text())) == 5
    with (data / "text" / "heldout" / "news.txt").open("r+") as file:
        file.write("Another text")
    made(original)
    assert len(calls) == 12


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return function(*args, **options)

    return run


def test_a_fingerprint_sees_each_value(original: nn.Module) -> None:
    state = {k: v.clone() for k, v in original.state_dict().items()}
    before = fingerprint(state)
    next(reversed(state.values())).view(-1)[-1] += 1.0
    assert fingerprint(state) != before == fingerprint(original.state_dict())
    assert fingerprint({"x": torch.zeros(2, dtype=torch.bfloat16)}) != fingerprint({"x": torch.zeros(2)})


def test_every_task_is_there(data_folder: Path) -> None:
    """On the real files; BLiMP 20 of each of its 67 paradigms, whatever is asked for."""
    sizes = {name: len(rows_of(name, data_folder, None)) for name in TASKS}
    assert sizes == {
        "arc_easy": 200, "boolq": 50, "commonsense_qa": 200, "copa": 100, "hellaswag": 150, "piqa": 200,
        "winograd_wsc": 200, "blimp": 1340,
    }  # fmt: skip
    more = {name: len(rows_of(name, data_folder, 500)) for name in TASKS}
    assert more == {**dict.fromkeys(TASKS, 500), "copa": 100, "winograd_wsc": 273, "blimp": 1340}


# The small OPT, and what it is to beat


def test_the_tokenizer_keeps_every_byte_and_survives_saving(
    tokenizer: Any, original: nn.Module, tmp_path: Path
) -> None:
    from streamline_hooks.checkpoint import load_pretrained

    original.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, again = load_pretrained(tmp_path)
    for text in ("the cat runs.", " two  spaces\n\n\tand a tab", "naïve 漢字 \U0001f9e9", "é\x00</s"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text == again.decode(ids)
        assert again(text, add_special_tokens=False).input_ids == ids
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (2, 2, 1) and max(
        again.get_vocab().values()
    ) < 320
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_training_goes_on_where_it_was_stopped(documents: list[str], tokenizer: Any, tmp_path: Path) -> None:
    """To the same weights, bit for bit; and not with another recipe or text."""
    stream = stream_of(documents, tokenizer, 0)
    assert int((stream == tokenizer.eos_token_id).sum()) == len(documents)
    whole = Training(TINY, stream, tmp_path / "whole.pt")
    whole.run()
    part = Training(TINY, stream, tmp_path / "part.pt")
    part.run(until=3)
    again = Training(TINY, stream, tmp_path / "part.pt")
    assert again.step == 3
    again.run()
    assert again.losses == whole.losses and len(whole.losses) == TINY.steps
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = Recipe(**{**vars(TINY), "rate": 1e-3})
    for recipe, text in ((other, stream), (TINY, stream.roll(1))):
        with pytest.raises(SystemExit, match=r"another recipe or text.*--anew"):
            Training(recipe, text, tmp_path / "part.pt")


def test_an_epoch_has_each_sequence_once(documents: list[str], tokenizer: Any, tmp_path: Path) -> None:
    training = Training(TINY, stream_of(documents, tokenizer, 0), tmp_path / "x.pt")
    count = len(training.sequences) // TINY.batch * TINY.batch
    seen = torch.cat([training.batch_of_step(step) for step in range(count // TINY.batch)])
    assert len(seen.unique(dim=0)) == count > 10


def test_the_rate_rises_and_falls_to_a_tenth() -> None:
    rates = [Recipe().rate_at(step) for step in range(Recipe().steps)]
    top = rates.index(max(rates))
    assert top in (Recipe().warmup - 1, Recipe().warmup) and max(rates) == Recipe().rate
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] > 0 and rates[-1] == pytest.approx(Recipe().rate / 10, rel=1e-3)


def test_a_model_that_learns_beats_a_bigram_where_there_is_more_to_know(tmp_path: Path) -> None:
    """Each token is the one two places before it: a bigram knows nothing, an OPT learns it."""
    pairs = torch.randint(3, 8, (2_500, 2), generator=torch.Generator().manual_seed(0))
    stream = pairs.repeat(1, 8).flatten()
    recipe = Recipe(width=32, blocks=2, heads=2, vocabulary=8, sequence=32, batch=8, steps=100, warmup=10, rate=1e-2)
    training = Training(recipe, stream, tmp_path / "x.pt")
    training.run()
    held_out = {"pairs": [{"input_ids": training.sequences[-8:], "attention_mask": torch.ones(8, 32).long()}]}
    got = compare(training.model.eval(), Bigram(stream, 8), held_out)
    assert got["all"] == got["pairs"] and got["all"]["tokens"] == 8 * 31
    assert got["all"]["bigram"] > 4.0 and got["all"]["opt"] < 0.8 * got["all"]["bigram"]


@pytest.mark.parametrize("seed", range(3))
def test_the_bigram_is_a_distribution_and_equals_its_formula(seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = np.minimum(random.geometric(0.15, 300) - 1, 24)  # of 30: some are never seen
    bigram = Bigram(torch.tensor(tokens), 30)
    counts = np.zeros((30, 30))
    for a, b in pairwise(tokens):
        counts[a, b] += 1
    d = (counts == 1).sum() / ((counts == 1).sum() + 2 * (counts == 2).sum())
    before = (counts > 0).sum(0)
    e = (before == 1).sum() / ((before == 1).sum() + 2 * (before == 2).sum())
    q = np.maximum(before - e, 0) / before.sum() + e * (before > 0).sum() / before.sum() / 30
    grid = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
    got = bigram.probabilities(*grid).numpy()
    for v in range(30):
        times = counts[v].sum()
        row = np.maximum(counts[v] - d, 0) / times + d * (counts[v] > 0).sum() / times * q if times else q
        np.testing.assert_allclose(got[v], row, rtol=1e-12)
    np.testing.assert_allclose(got.sum(1), 1.0, rtol=1e-12)
    assert got.min() > 0.0
    rows = torch.tensor(tokens[:280]).view(7, 40)
    expected = -sum(math.log(got[a, b]) for row in rows.tolist() for a, b in pairwise(row))
    assert bigram.nll(rows) == pytest.approx(expected, rel=1e-12)
    assert discount(torch.tensor([3, 4])) == 0.5


def test_a_model_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Train.*`python.*benchmarks.small_opt`"):
        small_opt.load_small_opt(tmp_path)
