"""Reading questions: what they become, prompts and examples before them, and errors that name the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.choices import ChoiceScores
from streamline_hooks.evaluation.questions import Question, chance, joined, questions_from, read_questions

QUERY = {"query": "Two and two is", "choices": ["four.", "five."], "gold": 0, "subject": "sums"}
CONTEXTS = {"context_options": ["The cup", "The bag"], "continuation": "was full.", "gold": 1}
PAIR = {"sentence_good": "A cat sits.", "sentence_bad": "A cat sit."}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def mmlu(question: str, gold: int = 0, subject: str = "world_history") -> dict[str, Any]:
    return {"subject": subject, "question": question, "choices": ["one", "two", "three"], "gold": gold}


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
        ("{", r"line 2.*not JSON.*Expecting property name.*Expected"),
        ([1, 2], r"line 2.*a list.*expected"),
        ({"question": "?", "gold": 0}, r'line 2.*question, gold.*expected.*query \{"query"'),
        ({"query": "?", "choices": ["a", "b"]}, r"line 2.*query, choices.*expected"),
        ({**QUERY, "choices": ["one"]}, r"line 2.*two texts or more"),
        ({**QUERY, "choices": "ab"}, r"line 2.*two texts or more"),
        ({**QUERY, "choices": ["a", 2]}, r"line 2.*two texts or more"),
        ({**QUERY, "choices": ["a", " "]}, r"line 2.*two texts or more"),
        ({**QUERY, "query": None}, r"line 2.*query that is no text"),
        ({**CONTEXTS, "continuation": 3}, r"line 2.*two texts or more"),
        ({**CONTEXTS, "context_options": None}, r"line 2.*context_options None.*list of texts"),
        ({**QUERY, "gold": 2}, r"line 2.*gold 2.*2 choices.*expected.*from 0"),
        ({**QUERY, "gold": -2}, r"line 2.*gold -2 .*2 choices"),
        ({**QUERY, "gold": -1}, r"line 2.*no answer.*gold -1"),
        ({**QUERY, "gold": True}, r"line 2.*gold True.*2 choices"),
        ({**QUERY, "gold": 0.0}, r"line 2.*gold 0.0.*2 choices"),
        ({**QUERY, "gold": "first"}, r"line 2.*gold 'first'.*2 choices"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: object, text: str) -> None:
    with pytest.raises(StreamlineError, match=text):
        read_questions(written(tmp_path, QUERY, line))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"no question.*expected"):
        read_questions(written(tmp_path, "", " "))
    with pytest.raises(StreamlineError, match=r"Give.*JSONL.*UTF-8"):
        read_questions(tmp_path / "absent.jsonl")
    broken = tmp_path / "broken.jsonl"
    for raw in (
        b"\xff\xfe{",
        gzip.compress(b"{}" * 100)[:-12],
        gzip.compress(b"{}" * 100)[:12] + b"xyz",
        b"PK\x03\x04",
    ):
        broken.write_bytes(raw)
        with pytest.raises(StreamlineError, match="cannot be read"):
            read_questions(broken)


def test_what_is_no_row_is_refused() -> None:
    with pytest.raises(StreamlineError, match=r"row 1.*expected"):
        questions_from([QUERY, "validation"])  # type: ignore[list-item]
    with pytest.raises(StreamlineError, match=r"'pairs'.*minimal_pa"):
        questions_from([QUERY], "pairs")
    with pytest.raises(StreamlineError, match=r'row 0.*expected.*\{"context_options"'):
        questions_from([QUERY], "contexts")


# Minimal pairs


@given(st.integers(1, 9), st.integers(0, 3))
def test_a_model_to_which_all_is_equal_is_right_about_half_of_the_pairs(count: int, others: int) -> None:
    """Counted among the pairs alone: every second row may be something else."""
    rows: list[dict[str, Any]] = []
    for k in range(count):
        rows += [{"sentence_good": f"good {k}", "sentence_bad": f"bad {k}"}, *[QUERY] * others]
    pairs = [q for q in questions_from(rows) if q.contexts == ("", "")]
    assert all(q.continuations[q.gold] == f"good {k}" for k, q in enumerate(pairs))
    assert all(q.continuations[1 - q.gold] == f"bad {k}" for k, q in enumerate(pairs))
    equal = ChoiceScores(((-1.0, -1.0),) * count, ((5, 5),) * count, tuple(q.gold for q in pairs), ((2, 2),) * count)
    assert sum(equal.right) == (count + 1) // 2


def test_blimp(data_folder: Path) -> None:
    questions = read_questions(data_folder / "bench" / "blimp.zip")
    assert len(questions) == 67_000 and sum(q.gold for q in questions) == 33_500
    assert questions[0].continuations[0] == "Who should Derek hug after shocking Richard?"
    assert questions[0].where.endswith("blimp.zip: data/adjunct_island.jsonl, line 1")


# Prompts


def test_a_query_stands_in_the_prompt_whatever_braces_the_two_have() -> None:
    (question,) = questions_from([{**QUERY, "query": "The set {} {x} has"}], prompt="{y}: {}\nA:")
    assert question.contexts == ("{y}: The set {} {x} has\nA:",) * 2
    for prompt in ("A:", "{} {}"):
        with pytest.raises(StreamlineError, match=r"one place {}"):
            questions_from([QUERY], prompt=prompt)
    with pytest.raises(StreamlineError, match=r"'minimal_pairs'.*query"):
        questions_from([PAIR], prompt="Sentence: {}")


@pytest.mark.parametrize(
    ("context", "continuation", "text"),
    [("a", "b", "a b"), ("a ", "b", "a b"), ("a\n", "b", "a\nb"), ("a", " b", "a b"), ("", "b", "b")],
)
def test_joined(context: str, continuation: str, text: str) -> None:
    assert joined(context, continuation) == text


# Examples


def test_examples_of_the_questions_own_subject_stand_before_it(tmp_path: Path) -> None:
    """Written out: header, two examples with their answers, and the question, whose letters are scored."""
    shown = [mmlu("Which?", 2), mmlu("How much?", 1, "sums"), mmlu(" When? ", 0), mmlu("Why?", 1)]
    packed = tmp_path / "examples.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, shown)).encode()))
    expected = (
        "The following are multiple choice questions (with answers) about world history.\n\n"
        "Which?\nA. one\nB. two\nC. three\nAnswer: C\n\n"
        "When?\nA. one\nB. two\nC. three\nAnswer: A\n\n"
        "Who?\nA. one\nB. two\nC. three\nAnswer:"
    )
    for examples in (shown, packed, iter(shown)):
        (question,) = questions_from([mmlu("Who?", 1)], examples=examples, shots=2)  # type: ignore[arg-type]
        assert question == Question((expected,) * 3, ("A", "B", "C"), 1, "row 0")
    (bare,) = questions_from([mmlu("Who?", 1)])
    assert bare.contexts[0] == expected[:81] + "Who?\nA. one\nB. two\nC. three\nAnswer:"


def test_examples_of_other_layouts() -> None:
    (question,) = questions_from([QUERY], examples=[CONTEXTS], shots=1, prompt="Go on: {}")
    assert question.contexts[0] == "Go on: The bag was full.\n\nGo on: Two and two is"
    first, second = questions_from([CONTEXTS, PAIR], examples=[QUERY], shots=1)
    assert first.contexts == ("Two and two is four.\n\nThe cup", "Two and two is four.\n\nThe bag")
    assert second.contexts == ("Two and two is four.\n\n",) * 2


def test_examples_that_cannot_be_shown() -> None:
    shown = [mmlu("Which?"), mmlu("When?")]
    for row in (mmlu("Which?"), mmlu("When?")):
        with pytest.raises(StreamlineError, match=r"row 0.*own examples"):
            questions_from([row], examples=shown, shots=2)
    assert questions_from([mmlu("When?")], examples=shown, shots=1)  # of which it is none
    with pytest.raises(StreamlineError, match=r"3 examples.*2.*Give"):
        questions_from([mmlu("Who?")], examples=shown, shots=3)
    with pytest.raises(StreamlineError, match=r"1 examples.*0"):
        questions_from([mmlu("Who?", subject="sums")], examples=shown, shots=1)
    for options in ({"shots": 1}, {"examples": shown}, {"examples": shown, "shots": -1}):
        with pytest.raises(StreamlineError, match="give both examples"):
            questions_from([mmlu("Who?")], **options)  # type: ignore[arg-type]
    with pytest.raises(StreamlineError, match=r"0 has.*-1\)"):
        questions_from([mmlu("Who?")], examples=[mmlu("Which?", -1)], shots=1)


def test_five_examples_of_each_subject(data_folder: Path) -> None:
    """The real file, whose five questions a subject are the examples of MMLU; here four of the fifth."""
    path = data_folder / "bench" / "mmlu_dev.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    questions = questions_from(rows[4::5], examples=path, shots=4)
    assert len(questions) == 57
    for row, question in zip(rows[4::5], questions, strict=True):
        context = question.contexts[0]
        assert context.count("Answer:") == 5 and context.endswith("\nAnswer:")
        assert context.index(f"about {row['subject'].replace('_', ' ')}.\n\n") < 80
        assert question.continuations == ("A", "B", "C", "D") and question.gold == row["gold"]
    with pytest.raises(StreamlineError, match=r"line 1.*own examples"):
        read_questions(path, examples=path, shots=5)


# Chance


def test_chance_of_choices_of_their_own() -> None:
    asked = [Question(("x",) * n, tuple(map(str, range(k, k + n))), 0) for k, n in enumerate((2, 4, 4))]
    assert chance(asked) == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)


def test_chance_of_the_same_choices_is_that_of_one_word() -> None:
    yes_or_no = [Question(("x",) * 2, ("no", "yes"), gold) for gold in (0, 1, 1, 1)]
    assert chance(yes_or_no) == 0.75  # what always saying yes would reach
    letters = questions_from([mmlu(f"{k}?", gold) for k, gold in enumerate((0, 1, 2, 2, 2))])
    assert chance(letters) == 0.6
    schemas = [Question(("x", "y"), ("z", "z"), gold) for gold in (0, 0, 0, 1)]
    assert chance(schemas) == 0.5


def test_no_chance_without_a_question() -> None:
    with pytest.raises(StreamlineError, match="no question"):
        chance([])
