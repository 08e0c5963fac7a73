"""Each layout against what it becomes, written out, and against the requests that lm-eval makes of the same rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.question_layouts import LAYOUTS, find_layout
from streamline_hooks.evaluation.questions import joined, questions_from

# As the hubs have them, with columns that are not read.
ARC = {
    "id": "1", "question": "What melts ice?", "choices": {"text": ["cold", "heat", "wind"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}  # fmt: skip
PIQA = {"goal": "How to dry a cup?", "sol1": "Use a towel.", "sol2": "Use a hose.", "label": 0}
HELLASWAG = {
    "ind": 4, "activity_label": "Removing ice", "ctx_a": "A man [header] How to stop [title] He waits.",
    "ctx_b": "then Bob", "ctx": "A man [header] How to stop [title] He waits. then Bob",
    "endings": ["[step] goes  home.", " sings.", "[substeps] Then [title] sleeps", "runs."], "label": "2",
    "source_id": "x", "split": "val", "split_type": "indomain",
}  # fmt: skip
BOOLQ = {"question": "is ice cold", "passage": "Ice -- Ice is frozen water.", "answer": True}
SUPER_GLUE = {"question": "is ice hot", "passage": "Ice is frozen water.", "idx": 3, "label": 0}
OPENBOOKQA = {
    "id": "7-1", "question_stem": "Ice melts when it is", "answerKey": "B ",
    "choices": {"text": ["cold", "warm", "dark", "blue"], "label": ["A", "B", "C", "D"]},
}  # fmt: skip
COMMONSENSE_QA = {
    "id": "9", "question": " Where is ice kept? ", "question_concept": "ice", "answerKey": "E",
    "choices": {"text": ["oven", "desk", "bed", "sea", "freezer"], "label": ["A", "B", "C", "D", "E"]},
}  # fmt: skip
WINOGRANDE = {
    "sentence": "The cup fell off the shelf because the _ was unsteady.", "option1": "cup", "option2": "shelf",
    "answer": "2",
}  # fmt: skip
COPA = {
    "premise": "The ice melted. ", "choice1": "The sun shone.", "choice2": "It snowed.", "question": "cause", "idx": 0,
    "label": 0,
}  # fmt: skip
EFFECT = {**COPA, "question": "effect", "label": 1}
MMLU = {"question": " Ice is ", "subject": "high_school_physics", "choices": ["wet", "dry", "hot", "old"], "answer": 1}

TABLE: list[tuple[str, Mapping[str, Any], tuple[str, ...], tuple[str, ...], int]] = [
    ("arc", ARC, ("Question: What melts ice?\nAnswer:",) * 3, ("cold", "heat", "wind"), 1),
    ("piqa", PIQA, ("Question: How to dry a cup?\nAnswer:",) * 2, ("Use a towel.", "Use a hose."), 0),
    (
        "hellaswag", HELLASWAG, ("Removing ice: A man How to stop. He waits. Then bob",) * 4,
        (" goes home.", "sings.", " Then. sleeps", "runs."), 2,
    ),
    ("hellaswag", {"ctx": "A man waits. he", "endings": ["goes.", "sings."], "label": 1}, ("A man waits. he",) * 2,
     ("goes.", "sings."), 1),
    ("boolq", BOOLQ, ("Ice -- Ice is frozen water.\nQuestion: is ice cold?\nAnswer:",) * 2, ("no", "yes"), 1),
    ("boolq", SUPER_GLUE, ("Ice is frozen water.\nQuestion: is ice hot?\nAnswer:",) * 2, ("no", "yes"), 0),
    ("openbookqa", OPENBOOKQA, ("Ice melts when it is",) * 4, ("cold", "warm", "dark", "blue"), 1),
    (
        "commonsense_qa", COMMONSENSE_QA,
        ("Question: Where is ice kept?\nA. oven\nB. desk\nC. bed\nD. sea\nE. freezer\nAnswer:",) * 5, tuple("ABCDE"), 4,
    ),
    (
        "winogrande", WINOGRANDE,
        ("The cup fell off the shelf because the cup", "The cup fell off the shelf because the shelf"),
        ("was unsteady.",) * 2, 1,
    ),
    ("copa", COPA, ("The ice melted because",) * 2, ("the sun shone.", "it snowed."), 0),
    ("copa", EFFECT, ("The ice melted therefore",) * 2, ("the sun shone.", "it snowed."), 1),
    (
        "mmlu", MMLU,
        ("The following are multiple choice questions (with answers) about high school physics.\n\n"
         "Ice is\nA. wet\nB. dry\nC. hot\nD. old\nAnswer:",) * 4,
        tuple("ABCD"), 1,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "contexts", "continuations", "gold"), TABLE)
def test_a_row_is_known_by_its_keys(
    name: str, row: Mapping[str, Any], contexts: tuple[str, ...], continuations: tuple[str, ...], gold: int
) -> None:
    assert find_layout(row, "row").name == name
    for layout in (None, name):
        (question,) = questions_from([row], layout)
        assert (question.contexts, question.continuations, question.gold) == (contexts, continuations, gold)


def test_every_layout_is_in_the_docstring() -> None:
    text = __import__(find_layout.__module__, fromlist=["x"]).__doc__
    for name, layout in LAYOUTS.items():
        row = text[text.index(f"\n{name} ") :]
        assert all(key in row for key in (*layout.keys, *layout.answers))


def test_a_layout_is_never_guessed() -> None:
    both = {**BOOLQ, **MMLU}  # a question with a passage, and one of a subject
    with pytest.raises(
        StreamlineError, match=r"row 0.*'mmlu' and 'boolq'.*layout='mmlu'",
    ):  # fmt: skip
        questions_from([both])
    assert questions_from([both], "mmlu")[0].continuations == tuple("ABCD")
    names = [layout.name for layout in LAYOUTS.values() if layout.fits(COMMONSENSE_QA)]
    assert names == ["arc", "commonsense_qa"]  # the keys of one are among the other's: the other it is
    for one in LAYOUTS.values():
        for other in LAYOUTS.values():  # else one of them could never be found by its keys
            assert one is other or set(one.keys) != set(other.keys) or not set(one.answers) & set(other.answers)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {**ARC, "answerKey": ""},
            r"row 0.*no answer.*answerKey ''.*Read the validation",
        ),
        ({**PIQA, "label": -1}, r"row 0.*no answer.*label -1"),
        ({**HELLASWAG, "label": ""}, r"row 0.*no answer.*label ''"),
        ({**SUPER_GLUE, "label": -1}, r"row 0.*no answer.*label -1"),
        ({**WINOGRANDE, "answer": ""}, r"row 0.*no answer.*answer ''"),
        ({**COPA, "label": None}, r"row 0.*no answer.*label None"),
        ({**MMLU, "answer": "-1"}, r"row 0.*no answer.*answer '-1'"),
        ({**BOOLQ, "label": 0}, r"row 0.*answer True and label 0.*Remove"),
        ({**ARC, "answerKey": "A"}, r"row 0.*answerKey 'A'.*3 choices.*expected"),
        ({**ARC, "choices": ["a", "b"]}, r'row 0.*"text" and "label".*expected arc'),
        ({**ARC, "choices": {"text": ["a", "b"], "label": ["A", "A"]}}, r"row 0.*\['A', 'A'\] for 2"),
        ({**ARC, "choices": {"text": ["a", "b"], "label": ["A"]}}, r"row 0.*\['A'\] for 2"),
        ({**ARC, "choices": {"text": "ab", "label": ["A", "B"]}}, r"row 0.*text 'ab'.*list of texts"),
        ({**PIQA, "sol2": None}, r"row 0.*two texts or more"),
        ({**PIQA, "label": 2}, r"row 0.*label 2.*2 choices"),
        ({**WINOGRANDE, "answer": "0"}, r"row 0.*answer '0'.*2 choices.*expected 1 or 2"),
        ({**WINOGRANDE, "answer": "3"}, r"row 0.*answer '3'.*2 choices.*expected 1 or 2"),
        ({**WINOGRANDE, "sentence": "No place."}, r"row 0.*0 places '_'.*one"),
        ({**WINOGRANDE, "sentence": "_ or _"}, r"row 0.*2 places '_'"),
        ({**WINOGRANDE, "sentence": "Here is the _"}, r"row 0.*two texts or more"),
        ({**COPA, "question": "why"}, r"row 0.*'why'.*'cause' nor 'effect'"),
        ({**BOOLQ, "answer": "maybe"}, r"row 0.*answer 'maybe'.*2 choices.*expected true or false, 1 or 0"),
        ({**BOOLQ, "passage": 3}, r"row 0.*passage 3.*no text.*expected boolq"),
        ({**MMLU, "answer": True}, r"row 0.*answer True.*4 choices"),
        ({**MMLU, "choices": ["x"] * 27}, r"row 0.*27 choices.*letters"),
        ({**MMLU, "subject": 3}, r"row 0.*subject 3.*no text"),
    ],
)
def test_what_a_row_cannot_have(row: Mapping[str, Any], text: str) -> None:
    with pytest.raises(StreamlineError, match=text):
        questions_from([row])


# Against lm-eval

TASKS: dict[str, tuple[str, list[Mapping[str, Any]]]] = {
    "arc": ("arc/arc_easy.yaml", [ARC]),
    "piqa": ("piqa/piqa.yaml", [PIQA]),
    "hellaswag": ("hellaswag/hellaswag.yaml", [HELLASWAG]),
    "boolq": ("super_glue/boolq/default.yaml", [SUPER_GLUE]),
    "openbookqa": ("openbookqa/openbookqa.yaml", [{**OPENBOOKQA, "answerKey": "B"}]),
    "commonsense_qa": ("commonsense_qa/default.yaml", [COMMONSENSE_QA]),
    "winogrande": ("winogrande/default.yaml", [WINOGRANDE, {**WINOGRANDE, "answer": "1"}]),
    "copa": ("super_glue/copa/default.yaml", [COPA, EFFECT]),
    "mmlu": ("mmlu/default/mmlu_high_school_physics.yaml", [MMLU, {**MMLU, "question": "Snow is", "answer": 3}]),
}


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("name", list(TASKS))
def test_what_is_scored_is_what_lm_eval_scores(name: str, shots: int) -> None:
    """Its own task files on the same rows; but for its second space before a choice that begins with one."""
    lm_eval = pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    from lm_eval.api.task import ConfigurableTask

    file, rows = TASKS[name]
    told = next(key for key in _FIRST_TEXT if key in rows[0])
    example = {**rows[0], told: "Other" + rows[0][told]}

    class Local(ConfigurableTask):
        def download(self, *args: Any, **kwargs: Any) -> None:
            splits = {"train": [example], "dev": [example], "validation": rows, "test": rows}
            self.dataset = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})

    changes = {"num_fewshot": shots, "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    task = Local(config={**_config(Path(lm_eval.__file__).parent / "tasks" / file), **changes})
    task.set_fewshot_seed(0)
    task.build_all_requests(rank=0, world_size=1)
    requests = [[text.replace("  ", " ") for text in instance.args] for instance in task.instances]
    questions = questions_from(rows, name, **({"examples": [example], "shots": 1} if shots else {}))  # type: ignore[arg-type]
    pairs = [pair for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]
    assert [joined(*pair) for pair in pairs] == [context + choice for context, choice in requests]
    assert [context for context, _ in pairs] == [context for context, _ in requests]
    for question, doc in zip(questions, task.eval_docs, strict=True):
        assert question.gold == _gold(task, doc)


_FIRST_TEXT = ("question_stem", "goal", "ctx_a", "passage", "sentence", "premise", "question")


def _gold(task: Any, doc: Any) -> int:
    if task.multiple_input:
        return int(task.doc_to_text(doc))
    target = task.doc_to_target(doc)
    return task.doc_to_choice(doc).index(target) if isinstance(target, str) else int(target)


def _config(path: Path) -> dict[str, Any]:
    """A task file of lm-eval with what it includes, and the functions that it names."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: Any, node: Any) -> Any:
        stem, name = loader.construct_scalar(node).rsplit(".", 1)
        return getattr(_module(path.parent / f"{stem}.py"), name)

    Loader.add_constructor("!function", function)
    config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    included = config.pop("include", None)
    return {**(_config(path.parent / included) if included else {}), **config}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
