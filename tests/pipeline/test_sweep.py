"""Many compressed models of one: the front, what is kept, and that the original is left alone."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import LinearConfig, StreamlineError, UnsupportedSurgery, compress, sweep
from streamline_hooks.data import PARTS, PackedText, TokenSplit
from streamline_hooks.evaluation import TaskSettings, task_config_from_rows
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import SpeedConfig
from streamline_hooks.pipeline.sweep import Sweep, SweepPoint
from streamline_hooks.repair import NoneConfig
from streamline_hooks.selection import CRITERIA, Criterion, accuracy_drop, combine_criteria
from tests.configured import configured
from tests.evaluation.number_tasks import Numbers, number_tokenizer
from tests.logs import logged
from tests.tiny_models import tiny_model

SETTINGS: dict[str, Any] = {
    "calibration_tokens": 1024,
    "validation_tokens": 256,
    "test_tokens": 256,
    "sequence_length": 64,
    "shortlist": 2,
}


class Sevens(Numbers):
    """Reads an 8 where there is a 7."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return super().__call__(text.replace("7", "8"), add_special_tokens)


def point(loss: float | None, size: float | None, kind: str = "none") -> SweepPoint:
    return SweepPoint("1", kind, perplexity_ratio=loss, parameters_ratio=size)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12))
def test_nobody_on_the_front_is_beaten_and_all_others_are(pairs: list[tuple[int, int]]) -> None:
    """Neither by another point nor by the original, which keeps all of its parameters and its perplexity."""
    points = tuple(point(loss / 4, size / 8, str(k)) for k, (loss, size) in enumerate(pairs))
    front = Sweep(points).front()

    def beaten(mine: tuple[int, int]) -> bool:
        return any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in [*pairs, (4, 8)])

    assert [p.kind for p in front] == [str(k) for k, pair in enumerate(pairs) if not beaten(pair)]


def test_a_point_worse_than_the_original_is_on_no_front() -> None:
    worse = SweepPoint("1", "block", perplexity_ratio=1.2, parameters_ratio=1.1, prefill_ratio=1.05, decode_ratio=1.3)
    found = Sweep((worse, point(1.1, 0.9)))
    assert found.front() == [found.points[1]] and found.front("prefill") == found.front("decode") == []
    assert [row["front"] for row in found.report()["points"]] == [[], ["size"]]
    assert [line for line in found.table().splitlines() if " *" in line] == [found.table().splitlines()[2]]


def test_points_without_a_number_are_on_no_front() -> None:
    points = (point(None, None), point(1.5, 0.8), point(math.inf, 0.1), point(1.2, None))
    assert Sweep(points).front() == [points[1]]
    assert Sweep(points).front("decode") == []
    with pytest.raises(StreamlineError, match=r"by='weight'.*Expected"):
        Sweep(points).front("weight")


@pytest.fixture(scope="module")
def swept(stories: tuple[Any, Any], story_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = tmp_path_factory.mktemp("sweep") / "sweep.json"
    with logged() as messages:
        found = sweep(
            model,
            story_texts,
            configured(**SETTINGS),
            tokenizer=tokenizer,
            remove=[1, 0.4],
            repair=KINDS,
            cache_file=file,
            speed=SpeedConfig(prompt_tokens=16, repeats=2),
        )
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    return model, tokenizer, found, file, messages


def test_a_point_is_what_compress_gives(swept: Any, story_texts: list[str]) -> None:
    model, tokenizer, found, _, _ = swept
    assert [(p.remove, p.kind) for p in found.points] == [
        ("1", "none"), ("1", "linear"), ("0.4", "none"), ("0.4", "linear"),
    ]  # fmt: skip
    alone = compress(
        copy.deepcopy(model), story_texts, configured(remove=0.4, repair="linear", **SETTINGS), tokenizer=tokenizer
    )
    last = found.points[3]
    assert last.perplexity_ratio == pytest.approx(alone.perplexities["repaired"] / alone.perplexities["original"])
    assert last.parameters_ratio == alone.parameters[1] / alone.parameters[0]
    assert last.blocks_text == alone.candidates[0].blocks_text
    assert all(p.prefill_ratio > 0 and p.decode_ratio > 0 for p in found.points)


def test_it_is_told_in_three_ways(swept: Any) -> None:
    found = swept[2]
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [float(row["perplexity_ratio"]) for row in rows] == [p.perplexity_ratio for p in found.points]
    assert [("size" in row["front"].split()) for row in rows] == [p in found.front() for p in found.points]
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert [row["kind"] for row in report["points"]] == ["none", "linear", "none", "linear"]
    lines = found.table().splitlines()
    assert len(lines) == 5 and lines[0].startswith("kind") and any(" *" in line for line in lines)


def test_what_is_known_is_not_made_again(swept: Any, story_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, found, file, _ = swept

    def fails(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("compressed again")

    monkeypatch.setattr(sys.modules["streamline_hooks.pipeline.sweep"], "compress", fails)
    options: dict[str, Any] = {"cache_file": file, "speed": SpeedConfig(prompt_tokens=16, repeats=2)}
    config = configured(**SETTINGS)
    again = sweep(model, story_texts, config, tokenizer=tokenizer, remove=[0.4, 1], repair=[LinearConfig()], **options)
    assert again.points == (found.points[3], found.points[1])
    one: dict[str, Any] = {"remove": [1], "repair": [LinearConfig()], **options}
    for other, changed in (
        (configured(config, shortlist=1), one),
        (config, one | {"speed": SpeedConfig(prompt_tokens=16, repeats=3)}),
    ):
        with pytest.raises(AssertionError, match="compressed again"):
            sweep(model, story_texts, other, tokenizer=tokenizer, **changed)
    with pytest.raises(AssertionError, match="compressed again"):
        sweep(model, story_texts[1:], config, tokenizer=tokenizer, **one)


class Counted:
    """Stands for `compress`: each time it is another model that comes out."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *args: Any, **settings: Any) -> Any:
        self.times += 1
        raise UnsupportedSurgery(f"time {self.times}")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    replacement_module = Counted()
    monkeypatch.setattr(sys.modules["streamline_hooks.pipeline.sweep"], "compress", replacement_module)
    return replacement_module


KINDS = [NoneConfig(), LinearConfig()]


def random_split() -> TokenSplit:
    generator = torch.Generator().manual_seed(0)
    return TokenSplit(*(torch.randint(3, 60, (n, 16), generator=generator) for n in (8, 4, 4)), fingerprint="x")


MODEL = tiny_model("llama")
ONE_POINT: dict[str, Any] = {"remove": [1], "repair": [NoneConfig()], "speed": None}
ROWS = [{"query": "4 5", "choices": ["6 7", "8 9"], "gold": k % 2} for k in range(3)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"task": Task("embedding", "mean")}, {"task": Task("embedding", "last")}),
        ({"criterion": {"cosine": 2.0}}, {"criterion": {"cosine": 2.0000001}}),
        ({"criterion": "cosine"}, {"criterion": "kl"}),
        ({"seed": 0}, {"seed": 1}),
        ({"batch_size": 2}, {"batch_size": 3}),
    ],
)
def test_what_was_set_otherwise_is_made_anew(
    one: dict[str, Any], other: dict[str, Any], counted: Counted, tmp_path: Path
) -> None:
    def made(settings: dict[str, Any]) -> str:
        config = configured(**settings)
        return (
            sweep(MODEL, random_split(), config, tokenizer=Numbers(), cache_file=tmp_path / "x", **ONE_POINT)
            .points[0]
            .refused
        )

    assert [made(one), made(other), made(copy.copy(one)), made(other)] == ["time 1", "time 2", "time 1", "time 2"]


@pytest.mark.parametrize(
    "criterion",
    ["mine", {"cosine": 1.0, "mine": 1.0}, {"angular": 1.0, "both": 1.0}],
    ids=["alone", "combined", "nested"],
)
@pytest.mark.parametrize(
    "other",
    [(ROWS[1:], None, "1"), (ROWS, TaskSettings(add_bos=True), "1"), (ROWS, None, "3")],
    ids=["other questions", "another token", "another tokenizer"],
)
def test_a_criterion_is_known_by_the_data_that_it_holds(
    criterion: Any, other: Any, counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its name alone, under which another session may have registered one with other questions."""

    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")

    def made(data: Any) -> str:
        rows, settings, bos = data
        one = accuracy_drop(task_config_from_rows(rows, "mine"), number_tokenizer(bos), settings)
        monkeypatch.setitem(CRITERIA, "mine", replace(one, name="mine"))
        monkeypatch.setitem(CRITERIA, "both", replace(combine_criteria({"mine": 1.0, "cosine": 1.0}), name="both"))
        config = configured(criterion=criterion)
        return (
            sweep(MODEL, random_split(), config, tokenizer=Numbers(), cache_file=tmp_path / "x", **ONE_POINT)
            .points[0]
            .refused
        )

    first = (ROWS, None, "1")
    assert [made(first), made(other), made(first), made(other)] == ["time 1", "time 2", "time 1", "time 2"]


def test_a_criterion_is_known_by_its_source(counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(profile: Any, window: range, sign: int = 1) -> float:
        return float(window.start) * sign

    def last(profile: Any, window: range) -> float:
        return -float(window.start)

    def refused(score: Any) -> str:
        monkeypatch.setitem(CRITERIA, "mine", Criterion("mine", score, "profile"))
        options = {"tokenizer": Numbers(), "cache_file": tmp_path / "x", **ONE_POINT}
        return sweep(MODEL, random_split(), configured(criterion="mine"), **options).points[0].refused

    class Weighted:
        def __init__(self, weight: float) -> None:
            self.weight = weight

        def __call__(self, profile: Any, window: range) -> float:
            return self.weight * window.start

    last.__name__ = last.__qualname__ = first.__qualname__  # the function was edited
    scores = (first, last, first, last, partial(first, sign=2), partial(first, sign=3), partial(first, sign=2))
    assert [refused(score) for score in scores] == [f"time {k}" for k in (1, 2, 1, 2, 3, 4, 3)]

    def enclosing(weight: float) -> Any:
        return lambda profile, window: first(profile, window) * weight

    def with_default(weight: float) -> Any:
        return lambda profile, window, weight=weight: first(profile, window) * weight

    number = 4
    for make in (Weighted, enclosing, with_default):
        expected = [f"time {number + 1}", f"time {number + 2}", f"time {number + 1}"]
        assert [refused(make(weight)) for weight in (1.0, 2.0, 1.0)] == expected
        number += 2


def test_another_tokenizer_or_autocast_makes_it_anew(counted: Counted, tmp_path: Path) -> None:
    options: dict[str, Any] = {**ONE_POINT, "cache_file": tmp_path / "x"}
    for texts in (["1 4", "7 2"], ["1 4", "3 2"]):
        before = counted.times
        for tokenizer in (Numbers(), Sevens()):
            sweep(MODEL, texts, tokenizer=tokenizer, **options)
        assert counted.times - before == (2 if "7 2" in texts else 1), "what reads these texts alike is as good"
    before = counted.times
    with torch.autocast("cpu", torch.bfloat16):
        sweep(MODEL, texts, tokenizer=Numbers(), **options)
    assert counted.times == before + 1


@pytest.mark.parametrize(("speed", "times"), [(SpeedConfig(), 2), (None, 1)], ids=["timed", "not timed"])
def test_times_of_another_device_are_not_reused(
    speed: SpeedConfig | None, times: int, counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {**ONE_POINT, "speed": speed, "cache_file": tmp_path / "x", "tokenizer": Numbers()}
    for processor in ("one", "other", "one"):
        monkeypatch.setattr("platform.processor", lambda processor=processor: processor)
        sweep(MODEL, random_split(), **options)
    assert counted.times == times


def test_a_refusal_is_a_point_too(swept: Any, story_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a surgery; what was asked for wrongly is an error."""
    model, tokenizer, *_ = swept

    def refuses(model: Any, data: Any, config: Any, **more: Any) -> Any:
        if config.repair.kind == "linear":
            raise UnsupportedSurgery("block 0 owns the position bias")
        return compress(model, data, config, **more)

    monkeypatch.setattr(sys.modules["streamline_hooks.pipeline.sweep"], "compress", refuses)
    config = configured(**SETTINGS)
    found = sweep(model, story_texts, config, tokenizer=tokenizer, remove=[1], repair=KINDS[::-1], speed=None)
    refused, made = found.points
    assert refused.refused == "block 0 owns the position bias" and refused.perplexity_ratio is None
    assert made.perplexity_ratio is not None and made.prefill_ratio is None
    assert refused.refused in found.table() and found.front() == [made]
    with pytest.raises(StreamlineError, match="7"):
        sweep(model, story_texts, config, tokenizer=tokenizer, remove=[7], repair=[NoneConfig()], speed=None)


def packed(seed: int) -> dict[str, PackedText]:
    positions = torch.arange(16).expand(8, 16)
    return {
        name: PackedText(torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(seed)), positions, 8, 0)
        for name in PARTS
    }


def test_packed_text_is_told_by_what_it_holds(counted: Counted, tmp_path: Path) -> None:
    """A mapping of parts has the same keys whatever is in them."""
    for seed, times in ((0, 1), (1, 2), (0, 2)):
        sweep(MODEL, packed(seed), tokenizer=Numbers(), cache_file=tmp_path / "x", **ONE_POINT)
        assert counted.times == times
    other = {name: PackedText(part.input_ids, part.position_ids % 8, 16, 0) for name, part in packed(0).items()}
    sweep(MODEL, other, tokenizer=Numbers(), cache_file=tmp_path / "x", **ONE_POINT)
    assert counted.times == 3, "the same tokens are other documents"


def test_what_cannot_be_swept(swept: Any, story_texts: list[str]) -> None:
    model, tokenizer, *_ = swept
    with pytest.raises(StreamlineError, match=r"0 targets.*1 replacements.*Expected"):
        sweep(model, story_texts, tokenizer=tokenizer, remove=[], repair=[NoneConfig()])
    with pytest.raises(StreamlineError, match=r"\(0\).*Expected"):
        sweep(model, {"calibration": [], "validation": [], "test": []}, remove=[1], repair=[NoneConfig()])  # type: ignore[arg-type]
    with pytest.raises(StreamlineError, match="remove=0 "):
        sweep(model, story_texts, tokenizer=tokenizer, remove=[1, 0], repair=[NoneConfig()])
