"""The page as text: self-contained, well formed, escaped, whole, the same every time, and with the right numbers."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.pipeline.plots import Plot
from streamline_hooks.pipeline.report import write_report
from streamline_hooks.pipeline.report_formatting import (
    DASH,
    SPACE,
    blocks_text,
    branches_of_report,
    number,
    removed_windows,
)
from tests.pipeline import example
from tests.pipeline.reading import Reader

EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\ud800"
EARLIER = sorted(Path(__file__).parents[1].glob("checkpoint/earlier/*/report.json"))
SECTIONS = [
    "What was removed", "Warnings", "Training", "Perplexity", "Tasks", "Agreement", "Generations", "Size and speed",
    "Trade-off", "How it was made",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and is tested elsewhere."""
    monkeypatch.setattr(Plot, "svg", lambda self, width: f'<svg class="{width}"></svg>')


def read(folder: Path, **said: Any) -> Reader:
    options = {"command": example.COMMAND, "title": "A model", **said}
    return Reader(write_report(folder, **options).read_text(encoding="utf-8"))


def full() -> dict[str, Any]:
    return {"compression": example.compression(), "evaluation": example.evaluation(), "sweep": example.sweep()}


def test_the_page_loads_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with its figures
    reader = read(tmp_path, **full())
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "img"}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "href", "xlink:href"):
            if name in attributes:
                assert str(attributes[name]).startswith("data:image/png;base64," if tag == "image" else "#")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"url\([^#]|@import|https?:", page)
    policy = next(a["content"] for t, a in reader.tags if t == "meta" and a.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'")
    pictures = [attributes for tag, attributes in reader.tags if tag == "svg"]
    assert len(pictures) == 12 and all(svg["role"] == "img" for svg in pictures)
    titles = [id for svg in pictures for id in str(svg["aria-labelledby"]).split()]
    assert set(titles) <= set(reader.ids()) and len(reader.ids()) == len(set(reader.ids()))
    assert all(len(data) > 30 for tag, data in reader.texts if tag == "desc")


def test_every_section_is_there_and_linked(tmp_path: Path) -> None:
    reader = read(tmp_path, **full())
    assert reader.headings() == SECTIONS
    links = [str(a["href"])[1:] for tag, a in reader.tags if tag == "a"]
    assert len(links) == len(SECTIONS) and set(links) <= set(reader.ids())
    assert sum(tag == "caption" for tag, _ in reader.tags) == sum(tag == "table" for tag, _ in reader.tags)


@pytest.mark.parametrize(
    ("said", "headings"),
    [
        ({"compression": {"perplexity": {"original": 1.0}}}, ["Perplexity", "How it was made"]),
        ({"evaluation": {"model": "a", "accuracy": {"t": {"value": 0.5}}}}, ["Tasks", "How it was made"]),
        ({"evaluation": {"samples": [{"prompt": "a", "text": "b", "reference": None}]}},
         ["Generations", "How it was made"]),
        ({"evaluation": {"parameters": 5, "bytes": 20}}, ["Size and speed", "How it was made"]),
        ({"sweep": example.sweep()}, ["Trade-off", "How it was made"]),
        ({"compression": {**example.compression(), "training": None}},
         ["What was removed", "Warnings", "Perplexity", "Generations", "Size and speed", "How it was made"]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[0],
)  # fmt: skip
def test_what_is_missing_is_left_out_whole(tmp_path: Path, said: dict[str, Any], headings: list[str]) -> None:
    reader = read(tmp_path, **said)
    assert reader.headings() == headings
    assert all(rows and all(any(cell for cell in row) for row in rows) for rows in reader.tables.values())


@pytest.mark.parametrize(
    "section", [*example.evaluation(), *(f"original.{name}" for name in example.evaluation()["original"])]
)
def test_any_section_of_an_evaluation_may_be_absent(tmp_path: Path, section: str) -> None:
    said = example.evaluation()
    *outer, name = section.split(".")
    (said["original"] if outer else said).pop(name)
    read(tmp_path, evaluation=said)


@pytest.mark.parametrize("section", [*example.compression()])
def test_any_part_of_a_compression_may_be_absent(tmp_path: Path, section: str) -> None:
    said = example.compression()
    said.pop(section)
    read(tmp_path, compression=said)


def without_numbers(value: Any, nothing: float | None) -> Any:
    """Every float made a nothing; counts and texts stay."""
    if isinstance(value, dict):
        return {name: without_numbers(one, nothing) for name, one in value.items()}
    if isinstance(value, list):
        return [without_numbers(one, nothing) for one in value]
    return nothing if isinstance(value, float) else value


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_dash_everywhere(tmp_path: Path, nothing: float | None) -> None:
    said = without_numbers(full(), nothing)
    reader = read(tmp_path, **said)
    words = set(re.findall(r"[a-zA-Z]+", reader.text))
    assert not words & {"nan", "NaN", "inf", "None", "null", "infinity"}
    assert all(row[2:] == ["–"] * 4 for row in reader.tables["Perplexity by domain"][1:])
    assert [row[1:] for row in reader.tables["Speed"][1:]] == [["–", "– to –", "–", "–", "– to –", "–"]] * 4


def cells(reader: Reader, table: str, row: str) -> dict[str, str]:
    head, *rows = reader.tables[table]
    return dict(zip(head, next(r for r in rows if r[0] == row), strict=True))


def test_tables_hold_the_numbers_under_their_heads(tmp_path: Path) -> None:
    said = full()
    reader = read(tmp_path, **said)
    evaluation = said["evaluation"]
    own, other = evaluation["perplexity"]["peps"], evaluation["original"]["perplexity"]["peps"]
    assert cells(reader, "Perplexity by domain", "peps") == {
        "domain": "peps", "tokens": "40,960", "bits/byte": f"{own['bits_per_byte']:.3f}",
        "this model": f"{own['value']:.2f}", "original": f"{other['value']:.2f}",
        f"×{SPACE}original": f"{own['value'] / other['value']:.2f}",
    }  # fmt: skip
    assert cells(reader, "Tasks, ± one standard error", "piqa") == {
        "task": "piqa", "metric": "accuracy", "items": "700", "chance": "0.5000", "original": "0.7400 ± 0.0190",
        "this model": "0.6500 ± 0.0190",
    }  # fmt: skip
    assert cells(reader, "Candidates", "12–19") == {
        "blocks": "12–19", "score of the search": "0.9200", "relative error, removed": "0.4100",
        "relative error, repaired": "0.1700", "ridge": "0.0001", "KL (nats per token)": "0.5800",
        "reason for refusal": "",
    }  # fmt: skip
    assert cells(reader, "Candidates", "0–7")["reason for refusal"].startswith("block 0 owns")
    assert [row[0] for row in reader.tables["Candidates"] if "chosen" in row[0]] == [
        "2–9, attention of 28, mlp of 28, chosen"
    ]
    assert cells(reader, "Size", "parameters (M)") == {
        "": "parameters (M)", "original": "134.5", "this model": "106.5", "change": f"−20.8{SPACE}%",
    }  # fmt: skip
    timed = evaluation["speed"]["timings"]["build/smollm2"]["decode"]
    got = cells(reader, "Speed", "build/smollm2, further token")
    assert got["time (ms)"] == f"{1e3 * sorted(timed)[3]:.1f}" and got["tokens/s"] == f"{1 / sorted(timed)[3]:.1f}"
    assert (got[f"×{SPACE}first"], got["quartiles (×)"]) == ("0.781", "0.770 to 0.800")
    assert ["KL, 99 % quantile (nats)", "2.9000"] in reader.tables["Agreement with the original"]
    assert ["same most likely token (%)", "74.1"] in reader.tables["Agreement with the original"]
    assert ["repeated 4-grams (%)", "9.4", "18.3"] in reader.tables["Generated text"]
    left = reader.tables["Relative accuracy, with its interval"]
    assert ["classification", "89.0 (86.0 to 92.0)", "73.0 (65.0 to 81.0)"] in left
    assert ["all", "2,067"] in reader.tables["Time of the compression"]
    assert ["all", "352.6"] in reader.tables["Time of the evaluation"]
    points = reader.tables["All points"]
    assert ["9", "linear, 8", "3-10", "8", "1.453", "79.2", "0.768", "0.792", "size", ""] in points
    assert ["16", "linear, 29", "", "–", "–", "–", "–", "–", "", "one block must stay"] in points
    assert ["both right or both wrong, piqa (%)", "87.1"] in reader.tables["Agreement with the original"]
    copa = ["copa", "acc, 0-shot, version 1.0", "100", "–", "0.7500", "0.7100 ± 0.0456"]
    assert copa in reader.tables["Tasks, ± one standard error"]
    assert ["KL, peps (nats per token)", "0.3500"] in reader.tables["Agreement with the original"]
    assert ["fingerprint", "5d8c1c2a0e6f4b7a"] in reader.tables["Settings and data"]


@pytest.mark.parametrize(("measured", "error", "reached"), [(0.76, "−2.6%", "yes"), (0.82, "+5.1%", "no")])
def test_a_target_has_what_was_predicted_and_measured(
    tmp_path: Path, measured: float, error: str, reached: str
) -> None:
    report = example.compression()
    report["target"]["measured"] = measured
    assert cells(read(tmp_path, compression=report), "Target", "latency:0.8") == {
        "target": "latency:0.8", "original": "1.000 of the time", "predicted": "0.780 of the time",
        "measured": f"{measured:.3f} of the time", "relative error": error, "reached": reached,
    }  # fmt: skip
    report["target"] = None  # a number of blocks
    assert "Target" not in read(tmp_path, compression=report).tables


def test_a_bound_on_the_losses_is_stated_where_there_is_one(tmp_path: Path) -> None:
    report = example.compression(8, ((2, 4),))
    assert (
        "Bounded losses, with probability 0.95: expected top-1 disagreement" in read(tmp_path, compression=report).text
    )
    report["bounded"] = None
    assert "Bounded losses" not in read(tmp_path, compression=report).text


def test_what_the_compression_measured_beside_it_is_told_unless_there_is_an_evaluation_of_it(tmp_path: Path) -> None:
    said = full()
    said["compression"]["speed"] = said["evaluation"].pop("speed")
    alone = read(tmp_path, compression=said["compression"])
    assert " iterate." in [data for _, data in alone.texts] and len(alone.tables["Speed"]) == 5
    both = read(tmp_path, **said)
    assert " iterate." not in [data for _, data in both.texts] and len(both.tables["Speed"]) == 5


def test_where_no_task_counts_above_chance_the_ratio_is_told(tmp_path: Path) -> None:
    said = example.evaluation()
    said["retained"]["classification"] |= {"above_chance": None, "left_out": {"piqa": "at chance"}}
    reader = read(tmp_path, evaluation=said)
    assert (
        key_numbers(reader)["Relative accuracy, classification"] == "89 %"
        and "of the accuracy (86 to 92)" in reader.text
    )
    assert "Left out above chance: piqa, at chance." in reader.text


def test_a_prompt_phase_counts_the_whole_prompt(tmp_path: Path) -> None:
    said = example.evaluation()
    said["speed"]["timings"]["smollm2"]["prefill"] = [0.5]
    said["speed"] |= {"batch": 3, "tokens": 100}
    got = cells(read(tmp_path, evaluation=said), "Speed", "smollm2, first token")
    assert (got["time (ms)"], got["tokens/s"]) == ("500.0", "600.0")


def key_numbers(reader: Reader) -> dict[str, str]:
    names = [data for tag, data in reader.texts if tag == "dt"]
    values = [data for tag, data in reader.texts if tag == "strong"][: len(names)]
    return {name: value.replace(SPACE, " ") for name, value in zip(names, values, strict=True)}


def test_the_key_numbers(tmp_path: Path) -> None:
    said = full()
    own, other = said["evaluation"]["perplexity"], said["evaluation"]["original"]["perplexity"]
    mean = sum(own[name]["value"] / other[name]["value"] for name in own) / len(own)
    assert key_numbers(read(tmp_path, **said)) == {
        "Blocks": "30 → 22", "Parameters": "106.5 M", "Perplexity": f"× {mean:.2f}",
        "Relative accuracy, classification": "73 %", "Relative accuracy, generation": "62 %",
        "Time, first token": "× 0.75", "Time, further token": "× 0.78",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("perplexity", "said"),
    [
        ({"original": 10, "removed": 40, "repaired": 15, "trained": 12, "first_repaired": 11}, "× 1.20"),
        ({"original": 10, "removed": 40, "repaired": 15}, "× 1.50"),
        ({"original": 10, "removed": 40}, "× 4.00"),
        ({"original": None, "removed": 40}, None),
    ],
)
def test_the_perplexity_is_that_of_the_model_as_it_was_left(
    tmp_path: Path, perplexity: dict[str, float], said: str | None
) -> None:
    assert key_numbers(read(tmp_path, compression={"perplexity": perplexity})).get("Perplexity") == said


def test_a_model_alone_has_no_columns_for_an_original(tmp_path: Path) -> None:
    report = example.evaluation()
    del report["original"], report["reference"]
    report["speed"]["ratios"] = {"smollm2": report["speed"]["ratios"]["smollm2"]}
    reader = read(tmp_path, evaluation=report)
    assert reader.tables["Perplexity by domain"][0] == ["domain", "tokens", "bits/byte", "this model"]
    assert reader.tables["Tasks, ± one standard error"][0] == ["task", "metric", "items", "chance", "this model"]
    assert reader.tables["Size"][1] == ["parameters (M)", "–", "106.5", "–"]
    assert not any(name.startswith("Time") for name in key_numbers(reader))


def test_tasks_have_a_row_a_metric(tmp_path: Path) -> None:
    own = {"acc": {"value": 0.45, "standard_error": 0.01}, "word_perplexity": {"value": 20.0}}
    other = {"acc": {"value": 0.5, "standard_error": None}}
    report = {
        "accuracy": {"sums": {"metric": "acc", "value": 0.45, "standard_error": 0.01, "chance": 0.25}},
        "tasks": {"sums": {"metrics": own, "items": 50, "few_shot": 0, "version": 1.0}},
        "original": {"tasks": {"sums": {"metrics": other, "items": 50, "few_shot": 0, "version": 1.0}}},
    }
    assert read(tmp_path, evaluation=report).tables["Tasks, ± one standard error"] == [
        ["task", "metric", "items", "chance", "original", "this model"],
        ["sums", "acc, 0-shot, version 1.0", "50", "0.2500", "0.5000", "0.4500 ± 0.0100"],
        ["sums", "word_perplexity, 0-shot, version 1.0", "50", "–", "–", "20.0000"],
    ]


def test_generations_stand_side_by_side_with_the_original_first(tmp_path: Path) -> None:
    said = example.evaluation()
    said["samples"] = [
        {"prompt": "P", "text": "own", "reference": "theirs"},
        {"prompt": "Q", "text": "its", "reference": ""},
    ]
    reader = read(tmp_path, evaluation=said)
    wanted = {"P", "Q", "own", "its", "theirs", "original", "this model"}
    texts = [data for _, data in reader.texts if data in wanted]
    first = texts.index("P")
    assert texts[first : first + 9] == [
        "P",
        "original",
        "theirs",
        "this model",
        "own",
        "Q",
        "original",
        "this model",
        "its",
    ]


def poisoned(value: Any) -> Any:
    """Every text that a user, a model or a file may have put there is made an attack."""
    if isinstance(value, dict):
        return {name: poisoned(one) for name, one in value.items()}
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    return value + EVIL if isinstance(value, str) and value not in ("attention", "mlp") else value


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    said = poisoned(full())
    evaluation = said["evaluation"]
    for section in ("perplexity", "accuracy", "retained"):
        evaluation[section] = {f"{name}{EVIL}": one for name, one in evaluation[section].items()}
    evaluation["speed"]["timings"] = {f"{name}{EVIL}": one for name, one in evaluation["speed"]["timings"].items()}
    evaluation["seconds"][EVIL] = 1.0
    said["compression"]["data"][EVIL] = EVIL
    reader = read(tmp_path, **said, title=EVIL, command=EVIL)
    clean = read(tmp_path / "clean", **full())
    assert {tag for tag, _ in reader.tags} == {tag for tag, _ in clean.tags}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert reader.text.count("alert(1)") > 40
    assert "\x00" not in reader.text and "\ud800" not in reader.text
    written = [data for _, data in reader.texts if "return math.pi" in data]
    assert written and written[0].endswith("radius ** 2" + EVIL.replace("\x00", "\ufffd").replace("\ud800", "\ufffd"))


def test_the_same_values_give_the_same_bytes_from_json_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # for once everything is drawn
    everything = example.compression(4, ((1, 2),))
    report = {"compression": {name: everything[name] for name in ("similarity", "candidates", "training")}}
    before = copy.deepcopy(report)
    first = write_report(tmp_path / "a", **report, command="c", title="t")
    assert report == before
    again = write_report(tmp_path / "b", **json.loads(json.dumps(report)), command="c", title="t")
    assert first.read_bytes() == again.read_bytes() and list(first.parent.iterdir()) == [first]


@pytest.mark.parametrize("fails", ["write", "draw"])
def test_a_failure_leaves_the_page_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    read(tmp_path, **full())
    before = (tmp_path / "report.html").read_bytes()
    if fails == "write":
        monkeypatch.setattr(Path, "write_text", broken)
    else:
        monkeypatch.setattr(Plot, "svg", broken)
    with pytest.raises((StreamlineError, OSError), match="No space left"):
        write_report(tmp_path, compression=example.compression(), command="other", title="other")
    assert (tmp_path / "report.html").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_page_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(StreamlineError, match=r"report\.html .*not replaced.*Move"):
        write_report(tmp_path, compression=example.compression(), command="c", title="t")
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra_the_error_names_it(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(StreamlineError, match=rf'needs {missing}.*pip install "streamline_hooks\[report\]"'):
        write_report(tmp_path, compression=example.compression(), command="c", title="t")


@pytest.mark.parametrize("folder", EARLIER, ids=lambda path: path.parent.name)
def test_reports_of_earlier_versions_are_read(folder: Path, tmp_path: Path) -> None:
    reader = read(tmp_path, compression=json.loads(folder.read_text()))
    assert {"What was removed", "Perplexity", "How it was made"} & set(reader.headings())


def test_nothing_to_tell_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"all empty"):
        write_report(tmp_path, compression={}, command="c", title="t")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, 2, "0.00"), (0.0049, 2, "4.9e−03"), (0.005, 2, "0.01"), (-0.25, 2, "−0.25"), (9.999, 2, "10.00"),
        (99.996, 2, "100.0"), (175.72, 2, "175.7"), (999.94, 3, "999.9"), (999.96, 2, "1,000"), (2029.4, 2, "2,029"),
        (1_000_000, 2, "1.0e+06"), (1e-300, 2, "1.0e−300"), (12, 0, "12"), (None, 2, DASH), (math.nan, 2, DASH),
        ("12", 2, DASH), (True, 2, DASH), ([1.0], 2, DASH),
    ],
)  # fmt: skip
def test_numbers(value: Any, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_what_was_removed_is_the_first_candidates_or_else_the_plans() -> None:
    plan = {"removed": [2, 3, 7], "silenced": [[9, "attention"]]}
    candidates = {"plan": plan, "candidates": [{"windows": [[4, 6]], "silenced": []}]}
    assert removed_windows({"plan": plan}) == [(2, 4), (7, 8)]
    assert branches_of_report({"plan": plan}) == [(9, "attention")]
    assert removed_windows(candidates) == [(4, 6)] and branches_of_report(candidates) == []
    assert removed_windows({**candidates, "rounds": [{}]}) == [(2, 4), (7, 8)]
    assert removed_windows({}) == [] and branches_of_report({}) == [] and blocks_text([]) == "none"
