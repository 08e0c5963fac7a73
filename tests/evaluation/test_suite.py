"""Suites: what is validated at once, and what is read of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import Problem, Suite


class Words:
    """A tokenizer with a token for each word."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text.split())}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 16, "stride": 32}, r"stride=32 is larger than window=16"),
        ({"stride": 0}, r"stride=0.*at least 1"),
        ({"first": "BOS"}, r"first='BOS'.*Expected.*bos.*eos"),
        ({"timed": (0, 16, 5)}, r"timed=\(0, 16, 5\).*Expected prompt tokens"),
        ({"timed": (16, -1, 5)}, r"timed=\(16, -1, 5\)"),
        ({"timed": (16, 16)}, r"timed=\(16, 16\)"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"prompts": "once"}, r"prompts='once'"),
        ({"text": {"tales": "once"}}, r"'tales'.*str"),
        ({"text": "tales.txt"}, r"text='tales.txt'"),
        ({"tasks": "piqa"}, r"tasks='piqa'.*str"),
        ({"samples": 3}, "samples=3 with temperature=0"),
        ({"temperature": -1.0}, "-1"),
        ({"items": 0}, "items=0"),
        ({"timed": None}, "suite is empty.*Set at least one"),
    ],
)
def test_what_no_suite_can_hold(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(StreamlineError, match=says):
        Suite(**settings)


def test_it_is_written_and_read() -> None:
    suite = Suite(text=["pydoc"], tasks=["piqa", "mine.jsonl"], problems=["gsm8k.jsonl"], probes=5, items=3)
    assert Suite.from_dict(json.loads(json.dumps(suite.to_dict()))) == suite


def test_text_is_cut_and_begun(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    documents = [" ".join(f"{name}{k}" for k in range(60)) for name in "abcd"]
    (tmp_path / "tales.txt").write_text("\n\n\n".join(documents))
    (tmp_path / "news.txt").write_text("n1 n2")
    paths = [str(tmp_path / name) for name in ("tales.txt", "news.txt")]
    whole = Suite(text=paths, prompts=8, timed=None).read(Words())
    assert whole.text == {"tales": documents, "news": ["n1 n2"]}
    assert whole.prompts == [" ".join(document.split()[:24]) for document in documents]
    some = Suite(text=paths, text_tokens=90, prompts=1, timed=None).read(Words()).text["tales"]
    assert len(some) == 2 and sorted(map(len, map(str.split, some)))[0] in range(28, 33)
    assert some == Suite(text=paths, text_tokens=90, timed=None).read(Words()).text["tales"]
    assert some != Suite(text=paths, text_tokens=90, seed=1, timed=None).read(Words()).text["tales"]


def test_problems_of_files_and_generated_ones(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{k} + 1?", "answer": str(k + 1)}) for k in range(9)))
    suite = Suite(problems=[str(path)], probes=2, shots=1, items=3, samples=2, temperature=0.5, timed=None)
    content = suite.read(Words())
    assert list(content.problems) == ["sums", "arithmetic", "brackets", "copying", "counting"]
    sums, how = content.problems["sums"]
    assert len(sums) == 3 and all(problem.prompt.startswith("Question: 0 + 1?\nAnswer: 1\n\n") for problem in sums)
    assert (how["samples"], how["temperature"], how["new_tokens"]) == (2, 0.5, 256)
    probes, how = content.problems["copying"]
    assert len(probes) == 2 and how == {"new_tokens": 32, "stop": ("\n",)}


def test_names_are_distinct_and_nothing_is_empty() -> None:
    with pytest.raises(StreamlineError, match=r"named a\..*Rename"):
        Suite(text={"a": ["A"]}, problems={"a": [Problem("A", "b")]}, timed=None).read(Words())
    with pytest.raises(StreamlineError, match=r"tales of the suite are empty"):
        Suite(text={"tales": []}).read(Words())


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tales.txt").write_text("Once")
    with pytest.raises(StreamlineError, match=r"named tales\..*Rename"):
        Suite(text=[str(tmp_path / name / "tales.txt") for name in ("a", "b")]).read(Words())
