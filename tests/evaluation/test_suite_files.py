"""Suites from files: names, subsets, prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import StreamlineError, suite_from_files
from streamline_hooks.evaluation import read_questions


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    lines(tmp_path / "rivers.jsonl", [{"query": f"River {k}", "choices": ["a", "b"], "gold": k % 2} for k in range(9)])
    lines(tmp_path / "ends.jsonl", [{"context": f"Text {k}", "continuation": "end"} for k in range(9)])
    lines(tmp_path / "sums.jsonl", [{"question": f"{k} + 1?", "answer": str(k + 1)} for k in range(9)])
    prose = "\n\n\n".join(f"Document {k} " + " ".join(f"word{j}" for j in range(60)) for k in range(6))
    (tmp_path / "prose.txt").write_text(prose)
    return tmp_path


class Words:
    """A token a word."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [3] * len(text.split())}


def test_everything_has_the_name_of_its_file(folder: Path) -> None:
    suite = suite_from_files(
        Words(),
        text=[folder / "prose.txt"],
        questions=[folder / "rivers.jsonl"],
        last_words=[folder / "ends.jsonl"],
        problems=[folder / "sums.jsonl"],
        probe_count=3,
        normalised=["rivers"],
        shots=2,
        prompts=4,
        window=64,
    )
    assert list(suite.text) == ["prose"] and len(suite.text["prose"]) == 6
    assert suite.choices["rivers"].normalised and len(suite.choices["rivers"].questions) == 9
    assert suite.choices["rivers"].questions == tuple(read_questions(folder / "rivers.jsonl"))
    assert len(suite.last_words["ends"]) == 9
    sums = suite.problems["sums"]
    assert len(sums.problems) == 7 and sums.problems[0].prompt.startswith("Question: 0 + 1?\nAnswer: 1\n\nQuestion: 1")
    assert set(suite.problems) == {"sums", "arithmetic", "brackets", "copying", "counting"}
    assert suite.window == 64
    assert [prompt.split()[:2] for prompt in suite.prompts] == [["Document", str(k)] for k in range(4)]
    assert all(len(prompt.split()) == 24 for prompt in suite.prompts)


def test_names_of_files_and_of_data_sets() -> None:
    from streamline_hooks.evaluation.suite_files import by_name

    sources = ["a/wiki.test.txt", "wiki.valid.txt.gz", "b.jsonl.gz", "pairs.zip", "hub:allenai/ai2_arc:ARC-Easy:test"]
    sources += ["hub:allenai/ai2_arc:ARC-Challenge:test", "hub:ybisk/piqa:validation", "folder"]
    expected = ["wiki.test", "wiki.valid", "b", "pairs", "ai2_arc-ARC-Easy", "ai2_arc-ARC-Challenge", "piqa", "folder"]
    assert list(by_name(sources)) == expected


def test_subsets_are_seeded_and_in_order(folder: Path) -> None:
    suites = [
        suite_from_files(Words(), questions=[folder / "rivers.jsonl"], items=4, seed=seed, prompts=["One"])
        for seed in (0, 0, 1)
    ]
    asked = [[q.contexts[0] for q in suite.choices["rivers"].questions] for suite in suites]
    assert asked[0] == asked[1] != asked[2] and asked[0] == sorted(asked[0]) and len(asked[0]) == 4
    assert suites[0].prompts == ["One"]


def test_text_is_cut_to_about_so_many_tokens(folder: Path) -> None:
    whole = suite_from_files(Words(), text=[folder / "prose.txt"]).text["prose"]
    some = suite_from_files(Words(), text=[folder / "prose.txt"], text_tokens=150).text["prose"]
    tokens = sum(len(document.split()) for document in some)
    assert 140 <= tokens <= 155 and len(some) == 3
    assert all(any(document.startswith(part) for document in whole) for part in some)


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(StreamlineError, match=r"seas;.*rivers"):
        suite_from_files(Words(), questions=[folder / "rivers.jsonl"], normalised=["seas"])
    (folder / "more").mkdir()
    other = lines(folder / "more" / "rivers.jsonl", [{"query": "?", "choices": ["a", "b"], "gold": 0}])
    sums = lines(folder / "arithmetic.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    with pytest.raises(StreamlineError, match=r"arithmetic.*probes.*rename"):
        suite_from_files(Words(), problems=[sums], probe_count=2)
    with pytest.raises(StreamlineError, match=r"2 samples.*0 are.*2 times.*give"):
        suite_from_files(Words(), problems=[sums], samples=2)
    task = suite_from_files(Words(), problems=[sums], samples=2, temperature=0.7, problem_tokens=9).problems[
        "arithmetic"
    ]
    assert (task.samples, task.temperature, task.new_tokens) == (2, 0.7, 9) and "Question:" in task.stop
    rivers: dict[str, Any] = {"questions": [folder / "rivers.jsonl"]}
    for settings, said in (
        ({**rivers, "shots": 3}, r"shots=3.*examples.*none"),
        ({"problems": [sums], "examples": sums}, r"arithmetic.jsonl'.*questions.*none"),
        ({**rivers, "samples": 5, "temperature": 0.8}, r"samples=5, temperature=0.8.*problems"),
        ({"probe_count": 2, "temperature": 0.8}, r"samples=1, temperature=0.8.*problems"),
    ):
        with pytest.raises(StreamlineError, match=said):
            suite_from_files(Words(), **settings)
    with pytest.raises(StreamlineError, match=r"items=0.*at least 1"):
        suite_from_files(Words(), problems=[sums], items=0)
    with pytest.raises(StreamlineError, match=r"rivers.*rename"):
        suite_from_files(Words(), questions=[folder / "rivers.jsonl", other])
