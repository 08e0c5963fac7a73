"""Reading questions: both layouts, compressed or not, and errors that name the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.questions import Question, read_questions

QUERY = {"query": "Two and two is", "choices": ["four.", "five."], "gold": 0, "subject": "sums"}
CONTEXTS = {"context_options": ["The cup", "The bag"], "continuation": "was full.", "gold": 1}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_both_layouts(tmp_path: Path) -> None:
    path = written(tmp_path, QUERY, "", CONTEXTS, "")
    first, second = read_questions(path)
    assert first == Question(("Two and two is",) * 2, ("four.", "five."), 0, f"{path}, line 1")
    assert second == Question(("The cup", "The bag"), ("was full.",) * 2, 1, f"{path}, line 3")
    packed = tmp_path / "questions.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [q.continuations for q in read_questions(str(packed))] == [first.continuations, second.continuations]


def test_a_line_separator_inside_a_text_is_no_new_line(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({**QUERY, "query": "One\u2028two\x85"}, ensure_ascii=False), CONTEXTS)
    assert [q.where[-6:] for q in read_questions(path)] == ["line 1", "line 2"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", 'line 2 is not JSON: Expecting property name.*Expected {"query", "choices", "gold"} or'),
        ([1, 2], "line 2 holds a list; expected"),
        (
            {"question": "?", "choices": ["a", "b"], "gold": 0},
            "line 2 holds the keys question, choices, gold; expected",
        ),
        ({**QUERY, "choices": ["one"]}, "line 2 has no list of two texts or more"),
        ({**QUERY, "choices": "ab"}, "line 2 has no list of two texts or more"),
        ({**QUERY, "choices": ["a", 2]}, "line 2 has no list of two texts or more"),
        ({**QUERY, "choices": ["a", ""]}, "line 2 has no list of two texts or more"),
        ({**QUERY, "query": None}, "line 2 has no list of two texts or more"),
        ({**CONTEXTS, "continuation": 3}, "line 2 has no list of two texts or more"),
        ({**CONTEXTS, "context_options": None}, "line 2 has no list of two texts or more"),
        ({**QUERY, "gold": 2}, "line 2 has gold 2; expected the number of the right one of 2 choices, 0 to 1"),
        ({**QUERY, "gold": -1}, "line 2 has gold -1;"),
        ({**QUERY, "gold": True}, "line 2 has gold True;"),
        ({**QUERY, "gold": "0"}, "line 2 has gold '0';"),
        ({"query": "?", "choices": ["a", "b"]}, "line 2 has gold None;"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: object, text: str) -> None:
    with pytest.raises(StreamlineError, match=text):
        read_questions(written(tmp_path, QUERY, line))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="holds no question; expected one of"):
        read_questions(written(tmp_path, "", " "))
    with pytest.raises(StreamlineError, match="cannot be read: .*No such file.*Give a JSONL file in UTF-8"):
        read_questions(tmp_path / "absent.jsonl")
    broken = tmp_path / "broken.jsonl"
    for raw in (b"\xff\xfe{", gzip.compress(b"{}" * 100)[:-12]):
        broken.write_bytes(raw)
        with pytest.raises(StreamlineError, match="cannot be read"):
            read_questions(broken)
