"""The benchmark of what a model writes: its row, what it keeps of the original, and the numbers made of rows."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import generation_scores, heldout_pieces, short_answers
from benchmarks.generation_numbers import pass_of, retained_greedy, retained_pass, summary
from benchmarks.generation_scores import Counts, Generation
from benchmarks.heldout_pieces import beginnings, last_words
from benchmarks.instructions import INSTRUCTIONS
from benchmarks.last_words import LastWord, score_last_words
from benchmarks.probe_difficulty import HIGH, LOW, SEED, choose, chosen
from benchmarks.probe_levels import LEVELS
from benchmarks.short_answers import BEHIND, answer_tokens, fast_products, guessed, problems_of, sets_of
from benchmarks.small_opt import Recipe, new_model, train_tokenizer
from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.data import FORMS, TOPICS
from streamline_hooks.evaluation import Problem, ProblemResults
from streamline_hooks.evaluation.synthetic_tasks import guessing_accuracy
from tests.evaluation.number_tasks import Numbers
from tests.tiny_models import tiny_model

WORDS = ["the", "cat", "house", "runs", "sleeps", "green", "small", "under", "over", "near", "seven", "apple"]
FEW = Counts(
    probes=3, sampled=2, samples=4, ks=(1, 4), last_words=6, beginnings=3, instructions=2, new_tokens=6, shown=4
)
EASY = {"arithmetic": 1, "brackets": 2, "copying": 1, "counting": 1}


def paragraph(seed: int) -> str:
    random = Random(seed)
    sentences = [" ".join(random.choices(WORDS, k=random.randrange(5, 9))) for _ in range(20)]
    return "\n".join(f"{sentence} garden." for sentence in sentences)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer([paragraph(k) for k in range(8)], 320)
    made.chat_template = "{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}model:"
    return made


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    model = new_model(Recipe(width=16, blocks=4, heads=2, vocabulary=320, sequence=1024)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "text" / "heldout").mkdir(parents=True)
    for k, name in enumerate(("blog", "news")):
        text = "\n\n".join(["= Heading =", f"{'cat ' * 150}garden.", *(paragraph(10 * k + j) for j in range(4))])
        (tmp_path / "text" / "heldout" / f"{name}.txt").write_text(text)
    return tmp_path


def shorter(original: nn.Module) -> nn.Module:
    model = copy.deepcopy(original)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        surgeon.commit()
    return model


# The row


def test_a_row(data: Path, tokenizer: Any, original: nn.Module, monkeypatch: Any) -> None:
    cache, made = data / "cache.json", []
    row_of = Generation.measure_row
    monkeypatch.setattr(Generation, "measure_row", lambda self, *given: made.append(given) or row_of(self, *given))

    def generation(model: nn.Module = original, **options: Any) -> Generation:
        return Generation(model, tokenizer, data, **{"counts": FEW, "difficulty": EASY, "cache": cache, **options})

    first = generation()
    own = first.original_row()
    assert generation().original_row() == own and len(made) == 1
    itself = json.loads(json.dumps(first.row(copy.deepcopy(original))))
    assert without_time(itself) == without_time(own)
    assert {kind: (found["share"], set(found["same"])) for kind, found in itself["match"].items()} == {
        "text": (1.0, {"1"}),
        "instructions": (1.0, {"1"}),
    }
    row = json.loads(json.dumps(first.row(shorter(original))))
    assert row["key"] == own["key"] and row["last_words"]["nats"] != own["last_words"]["nats"]
    assert min(found["share"] for found in row["match"].values()) < 1.0
    assert {sort: len(right) for sort, right in row["probes"].items()} == dict.fromkeys(LEVELS, 3)
    assert {sort: len(right) for sort, right in row["pass_at"]["right"].items()} == dict.fromkeys(LEVELS, 2)
    assert len(row["last_words"]["right"]) == 6 == len(row["last_words"]["nats"].split())
    assert [one["prompt"] for one in row["samples"]] == [one["prompt"] for one in own["samples"]]
    assert len(row["samples"]) == 4
    assert set(row["seconds"]) == {"probes", "pass_at", "last_words", "match"}
    known = len(made)
    keys = {
        generation(**options).original_row()["key"]
        for options in ({"seed": 1}, {"difficulty": {**EASY, "copying": 2}}, {"model": shorter(original)})
    }
    assert len(keys | {own["key"]}) == 4 and len(made) == known + 3
    with (data / "text" / "heldout" / "news.txt").open("w") as file:
        file.write("\n\n".join(paragraph(90 + j) for j in range(4)))
    assert generation().original_row()["key"] not in {own["key"], *keys}


def without_time(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


def test_what_is_right_is_what_is_counted(data: Path, tokenizer: Any, original: nn.Module, monkeypatch: Any) -> None:
    """With answers that are known: the second problem of each sort greedily, and k + 1 of the samples at the k-th."""

    def solve(model: Any, tokenizer: Any, problems: Any, config: Any, **rest: Any) -> ProblemResults:
        samples = config.samples
        if samples == 1:
            return ProblemResults(((),) * len(problems), tuple((k == 1,) for k in range(len(problems))))
        assert config.temperature == 0.8 and config.top_p == 0.95
        return ProblemResults(
            ((),) * len(problems), tuple(tuple(j <= k for j in range(samples)) for k in range(len(problems)))
        )

    monkeypatch.setattr(generation_scores, "solve_problems", solve)
    row = Generation(original, tokenizer, data, counts=FEW, difficulty=EASY, cache=data / "cache.json").original_row()
    assert row["probes"] == dict.fromkeys(LEVELS, "010")
    assert row["pass_at"]["right"] == {sort: [1, 2] for sort in LEVELS}
    assert row["pass_at"]["pass"]["copying"] == {"1": pytest.approx((0.25 + 0.5) / 2), "4": 1.0}


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_fast_products_leave_the_head_in_float32_and_nothing_behind(
    precision: str, original: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_answers, "products", lambda: precision)
    hooks = [dict(module._forward_hooks) for module in original.modules()]
    ids = torch.arange(20)[None]
    seen: list[torch.dtype] = []
    handle = (
        original.get_decoder()
        .layers[0]
        .fc1.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    )
    with torch.no_grad(), fast_products(original):
        logits = original(ids).logits
        again = original(ids).logits
        with torch.autocast("cpu", enabled=False):
            original(ids)
            original(ids)
    handle.remove()
    assert logits.dtype == torch.float32 and torch.equal(logits, again)
    assert seen == [getattr(torch, precision)] * 2 + [torch.float32] * 2
    assert not torch.is_autocast_enabled("cpu")
    assert [dict(module._forward_hooks) for module in original.modules()] == hooks
    with pytest.raises(RuntimeError, match="stop"), fast_products(original):
        raise RuntimeError("stop")
    assert not torch.is_autocast_enabled("cpu") and not original.get_output_embeddings()._forward_pre_hooks


def test_an_answer_has_room_and_no_longer_one_passes_for_it(tokenizer: Any) -> None:
    problems = [Problem("", "cat"), Problem("", "the cat sleeps")]
    longest = len(tokenizer(" the cat sleeps", add_special_tokens=False)["input_ids"])
    assert answer_tokens(tokenizer, problems) > longest + 1


def test_problems_stand_behind_several_sets_of_solved_ones() -> None:
    found, sets = problems_of(12, 3, EASY), sets_of(12)
    assert (BEHIND, sets, sets_of(15), sets_of(16)) == (5, 3, 3, 4)
    for problems in found.values():
        shown = [problem.prompt.rpartition("\n")[0] for problem in problems]
        assert len(problems) == 12 and len(set(shown)) == sets
        assert all(text == shown[k % sets] for k, text in enumerate(shown))
        assert len({problem.prompt for problem in problems}) == 12
    others = {problem.prompt.rpartition("\n")[0] for problem in problems_of(12, 4, EASY)["copying"]}
    assert not others & {problem.prompt.rpartition("\n")[0] for problem in found["copying"]}


# Pieces of text


def test_pieces_end_with_the_last_word_of_a_sentence(data: Path, tokenizer: Any) -> None:
    found = last_words(data, tokenizer, 8, seed=0)
    assert found == last_words(data, tokenizer, 8, seed=0) != last_words(data, tokenizer, 8, seed=1)
    assert sorted(one.where for one in found) == ["blog"] * 4 + ["news"] * 4
    assert len({one.context for one in found}) == 8
    for one in found:
        assert one.continuation == "garden" and one.context == " ".join(one.context.split())
        tokens = len(tokenizer(f"{one.context} {one.continuation}.", add_special_tokens=False)["input_ids"])
        assert heldout_pieces.LEAST <= tokens <= heldout_pieces.MOST
        assert "Heading" not in one.context
    with pytest.raises(SystemExit, match="9000 needed"):
        last_words(data, tokenizer, 9_000, seed=0)


def test_an_end_is_scored_as_without_padding_and_with_the_token_that_spans_the_boundary() -> None:
    """In one of the texts 4 and 2 are one token, 42."""
    model = tiny_model("llama")
    texts = [LastWord("7 8 4", "2"), LastWord("7 8 5", "2 3")]
    found = score_last_words(model, Joined(), texts)
    for nats, ids, start in zip(found.loglikelihoods, ([7, 8, 42], [7, 8, 5, 2, 3]), (2, 3), strict=True):
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        assert nats == pytest.approx(sum(float(logs[k - 1, ids[k]]) for k in range(start, len(ids))), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-sum(found.loglikelihoods) / 2))


class Joined(Numbers):
    """Reads "4 2" as 42."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return super().__call__(text.replace("4 2", "42"), add_special_tokens)


def test_beginnings_have_the_length_and_end_with_a_word(data: Path, tokenizer: Any) -> None:
    for begun in beginnings(data, tokenizer, 4, seed=0):
        assert 24 <= len(tokenizer(begun, add_special_tokens=False)["input_ids"]) <= 32
        assert any(f"{begun} " in " ".join(text.split()) for text in ("cat " * 150, *map(paragraph, range(14))))


def test_instructions_are_none_of_the_calibration_prompts() -> None:
    made = {form.format(topic=topic) for form in FORMS for topic in TOPICS}
    assert len(set(INSTRUCTIONS)) == 20 and not made & set(INSTRUCTIONS)


# The difficulty


def row(solved: float, same: float = 0.0, error: float = 0.05) -> dict[str, float]:
    return {"solved": solved, "same_answer": same, "standard_error": error}


def test_the_level_nearest_the_middle_is_chosen() -> None:
    table = {
        "a": {"1": row(0.95), "2": row(0.8), "3": row(0.6), "4": row(0.1)},
        "b": {"1": row(0.75), "2": row(0.55)},  # as near: the easier one
        "c": {"1": row(0.65, same=0.6), "2": row(0.41)},  # 1 is no better than the same answer always
    }
    assert choose(table) == {"a": 3, "b": 1, "c": 2}
    with pytest.raises(SystemExit, match=r"0.4 to 0.9.*`LEVELS`"):
        choose({"a": {"1": row(0.91), "2": row(0.39)}})


def test_what_guessing_reaches() -> None:
    """Of four answers one is right twice: whoever draws the others' answers hits it with a third of the tries."""
    problems = [Problem("", "1"), Problem("", "2"), Problem("", "1"), Problem("", "3")]
    assert guessing_accuracy(problems) == pytest.approx(1 / 3)
    assert guessed(problems[:1], problems, 1) == pytest.approx(1 / 3)
    assert guessed(problems[1:2], problems, 9) == 0.0  # no other has this answer
    random = np.random.default_rng(0)
    answers = [1, 2, 1, 3]
    hit = [
        (random.choice(answers[:k] + answers[k + 1 :], (4000, 5)) == answer).any(axis=1).mean()
        for k, answer in enumerate(answers)
    ]
    assert guessed(problems, problems, 5) == pytest.approx(np.mean(hit), abs=0.02)


def test_what_was_chosen_is_what_was_measured_and_scores_on_other_problems() -> None:
    kept = json.loads(generation_scores.RESULTS.joinpath("probe_difficulty.json").read_text())
    assert chosen() == choose(kept["table"]) and set(chosen()) == set(LEVELS)
    assert {sort: len(levels) for sort, levels in kept["table"].items()} == {s: len(v) for s, v in LEVELS.items()}
    assert all(LOW <= kept["table"][sort][str(level)]["solved"] <= HIGH for sort, level in chosen().items())
    assert kept["seed"] == SEED != generation_scores.SEED  # no set of shown ones is of both, see above
    assert kept["sets_of_shots"] == sets_of(kept["count"])


# The numbers


def made(key: str, probes: str, ends: str, right: list[int], perplexity: float = 2.0) -> dict[str, Any]:
    match = {"length": 3.0, "share": 0.5, "repetition": None, "original_repetition": 0.25}
    return {
        "key": key,
        "sets": 100,
        "guessed": {"probes": {"copying": 0.0}, "pass": {k: {"copying": 0.0} for k in ("1", "2", "4")}},
        "probes": {"copying": probes},
        "last_words": {"right": ends, "perplexity": perplexity},
        "pass_at": {"samples": 4, "right": {"copying": right}},
        "match": {"text": match},
    }


ORIGINAL = made("k", "1" * 60 + "0" * 40, "1" * 50 + "0" * 50, [4, 2] * 10)
ROWS = [
    made("k", "1" * 30 + "0" * 70, "1" * 40 + "0" * 60, [2, 0] * 10, 3.0),
    made("k", "0" * 30 + "1" * 30 + "0" * 40, "1" * 20 + "0" * 80, [0, 2] * 10, 5.0),
]


def test_what_is_retained_of_one_model_and_of_several_seeds() -> None:
    one = retained_greedy(ORIGINAL, ROWS[:1])
    assert one.above_chance is not None and one.above_chance.value == pytest.approx((0.5 + 0.8) / 2)
    assert {name: e.value for name, e in one.tasks.items()} == {"copying": 0.5, "last_words": pytest.approx(0.8)}
    both = retained_greedy(ORIGINAL, ROWS)
    assert both.tasks["copying"].value == pytest.approx(0.5)
    assert both.tasks["last_words"].value == pytest.approx((0.8 + 0.4) / 2)
    # Each of the 60 solved problems is solved by one seed of two: whatever is drawn, half is retained.
    assert both.tasks["copying"].standard_error == pytest.approx(0.0, abs=1e-12)
    random = np.random.default_rng(0)
    first, mean = np.array([1.0] * 60 + [0.0] * 40), np.array([1.0] * 30 + [0.0] * 70)
    drawn = [mean[k].sum() / first[k].sum() for k in random.integers(0, 100, (4000, 100))]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (one.tasks["copying"].low, one.tasks["copying"].high) == pytest.approx((low, high), abs=0.02)
    itself = retained_greedy(ORIGINAL, [ORIGINAL]).above_chance
    assert itself is not None and (itself.value, itself.low, itself.high) == (1.0, 1.0, 1.0)


def test_what_guessing_reaches_is_taken_off_and_one_set_of_examples_is_drawn_as_one() -> None:
    guessing = {"probes": {"copying": 0.2}, "pass": {"1": {"copying": 0.5}}}
    original, row = ({**one, "guessed": guessing} for one in (ORIGINAL, ROWS[0]))
    found = retained_greedy(original, [row])
    assert found.tasks["copying"].value == pytest.approx((0.3 - 0.2) / (0.6 - 0.2))
    assert found.tasks["last_words"].value == pytest.approx(0.8)
    assert retained_pass(original, [row], 1).tasks["copying"].value == pytest.approx((0.25 - 0.5) / (0.75 - 0.5))
    # Behind each of ten sets the problems are all solved or none is.
    bits = "1110000000" * 10
    apart, together = (
        retained_greedy({**ORIGINAL, **sets}, [{**ROWS[0], **sets, "probes": {"copying": bits}}]).tasks["copying"]
        for sets in ({"sets": 100}, {"sets": 10})
    )
    assert together.value == apart.value and together.standard_error > 2 * apart.standard_error


@pytest.mark.parametrize(("k", "before", "after"), [(1, (1.0, 0.5), (0.5, 0.0)), (2, (1.0, 5 / 6), (5 / 6, 0.0))])
def test_what_is_retained_of_pass_at_k(k: int, before: tuple[float, ...], after: tuple[float, ...]) -> None:
    found = retained_pass(ORIGINAL, ROWS[:1], k).tasks["copying"]
    assert found.value == pytest.approx(sum(after) / sum(before)) and found.low < found.value < found.high


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", [1, 3, 6])
def test_pass_at_k_is_that_of_solved_problems(right: int, k: int) -> None:
    tries = (True,) * right + (False,) * (6 - right)
    assert pass_of(right, 6, k) == pytest.approx(ProblemResults(((),), (tries,)).pass_at(k))


def test_a_summary_is_json_and_a_mean_over_the_seeds() -> None:
    found = json.loads(json.dumps(summary(ORIGINAL, ROWS, ks=(1, 4))))
    assert found["seeds"] == 2 and found["last_words_perplexity"] == 4.0
    assert found["match"]["text"] == {"length": 3.0, "share": 0.5, "repetition": None, "original_repetition": 0.25}
    assert set(found["pass_at"]) == {"1", "4"} and found["greedy"]["tasks"]["copying"]["value"] == pytest.approx(0.5)


def test_rows_that_were_not_asked_the_same_are_refused() -> None:
    other = {**ROWS[0], "key": "other"}
    with pytest.raises(StreamlineError, match=r"is k, .*another row other\. Expected equal"):
        summary(ORIGINAL, [ROWS[0], other])
    with pytest.raises(StreamlineError, match=r"rows is empty.*at least one"):
        retained_greedy(ORIGINAL, [])
    with pytest.raises(StreamlineError, match=r"pass@5.*5 samples.*4"):
        retained_pass(ORIGINAL, ROWS, 5)
    with pytest.raises(StreamlineError, match=r"pass@3.*1, 2, 4"):
        retained_pass(ORIGINAL, ROWS, 3)
