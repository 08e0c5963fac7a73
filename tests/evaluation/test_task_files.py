"""Files in the layouts of well-known benchmarks, against lm-eval's own tasks of the same rows."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import TaskSettings, run_tasks, task_config_from_file, task_config_from_rows
from streamline_hooks.evaluation.lm_eval_tasks import load_tasks
from streamline_hooks.evaluation.task_files import ROW_LAYOUTS

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")

ARC = {"question": "What melts ice?", "choices": {"text": ["heat", "cold"], "label": ["A", "B"]}, "answerKey": "B"}
MMLU = {"subject": "high_school_physics", "question": " Warm? ", "choices": ["ice", "fire", "snow"], "answer": 1}
ABOUT = "The following are multiple choice questions (with answers) about high school physics.\n\n"
COPA = {"premise": "He fell. ", "choice1": "It was icy.", "choice2": "He sang.", "question": "cause", "label": 0}
WINOGRANDE = {"sentence": "The cup hit the jug, so the _ broke.", "option1": "cup", "option2": "jug", "answer": "2"}
HELLASWAG = {
    "ctx_a": "[header] How to rest [title] Sit.", "ctx_b": "then you", "activity_label": "Home", "ind": 4, "ctx": "x",
    "endings": ["[step] sleep  well", "run"], "label": "1",
}  # fmt: skip
LETTERED = "Question: What melts ice?\nA. heat\nB. cold\nAnswer:"

# Rows, and of each choice the context and the continuation, and the number of the right one.
READ: dict[str, tuple[dict[str, Any], list[tuple[str, str]], int]] = {
    "query": ({"query": "7", "choices": ["a", "b"], "gold": 1}, [("7", " a"), ("7", " b")], 1),
    "contexts": (
        {"context_options": ["The cup", "The jug"], "continuation": "broke.", "gold": 1},
        [("The cup", " broke."), ("The jug", " broke.")], 1,
    ),
    "minimal_pairs": (
        {"sentence_good": "It is.", "sentence_bad": "It are.", "UID": "x"}, [("", " It is."), ("", " It are.")], 0,
    ),
    "mmlu": (
        MMLU, [(f"{ABOUT}Warm?\nA. ice\nB. fire\nC. snow\nAnswer:", f" {letter}") for letter in "ABC"], 1,
    ),
    "arc": (ARC, [("Question: What melts ice?\nAnswer:", " heat"), ("Question: What melts ice?\nAnswer:", " cold")], 1),
    "commonsense_qa": (ARC | {"question_concept": "ice"}, [(LETTERED, " A"), (LETTERED, " B")], 1),
    "openbookqa": (
        {"question_stem": "Ice is", "choices": ARC["choices"], "answerKey": "A "},
        [("Ice is", " heat"), ("Ice is", " cold")], 0,
    ),
    "piqa": (
        {"goal": "Dry a cup", "sol1": "wipe", "sol2": "soak", "label": 0},
        [("Question: Dry a cup\nAnswer:", " wipe"), ("Question: Dry a cup\nAnswer:", " soak")], 0,
    ),
    "hellaswag": (
        HELLASWAG, [("Home: How to rest. Sit. Then you", f" {ending}") for ending in (" sleep well", "run")], 1,
    ),
    "boolq": (
        {"passage": "Ice is cold.", "question": "is ice warm", "answer": False},
        [("Ice is cold.\nQuestion: is ice warm?\nAnswer:", f" {answer}") for answer in ("no", "yes")], 0,
    ),
    "winogrande": (
        WINOGRANDE, [("The cup hit the jug, so the cup", " broke."), ("The cup hit the jug, so the jug", " broke.")], 1,
    ),
    "copa": (COPA, [("He fell because", "  it was icy."), ("He fell because", "  he sang.")], 0),
}  # fmt: skip


def requests_of(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What lm-eval asks of the first row."""
    from lm_eval.tasks import TaskManager

    (task,) = TaskManager(include_defaults=False).load([config])["tasks"].values()
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=1, rank=0, world_size=1)
    return [tuple(instance.args) for instance in task.instances]


@pytest.mark.parametrize("name", READ)
def test_each_layout_is_asked_as_lm_evals_own_task(name: str, stories: tuple[Any, Any]) -> None:
    row, expected, gold = READ[name]
    config = task_config_from_rows([row], "mine")
    assert requests_of(config) == expected
    result = run_tasks(*stories, [config])["mine"]
    right = max(range(len(expected)), key=lambda k: result.loglikelihoods[0][k]) == gold
    assert result.metric == "acc" and result.scores == (float(right),)


def test_a_few_layouts_by_other_keys(stories: tuple[Any, Any]) -> None:
    boolq, hellaswag = READ["boolq"][0], HELLASWAG
    same = [
        (boolq, {**{k: boolq[k] for k in ("passage", "question")}, "label": 0}),
        (MMLU, {**{k: MMLU[k] for k in ("subject", "question", "choices")}, "gold": 1}),
    ]
    for one, other in same:
        assert requests_of(task_config_from_rows([one], "a")) == requests_of(task_config_from_rows([other], "b"))
    short = {"ctx": "A [title] b", "endings": hellaswag["endings"], "label": 1}
    assert requests_of(task_config_from_rows([short], "a"))[1] == ("A. b", " run")
    ends = run_tasks(
        *stories, [task_config_from_rows([{"context": "Once upon a", "continuation": "time"}] * 2, "ends")]
    )
    assert ends["ends"].generates and ends["ends"].scores == (1.0, 1.0) and ends["ends"].chance == 0.0
    assert ends["ends"].metrics["ends"]["perplexity"][0] > 1


def test_every_layout_is_tested() -> None:
    assert set(READ) | {"last_words"} == {name for name in ROW_LAYOUTS if "," not in name}


def arc(row: dict[str, Any]) -> dict[str, Any]:
    labels = list("ABCDE")[: len(row["choices"])]
    choices = {"text": row["choices"], "label": labels}
    return {"question": row["query"], "choices": choices, "answerKey": labels[row["gold"]]}


def piqa(row: dict[str, Any]) -> dict[str, Any]:
    return {"goal": row["query"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


PUBLISHED = {"arc_easy": arc, "piqa": piqa}


@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "piqa", "blimp"])
def test_a_file_gives_the_accuracy_of_a_task_file(
    name: str, stories: tuple[Any, Any], data_folder: Path, tmp_path: Path
) -> None:
    """That of the data set's task file for lm-eval, in the layout in which the data set is published."""
    (text,) = [p.read_text() for p in (data_folder / "lm_eval_tasks").glob(f"{name}*.yaml")]
    bench = data_folder / "bench"
    if name == "blimp":
        with zipfile.ZipFile(bench / "blimp.zip") as archive:
            raw = archive.read("data/anaphor_number_agreement.jsonl")
    else:
        path = next(bench.glob(f"{name}*"))
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in raw.splitlines()[:60]]
    rows = [row for row in rows if len(json.dumps(row)) < 900]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for old in (
        "bench/arc_easy.jsonl",
        "bench/hellaswag_val.jsonl.gz",
        "bench/piqa.jsonl",
        "blimp/data/anaphor_number_agreement.jsonl",
    ):
        text = text.replace(old, str(data))
    (tmp_path / "task.yaml").write_text(text.replace("dataset_kwargs:", f"dataset_kwargs:\n  cache_dir: {tmp_path}"))
    made = tmp_path / f"{name}.jsonl"
    made.write_text("\n".join(json.dumps(PUBLISHED.get(name, dict)(row)) for row in rows))
    found = run_tasks(*stories, [str(made), str(tmp_path / "task.yaml")])
    ours, theirs = found[name], next(result for other, result in found.items() if other != name)
    assert len(ours.scores) == len(rows) and 0 < ours.accuracy < 1
    assert ours.scores == theirs.scores and ours.loglikelihoods == theirs.loglikelihoods
    assert next(iter(ours.metrics.values())) == next(iter(theirs.metrics.values()))


def test_a_data_set_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load_dataset(*args: str, split: str) -> Any:
        calls.append((*args, split))
        if args[0] == "absent":
            raise ConnectionError("no network")
        return [ARC]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert task_config_from_file("hub:allenai/ai2_arc:ARC-Easy:validation")["task"] == "ai2_arc-ARC-Easy"
    assert task_config_from_file("hub:baber/piqa:test")["task"] == "piqa"
    assert calls == [("allenai/ai2_arc", "ARC-Easy", "validation"), ("baber/piqa", "test")]
    with pytest.raises(StreamlineError, match=r"'hub:absent:test'.*\(ConnectionError"):
        task_config_from_file("hub:absent:test")
    for wrong in ("hub:", "hub:x", "hub:x:", "hub:a:b:c:d"):
        with pytest.raises(StreamlineError, match=r"split of a data set.*Expected hub:NAME:SPLIT"):
            task_config_from_file(wrong)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "Once"}], r"mine: the fields text.*one of: query \(query, choices, gold\).*Rename"),
        ([ARC, {"question": "x"}], r"row 1 lacks choices, answerKey"),
        ([ARC, ARC | {"answerKey": ""}], r"row 1 has answerKey=''.*validation split"),
        ([READ["piqa"][0] | {"label": -1}], r"row 0 has label=-1"),
        (
            [{"query": "x", "choices": ["a"], "gold": 0}, {"query": "x", "choices": "a", "gold": 0}],
            "values of different types",
        ),
    ],
)
def test_rows_that_make_no_task(rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(StreamlineError, match=says):
        task_config_from_rows(rows, "mine")


@pytest.mark.parametrize(("right", "gold"), [(0, 2), ("a", "a third")])
def test_an_answer_that_is_no_choice_is_not_counted_as_wrong(right: Any, gold: Any, stories: tuple[Any, Any]) -> None:
    rows = [{"query": "x", "choices": ["a", "b"], "gold": one} for one in (right, gold)]
    with pytest.raises(StreamlineError, match=rf"mine: the answer of item 1 is {gold!r}.*2 choices"):
        run_tasks(*stories, [task_config_from_rows(rows, "mine")], TaskSettings())


def test_a_pair_of_files_of_one_name(tmp_path: Path, stories: tuple[Any, Any]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.jsonl").write_text(json.dumps(ARC))
    with pytest.raises(StreamlineError, match=r"Two tasks are named 'mine'.*Rename"):
        run_tasks(*stories, [str(tmp_path / folder / "mine.jsonl") for folder in ("a", "b")])


@pytest.mark.parametrize(
    "answers", [(True, False), ("true", "false"), ("yes", "no"), (" Yes", "NO "), (1, 0), ("1", "0")], ids=str
)
def test_answers_of_yes_and_no_may_be_written_in_words(answers: tuple[Any, Any]) -> None:
    rows = [{"passage": "Ice is cold.", "question": "is ice cold", "answer": answer} for answer in answers]
    (task,) = load_tasks([task_config_from_rows(rows, "mine")], TaskSettings())["mine"].tasks.values()
    assert [int(task.doc_to_target(row)) for row in task.eval_docs] == [1, 0]


def test_other_answers_than_yes_and_no_are_refused() -> None:
    rows = [{"passage": "Ice is cold.", "question": "is ice cold", "answer": "perhaps"}]
    with pytest.raises(StreamlineError, match=r"mine: row 0 has the answer 'perhaps'.*Expected true or false"):
        task_config_from_rows(rows, "mine")
