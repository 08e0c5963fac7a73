"""The page as text: self-contained, well formed, escaped, whole, the same every time, and with the right numbers."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.report import write_report
from streamline_hooks.report.drawing import Drawing
from streamline_hooks.report.page import NAMES
from streamline_hooks.report.sections import sections
from streamline_hooks.report.values import SPACE
from tests.report import example
from tests.report.reading import Reader

EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\ud800"
SECTIONS = [
    "What was removed", "Warnings", "Training", "Perplexity", "Accuracy", "Agreement", "Generations", "Size and speed",
    "Trade-off", "How it was made",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and is looked at elsewhere."""
    monkeypatch.setattr(Drawing, "render", lambda self, style, kind, **_: f"{self.name} {kind}".encode())


def read(folder: Path, **said: Any) -> Reader:
    options = {"command": example.COMMAND, "title": "A model", **said}
    return Reader(write_report(folder, **options).read_text(encoding="utf-8"))


def full() -> dict[str, Any]:
    return {"compression": example.compression(), "evaluation": example.evaluation(), "sweep": example.sweep()}


def test_the_page_loads_and_runs_nothing(tmp_path: Path) -> None:
    reader = read(tmp_path, **full())
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert str(attributes[name]).startswith("#" if tag == "a" else "data:image/svg+xml;base64,")
    style = next(data for tag, data in reader.texts if tag == "style")
    assert not re.search(r"url\(|@import|https?:", style)
    policy = next(a["content"] for t, a in reader.tags if t == "meta" and a.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'")


def test_every_section_is_there_and_linked(tmp_path: Path) -> None:
    reader = read(tmp_path, **full())
    assert reader.headings() == SECTIONS
    ids = reader.ids()
    assert len(ids) == len(set(ids))
    links = [str(a["href"])[1:] for tag, a in reader.tags if tag == "a"]
    assert len(links) == len(SECTIONS) and set(links) <= set(ids)
    images = [a for tag, a in reader.tags if tag == "img"]
    assert len(images) == len(NAMES) and all(len(str(a["alt"])) > 30 for a in images)
    assert {f"figure-{name}" for name in NAMES} <= set(ids)


@pytest.mark.parametrize(
    ("said", "headings"),
    [
        ({"compression": {"perplexity": {"original": 1.0}}}, ["Perplexity", "How it was made"]),
        ({"evaluation": {"model": "a", "accuracy": {"t": {"value": 0.5}}}}, ["Accuracy", "How it was made"]),
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
    assert all(row[2] == "–" for row in reader.tables["Perplexity by domain"][1:])
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
        "domain": "peps", "tokens": "40,960", "original": f"{other['value']:.2f}", "this model": f"{own['value']:.2f}",
        f"×{SPACE}original": f"{own['value'] / other['value']:.2f}",
        "bits a byte, original": f"{other['bits_per_byte']:.3f}", "bits a byte": f"{own['bits_per_byte']:.3f}",
    }  # fmt: skip
    assert cells(reader, "Accuracy by task, ± one standard error", "piqa") == {
        "task": "piqa", "measure": "accuracy", "questions": "700", "chance (%)": "50.0", "original (%)": "74.0 ± 1.9",
        "this model (%)": "65.0 ± 1.9",
    }  # fmt: skip
    assert cells(reader, "Candidates", "12–19") == {
        "blocks": "12–19", "score of the search": "0.9200", "relative error, removed": "0.4100",
        "relative error, repaired": "0.1700", "ridge": "0.0001", "KL (nats a token)": "0.5800", "why it cannot go": "",
    }  # fmt: skip
    assert cells(reader, "Candidates", "0–7")["why it cannot go"].startswith("block 0 owns")
    assert [row[0] for row in reader.tables["Candidates"] if "chosen" in row[0]] == [
        "2–9, attention of 28, mlp of 28, chosen"
    ]
    assert cells(reader, "Size", "parameters (millions)") == {
        "": "parameters (millions)", "original": "134.5", "this model": "106.5", "change": f"−20.8{SPACE}%",
    }  # fmt: skip
    timed = evaluation["speed"]["timings"]["build/smollm2"]["decode"]
    got = cells(reader, "Speed", "build/smollm2, further token")
    assert got["time (ms)"] == f"{1e3 * sorted(timed)[3]:.1f}" and got["tokens/s"] == f"{1 / sorted(timed)[3]:.1f}"
    assert (got[f"×{SPACE}first"], got["quartiles (×)"]) == ("0.781", "0.770 to 0.800")
    assert ["KL, 99 % of the tokens are below (nats)", "2.9000"] in reader.tables["Agreement with the original"]
    assert ["same first choice (% of tokens)", "74.1"] in reader.tables["Agreement with the original"]
    assert ["repeated runs of four tokens (%)", "9.4", "18.3"] in reader.tables["How they write"]
    left = reader.tables["What is left of the original's accuracy, with its interval"]
    assert ["classification", "89.0 (86.0 to 92.0)", "73.0 (65.0 to 81.0)"] in left
    assert ["all", "2,067"] in reader.tables["Time by step of the compression"]
    assert ["all", "352.6"] in reader.tables["Time by step of the evaluation"]
    points = reader.tables["All points"]
    assert ["linear, 8", "3-10", "8", "1.453", "79.2", "0.768", "0.792", "size", ""] in points
    assert ["linear, 29", "", "–", "–", "–", "–", "–", "", "one block must stay"] in points
    assert ["piqa", "93.4", "87.1"] in reader.tables["Stability"]
    assert ["copa", "acc", "0.7500", "0.7100 ± 0.0456", "100", "0", "1.0"] in reader.tables[
        "lm-eval, ± one standard error"
    ]
    assert ["KL, peps (nats a token)", "0.3500"] in reader.tables["Agreement with the original"]
    assert ["fingerprint", "5d8c1c2a0e6f4b7a"] in reader.tables["What went in"]


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
    assert key_numbers(reader)["Retained, classification"] == "89 %" and "of the accuracy (86 to 92)" in reader.text
    assert "Left out of what is above chance: piqa, at chance." in reader.text


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
        "Blocks": "30 → 22", "Parameters": "−20.8 %", "Perplexity": f"× {mean:.2f}", "Retained, classification": "73 %",
        "Retained, generation": "62 %", "Time": "× 0.78",
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
    said = example.evaluation()
    del said["original"], said["reference"]
    said["speed"]["ratios"] = {"smollm2": said["speed"]["ratios"]["smollm2"]}
    reader = read(tmp_path, evaluation=said)
    assert reader.tables["Perplexity by domain"][0] == ["domain", "tokens", "this model", "bits a byte"]
    assert reader.tables["Size"][0] == ["", "this model"]
    assert key_numbers(reader)["Parameters"] == "106.5 M" and "Time" not in key_numbers(reader)


def test_generations_stand_side_by_side_with_the_original_first(tmp_path: Path) -> None:
    said = example.evaluation()
    said["samples"] = [
        {"prompt": "P", "text": "own", "reference": None},
        {"prompt": "Q", "text": "its", "reference": ""},
    ]
    said["original"]["samples"] = [{"prompt": "P", "text": "theirs", "reference": None}]
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
    said = {"compression": {name: everything[name] for name in ("similarity", "candidates")}}
    before = copy.deepcopy(said)
    first = write_report(tmp_path / "a", **said, command="c", title="t")
    assert said == before
    again = write_report(tmp_path / "b", **json.loads(json.dumps(said)), command="c", title="t")
    files = sorted(path.relative_to(tmp_path / "a") for path in first.parent.rglob("*") if path.is_file())
    assert len(files) == 1 + 2 * 3
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert first.name == again.name == "report.html"


def test_figures_of_an_earlier_page_go_and_other_files_stay(tmp_path: Path) -> None:
    read(tmp_path, **full())
    (tmp_path / "figures" / "mine.svg").write_text("mine")
    read(tmp_path, compression={"perplexity": {"original": 1.0, "removed": 2.0}})
    left = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert left == ["mine.svg", "perplexity_by_step.png", "perplexity_by_step.svg"]


def test_the_names_of_all_figures_are_known() -> None:
    found = sections(example.compression(), example.evaluation(), example.sweep(), "")
    drawn = [part.name for section in found for part in section.parts if isinstance(part, Drawing)]
    assert sorted(drawn) == sorted(NAMES)


@pytest.mark.parametrize("fails", ["write", "draw"])
def test_a_failure_leaves_the_page_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, request: pytest.FixtureRequest
) -> None:
    page = tmp_path / "report.html"
    read(tmp_path, **full())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full_disk(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    error: Callable[..., Any] = pytest.raises(StreamlineError, match=r"No space left.*Make room")
    if fails == "write":
        monkeypatch.setattr(Path, "write_bytes", _after(3, Path.write_bytes, full_disk))
    else:
        monkeypatch.setattr(Drawing, "render", broken)
        error = pytest.raises(RuntimeError, match="broken")
    with error:
        write_report(tmp_path, compression=example.compression(), command="other", title="other")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before and page in before


@pytest.mark.parametrize("name", ["report.html", "figures/similarity.png", "figures/influence.svg"])
def test_files_of_the_users_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(StreamlineError, match=rf"{name} .*not replaced.*Move"):
        write_report(tmp_path, compression=example.compression(), command="c", title="t")
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    (tmp_path / "figures" / "front.png").write_text("mine")  # a name of ours, which no page of ours had
    for _ in range(2):
        write_report(tmp_path, compression=example.compression(), command="c", title="t")
    assert (tmp_path / "figures" / "front.png").read_text() == "mine"


def _after(count: int, works: Callable[..., Any], fails: Callable[..., Any]) -> Callable[..., Any]:
    calls = [works] * count

    def either(*args: Any, **kwargs: Any) -> Any:
        return (calls.pop() if calls else fails)(*args, **kwargs)

    return either


def test_nothing_to_tell_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"nothing to report.*empty"):
        write_report(tmp_path, compression={}, command="c", title="t")
    assert not list(tmp_path.iterdir())
