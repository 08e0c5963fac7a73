"""The benchmark of what a repair keeps of generation: which rows there are, and the table that is made of them."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import quality_generation
from benchmarks.generation_recipes import (
    BEST,
    CURVE,
    EARLIER,
    RECIPES,
    SETTINGS,
    TRAINED,
    Recipe,
    Run,
    plans,
    same_minutes,
    trained_in,
)
from benchmarks.generation_table import differences, numbers, table
from benchmarks.quality_generation import Bench
from benchmarks.training_text import TrainingText
from streamline_hooks import CompressionConfig, LinearConfig, RunOptions, Target
from streamline_hooks.selection import DisjointSearch


def generation(solved: int, text: str = "and so on") -> dict[str, Any]:
    bits = "1" * solved + "0" * (40 - solved)
    match = {"length": 9.5, "share": 0.25, "repetition": 0.3, "original_repetition": 0.1}
    return {
        "key": "asked",
        "sets": 8,
        "guessed": {
            "probes": {"copying": 0.0, "arithmetic": 0.0},
            "pass": {k: {"copying": 0.0} for k in ("1", "5", "20")},
        },
        "probes": {"copying": bits, "arithmetic": bits},
        "pass_at": {
            "samples": 20,
            "right": {"copying": [solved // 2] * 10},
            "pass": {"copying": {"1": solved / 40, "5": 1.0, "20": 1.0}},
        },
        "last_words": {"right": bits, "perplexity": 12.0},
        "match": {"text": match, "instructions": match},
        "samples": [{"prompt": "Once *upon*", "text": text}],
    }


def row(run: Run, right: int, solved: int, minutes: float = 4.0, text: str = "and so on") -> dict[str, Any]:
    return {
        **asdict(run),
        "right": {"copa": "1" * right + "0" * (100 - right)},
        "generation": generation(solved, text),
        "products": "float32",
        "minutes": {"fit": 1.0, "train": minutes, "score": 3.0},
        "text": {"mean_perplexity_ratio": 1.5, "kl": 0.4},
    }


def content(rows: list[dict[str, Any]]) -> dict[str, Any]:
    original = {"counted": ["copa"], "right": {"copa": "1" * 80 + "0" * 20}, "chance": {"copa": 0.5}}
    names = [field.name for field in fields(Run)]
    keyed = {Run(**{name: one[name] for name in names}).key: one for one in rows}
    originals = {"float32": {"classification": original, "generation": generation(30)}}
    return {"command": "the command", "tokens": 1000, "originals": originals, "rows": keyed}


def test_every_recipe_has_a_row_for_each_number_of_blocks_and_those_trained_three_seeds() -> None:
    found = [run for runs in plans(1000, {"rows": {}}).values() for run in runs]
    assert len({run.key for run in found}) == len(found)
    for removed in (4, 8):
        for name in RECIPES:
            seeds = {run.seed for run in found if (run.recipe, run.removed, run.tokens) == (name, removed, 1000)}
            assert seeds == ({0, 1, 2} if name in TRAINED else {0})
    assert {run.tokens for run in found if run.recipe == "best" and run.removed == 8} == {1000, *CURVE}


def test_the_same_minutes_are_as_many_tokens_as_they_allow() -> None:
    names = ("best", "KL alone", "on policy", "without healing", "LM alone")
    runs = {name: Run(name, 8, 100_000) for name in names}
    rows = [row(runs[name], 70, 20, took) for name, took in zip(names, (4.0, 2.0, 7.0, 3.7), strict=False)]
    rows[2]["minutes"]["text"] = 1.0  # that was written for it
    for one, busy in zip(rows, (1.0, 2.0, 1.5, 1.0), strict=True):  # what it is scored in, too
        one["minutes"] = {part: busy * took for part, took in one["minutes"].items()}
    whole = content(rows)

    def found() -> list[tuple[str, int, bool]]:
        return [(run.recipe, run.tokens, run.same_minutes) for run in same_minutes(8, 100_000, whole)]

    # Without healing takes nearly as long, and LM alone has no row.
    assert found() == [("best", 100_000, False), ("without healing", 100_000, False), ("KL alone", 200_192, True),
                       ("on policy", 50_176, True)]  # fmt: skip
    assert [run.recipe for run in plans(100_000, whole)["minutes"]] == ["KL alone"]
    whole["paces"] = {"float32": {"8": {"best": 1.0, "KL alone": 0.95, "without healing": 0.8}}}
    assert found() == [("best", 100_000, False), ("without healing", 124_928, True), ("KL alone", 100_000, False),
                       ("on policy", 50_176, True)]  # fmt: skip
    whole["paces"] = {"bfloat16": whole["paces"]["float32"]}  # of another machine
    whole["rows"][runs["on policy"].key]["products"] = "bfloat16"
    assert [name for name, _, _ in found()] == ["best", "without healing", "KL alone"]
    assert same_minutes(8, 100_000, {"rows": {}}) == []


@pytest.mark.parametrize("which", ["own", "both"])
def test_own_text_is_all_or_every_other_sequence(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = Bench.__new__(Bench)
    made.options, made.tokenizer = SimpleNamespace(data=None), None
    documents = TrainingText(torch.zeros(20, 512), torch.zeros(2, 512), {}, torch.zeros(20))
    monkeypatch.setattr(quality_generation, "training_text", lambda *given: documents)
    made.own_text = lambda sequences, run: (torch.ones(sequences, 512), 1.5)
    text, minutes = made.text(which, Run("best", 8, 5 * 512))
    expected = [1, 1, 1, 1, 1] if which == "own" else [1, 0, 1, 0, 1]
    assert (text.train[:, 0].tolist(), minutes) == (expected, 1.5)
    assert made.text("documents", Run("best", 8, 5 * 512))[0].train.shape == (5, 512)


def test_numbers_are_means_over_the_seeds_and_above_chance() -> None:
    runs = [Run("best", 8, 1000, seed) for seed in (0, 1)]
    found = numbers(content([]), [row(runs[0], 70, 20), row(runs[1], 60, 10)])
    assert found["classification"]["value"] == pytest.approx((0.65 - 0.5) / (0.8 - 0.5))
    assert found["generation"]["greedy"]["above_chance"]["value"] == pytest.approx(15 / 30)
    assert (found["seeds"], found["minutes"]) == (2, 5.0)


def test_each_row_is_held_against_the_original_in_its_own_precision() -> None:
    runs = [Run("best", 8, 1000, seed) for seed in (0, 1)]
    whole, rows = content([]), [row(runs[0], 70, 20), {**row(runs[1], 70, 20), "products": "bfloat16"}]
    with pytest.raises(KeyError, match="bfloat16"):
        numbers(whole, rows)
    own = {"counted": ["copa"], "right": {"copa": "1" * 70 + "0" * 30}, "chance": {"copa": 0.5}}
    whole["originals"]["bfloat16"] = {"classification": own, "generation": {**generation(20), "key": "in bfloat16"}}
    rows[1]["generation"]["key"] = "in bfloat16"
    found = numbers(whole, rows)
    assert found["classification"]["value"] == pytest.approx((0.70 - 0.5) / (0.75 - 0.5))
    assert found["generation"]["greedy"]["above_chance"]["value"] == pytest.approx(20 / 25)


def test_recipes_are_held_against_each_other_on_the_seeds_that_both_have() -> None:
    whole = content([])
    best = [
        row(Run("best", 8, 1000, seed), right, solved) for seed, right, solved in ((0, 70, 20), (1, 74, 24), (2, 80, 0))
    ]
    other = [row(Run("KL alone", 8, 1000, seed), right, solved) for seed, right, solved in ((1, 64, 12), (0, 60, 10))]
    more = differences(whole, best, other)
    assert more["classification"].value == pytest.approx((0.72 - 0.62) / 0.3)
    assert more["accuracy"].value == pytest.approx((0.72 - 0.62) / 0.8)
    assert more["generation"].value == pytest.approx((22 - 11) / 30)
    # Of 20 tries at each problem 11 are right on average and then 5.5, and the original's are 15.
    assert more["pass@1"].value == pytest.approx((11 - 5.5) / 15)
    assert set(more) == {"classification", "accuracy", "generation", "pass@1", "pass@20"}
    assert all(one.low <= one.value <= one.high for one in more.values()) and more["generation"].low > 0
    assert differences(whole, best[2:], other) == {}
    assert differences(whole, best, [{**one, "products": "bfloat16"} for one in other]) == {}


def test_the_table_has_the_best_first_and_the_texts_beside_one_another() -> None:
    rows = [
        row(Run("removed", 8, 1000), 55, 3, text="a a | a"),
        row(Run("best", 8, 1000), 75, 24),
        row(Run("best", 8, 50_000), 78, 27),
        row(Run("KL alone", 8, 1536, same_minutes=True), 72, 12),
        row(Run("without healing", 8, 1000), 71, 10),  # takes nearly the time of best, and so is in both tables
        row(Run("KL alone", 8, 1000), 70, 12, minutes=2.7),
        row(Run("LM alone", 8, 1000), 70, 11, minutes=12.0),  # with no row on fewer tokens yet
        row(Run("on policy", 8, 2048), 72, 12),  # of another number of tokens: in no table
        row(Run("best", 8, 1000, seed=1), 80, 30),  # a seed that others do not have: not held against them
    ]
    lines = table(content(rows)).splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert names == ["recipe", "best", "KL alone", "LM alone", "without healing", "removed",
                     "`best` compared with", "without healing", "KL alone", "LM alone",
                     "recipe", "best", "KL alone", "without healing",
                     "`best` compared with", "without healing", "KL alone",
                     "recipe", "best, 50,000 tokens", "best, 1,000 tokens"]  # fmt: skip
    best = next(line for line in lines if line.startswith("| best |"))
    assert best.startswith("| best | 0, 1 | 91.7% [") and best.endswith(" | 30.0% | 1.500 | 5.0 |")
    assert " | 96.9% [" in best and " | 90.0% [" in best and "] | 80%, 100% | " in best
    more, usual = (line for line in lines if line.startswith("| best, "))
    assert more.startswith("| best, 50,000 tokens | 0 | 93.3%")
    assert usual.startswith("| best, 1,000 tokens | 0 | 83.3%"), "of the curve's one seed"
    more = lines[next(k for k, line in enumerate(lines) if line.startswith("| `best` compared with")) + 2]
    assert " | +13.3 [" in more and " | +5.0 [" in more and " | +46.7 [" in more
    assert "**Once \\*upon\\***" in lines and "- removed: a a \\| a" in lines
    assert lines[-1] == "Made by `the command`."


@pytest.mark.long
def test_the_table_shows_what_was_measured() -> None:
    """The last digit of an interval's end depends on the version of NumPy."""
    measured = json.loads(quality_generation.FILE.read_text())
    number = re.compile(r"[-+]?\d+(?:\.\d+)?")
    stored, present = quality_generation.FILE.with_suffix(".md").read_text(), table(measured)
    assert number.sub("#", stored) == number.sub("#", present)
    pairs = list(zip(number.findall(stored), number.findall(present), strict=True))
    assert sum(one != other for one, other in pairs) <= len(pairs) // 100
    assert all(abs(float(one) - float(other)) <= 10.0 ** -len(one.partition(".")[2]) for one, other in pairs)


def test_a_recipe_that_was_interrupted_has_no_minutes_and_one_of_another_precision_is_told() -> None:
    rows = [row(Run("best", 8, 1000), 75, 24), row(Run("KL alone", 8, 1000), 70, 12)]
    rows[1]["minutes"]["train"] = None
    whole = content(rows)
    lines = table(whole).splitlines()
    assert next(line for line in lines if line.startswith("| KL alone |")).endswith(" | 1.500 | - |")
    assert [run.recipe for run in same_minutes(8, 1000, whole)] == ["best"]
    whole["paces"] = {"float32": {"8": {"best": 1.0, "KL alone": 0.5}}}
    assert [run.recipe for run in same_minutes(8, 1000, whole)] == ["best", "KL alone"]
    whole["originals"]["bfloat16"] = whole["originals"]["float32"]
    rows[1]["products"] = "bfloat16"
    names = [line.split(" | ")[0] for line in table(whole).splitlines() if line.startswith("| ")]
    assert names == ["| recipe", "| best (float32)", "| KL alone (bfloat16)"]  # and are not held against each other


def test_each_row_names_its_seeds_and_two_are_compared_on_those_that_both_have() -> None:
    """A third that has fewer costs them none."""
    rows = [
        row(Run(name, 8, 1000, seed), right, 20)
        for seed in (0, 1, 2)
        for name, right in (("best", 70 + seed), ("KL alone", 70), ("LM alone", 70))
    ]
    there = [one for one in rows if one["recipe"] != "KL alone" or one["seed"]]
    there = [one for one in there if one["recipe"] != "LM alone" or one["seed"] == 2]
    whole = content([*there, row(Run("removed", 8, 1000), 60, 3)])
    lines = [line.split(" | ") for line in table(whole).splitlines() if line.startswith("| ")]
    named = {cells[0]: cells[1] for cells in lines[1:5]}
    assert named == {"| best": "0, 1, 2", "| KL alone": "1, 2", "| LM alone": "2", "| removed": "0"}
    pairs = {cells[0]: (cells[1], cells[2].split()[0]) for cells in lines[6:8]}
    assert pairs == {"| KL alone": ("1, 2", "+5.0"), "| LM alone": ("2", "+6.7")}


def test_rows_that_were_asked_otherwise_are_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Bench.__new__(Bench)
    made.file, made.options = Path("rows.json"), SimpleNamespace(tokens=1000)
    made.content = content([])
    asked = SimpleNamespace(original_row=lambda: {"key": "asked"})
    made.quality, made.generation = SimpleNamespace(key="questions"), asked  # type: ignore[assignment]
    made.check()  # nothing is there yet
    made.content = content([row(Run("best", 8, 1000), 75, 24)])
    made.content["originals"] = {quality_generation.products(): made.content["originals"]["float32"]}
    made.content["originals"][quality_generation.products()]["classification"]["key"] = "questions"
    made.check()
    made.options.tokens = 2000
    with pytest.raises(SystemExit, match=r"rows.json.*of 1,000.*name.*\(--results\)"):
        made.check()
    made.options.tokens, made.quality.key = 1000, "others"
    with pytest.raises(SystemExit, match=r"other questions.*torch"):
        made.check()


def test_two_processes_do_not_make_one_row_and_neither_loses_the_other_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_generation, "ROOT", tmp_path)
    monkeypatch.setattr(quality_generation, "table", lambda content: "")

    def bench() -> Any:
        made = Bench.__new__(Bench)
        made.file, made.options = tmp_path / "results.json", SimpleNamespace()
        made.content = made.read()
        return made

    one, two, run = bench(), bench(), Run("best", 8, 1000)
    with one.taken(run) as mine, two.taken(run) as theirs:
        assert (mine, theirs) == (True, False)
        two.change(lambda content: content["rows"].update({"another": {}}))
        one.change(lambda content: content["rows"].update({run.key: {"what": RECIPES["best"].what}}))
    assert sorted(json.loads(one.file.read_text())["rows"]) == ["another", run.key]
    with two.taken(run) as theirs:
        assert not theirs, "it is there already"
    one.change(lambda content: content["rows"][run.key].update(what={**RECIPES["best"].what, "repeated": "0.25"}))
    with two.taken(run) as theirs:
        assert theirs, "what is there is of an earlier recipe"


def test_minutes_of_a_text_that_another_began_to_write_are_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_generation, "ROOT", tmp_path)
    made: Any = Bench.__new__(Bench)
    made.original, made.tokenizer = SimpleNamespace(), lambda text, **given: SimpleNamespace(input_ids=[1] * 512)
    monkeypatch.setattr(quality_generation, "fast_products", lambda model: nullcontext())

    def write(*given: Any, cache: Path, **more: Any) -> list[str]:
        cache.mkdir(exist_ok=True)
        if not (cache / "batches").exists():
            (cache / "batches").touch()
            raise KeyboardInterrupt
        return ["a", "b"]

    monkeypatch.setattr(quality_generation, "self_generated", write)
    run = Run("own text and documents", 8, 1000)
    with pytest.raises(KeyboardInterrupt):
        made.own_text(2, run)
    assert made.own_text(2, run)[1] is None and made.own_text(2, run)[1] is None
    whole = tmp_path / "build/quality_generation/1sequences|0.text"
    whole.mkdir()
    (whole / "batches").touch()
    (whole / "minutes").write_text("2.5")
    assert made.own_text(1, run)[1] == 2.5
    late = row(run, 70, 20)
    late["minutes"]["text"] = None
    assert trained_in(late) is None and numbers(content([]), [late])["minutes"] is None


def test_rounds_that_were_broken_off_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_generation, "ROOT", tmp_path)
    made: Any = Bench.__new__(Bench)
    made.original, made.tokenizer = torch.nn.Linear(1, 1), None
    seen: list[bool] = []
    configs: list[CompressionConfig] = []

    def rounds(model: Any, data: Any, config: CompressionConfig, *, options: RunOptions, **more: Any) -> Any:
        seen.append(options.resume)
        configs.append(config)
        return SimpleNamespace(seconds={"train": 1.0}, rounds=[], plan=SimpleNamespace(removed=(3,)))

    monkeypatch.setattr(quality_generation, "compress", rounds)
    made.scored = lambda *given: given[-1]
    run, text = (
        Run("in two rounds", 8, 1000),
        TrainingText(torch.zeros(4, 512), torch.zeros(2, 512), {}, torch.zeros(4)),
    )
    assert made.make_in_rounds(run, RECIPES[run.recipe], text)["train"] is not None
    made.file_of(run, "training.round-1").touch()
    assert made.make_in_rounds(run, RECIPES[run.recipe], text)["train"] is None
    assert seen == [False, True]
    config, kept = configs[0], RECIPES[run.recipe].config
    assert configs[1] == config and config.target == Target(blocks=8)
    assert (config.rounds, config.search, config.healing) == (2, kept.search, kept.healing)
    assert config.data == replace(kept.data, fitting_tokens=2 * 512)  # a fifth of the text for each of two rounds
    assert config.hardware.batch_size == 1 and not (config.evaluation.speed or config.evaluation.generation)
    assert config.distillation is not None and (config.distillation.seed, config.distillation.validations) == (0, 4)


def test_the_recipes_are_those_of_the_rows_that_were_measured() -> None:
    """In the strings of the first rows; a row whose strings differ would be made again."""
    rows = json.loads(quality_generation.FILE.read_text())["rows"].values()
    assert {one["recipe"] for one in rows} == {*RECIPES, *EARLIER}
    assert all(one["what"] == RECIPES[one["recipe"]].what for one in rows if one["recipe"] not in EARLIER)


@pytest.mark.parametrize(
    "change",
    [{"repair": LinearConfig()}, {"healing": None}, {"rounds": 2}, {"search": DisjointSearch()},
     {"distillation": replace(SETTINGS, learning_rate=2e-3)},
     {"data": replace(BEST.data, repeated_context=0.5)}],
)  # fmt: skip
def test_a_recipe_with_another_config_is_told_apart(change: dict[str, Any]) -> None:
    assert Recipe(replace(BEST, **change)).what != RECIPES["best"].what


def test_a_start_without_training_is_told_by_the_text_that_it_is_fitted_on() -> None:
    assert RECIPES["warm start alone"].what["starting"] == "1.0" != RECIPES["best"].what["starting"]
