"""The benchmark of what a repair keeps of generation: which rows there are, and the table that is made of them."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import quality_generation
from benchmarks.generation_recipes import CURVE, RECIPES, TRAINED, Run, plans, same_minutes
from benchmarks.generation_table import numbers, table
from benchmarks.quality_generation import Bench


def generation(solved: int, text: str = "and so on") -> dict[str, Any]:
    bits = "1" * solved + "0" * (40 - solved)
    match = {"length": 9.5, "share": 0.25, "repetition": 0.3, "original_repetition": 0.1}
    return {
        "key": "asked",
        "probes": {"copying": bits, "arithmetic": bits},
        "pass_at": {"samples": 20, "right": {"copying": [solved // 2] * 10}},
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
    found = [run for runs in plans(1000, {}, {}).values() for run in runs]
    assert len({run.key for run in found}) == len(found)
    for removed in (4, 8):
        for name in RECIPES:
            seeds = {run.seed for run in found if (run.recipe, run.removed, run.tokens) == (name, removed, 1000)}
            assert seeds == ({0, 1, 2} if name in TRAINED else {0})
    assert {run.tokens for run in found if run.recipe == "best" and run.removed == 8} == {1000, *CURVE}


def test_the_same_minutes_are_as_many_tokens_as_they_allow() -> None:
    names = ("best", "KL alone", "on policy", "without healing", "LM alone")
    runs = [Run(name, 8, 100_000) for name in names]
    rows = {run.key: row(run, 70, 20, minutes) for run, minutes in zip(runs[:4], (4.0, 2.0, 7.0, 3.7), strict=True)}
    rows[runs[2].key]["minutes"]["text"] = 1.0  # that was written for it
    found = same_minutes(runs, rows, {})  # without healing takes nearly as long, and LM alone has no row
    assert [(run.recipe, run.tokens) for run in found] == [("KL alone", 200_192), ("on policy", 50_176)]
    assert not {run.key for run in found} & {replace(run, same_minutes=False).key for run in found}
    assert same_minutes(runs, {}, {}) == []
    timed = same_minutes(runs, rows, {"KL alone": 0.95, "without healing": 0.8})  # in one run, which rows are not
    assert [(run.recipe, run.tokens) for run in timed] == [("on policy", 50_176), ("without healing", 124_928)]
    rows[runs[1].key]["products"] = "bfloat16"  # whose minutes are those of another machine
    assert [run.recipe for run in same_minutes(runs, rows, {})] == ["on policy"]


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


def test_the_table_has_the_best_first_and_the_texts_beside_one_another() -> None:
    rows = [
        row(Run("removed", 8, 1000), 55, 3, text="a a | a"),
        row(Run("best", 8, 1000), 75, 24),
        row(Run("best", 8, 50_000), 78, 27),
        row(Run("KL alone", 8, 1536, same_minutes=True), 72, 12),
        row(Run("without healing", 8, 1000), 71, 10),  # takes nearly the time of best, and so is in both tables
        row(Run("on policy", 8, 2048), 72, 12),  # of another number of tokens: in no table
    ]
    lines = table(content(rows)).splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert names == ["recipe", "best", "without healing", "removed", "recipe", "best", "KL alone", "without healing",
                     "recipe", "best, 50,000 tokens", "best, 1,000 tokens"]  # fmt: skip
    best = next(line for line in lines if line.startswith("| best |"))
    assert " | 83.3% [" in best and " | 80.0% [" in best and best.endswith(" | 30.0% | 1.500 | 5.0 |")
    assert "**Once \\*upon\\***" in lines and "- removed: a a \\| a" in lines
    assert lines[-1] == "Made by `the command`."


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
