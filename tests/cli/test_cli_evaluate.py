"""``evaluate`` and ``sweep`` on the command line: what they print, what they leave in the folder, what they refuse."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import CompressionConfig, LinearConfig, load
from streamline_hooks.evaluation import LoadedTask
from streamline_hooks.selection import WindowSearch
from tests.commands import run

FEW = "--sequence-length 64 --calibration-tokens 1024 --validation-tokens 128 --test-tokens 128"


@pytest.fixture()
def files(tmp_path: Path, story_texts: list[str]) -> Path:
    (tmp_path / "tales.txt").write_text("\n\n\n".join(story_texts[:12]))
    rows: list[dict[str, Any]] = [
        {"query": "Once upon a time, there was a little girl named", "choices": ["Lily.", "Table."], "gold": 0},
        {"query": "Tom and his dog went to the", "choices": ["because", "park."], "gold": 1},
    ]
    (tmp_path / "girls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ends.jsonl").write_text(json.dumps({"context": "Once upon a", "continuation": "time"}))
    return tmp_path


def run_again(*args: Any, **settings: Any) -> None:
    raise AssertionError("a task was run again")


def test_text_of_the_compression_is_reported(
    files: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = files / "small"
    made = f"compress {stories_folder} -o {small} --remove 1 -c {files}/tales.txt --shortlist 1 {FEW}"
    assert run([*made.split(), "--no-speed", "--no-generation"], monkeypatch, capsys)[0] == 0
    (files / "other.txt").write_text((files / "tales.txt").read_text())
    for name, is_known in (("tales.txt", True), ("other.txt", False)):
        command = f"evaluate {small} --text {files / name} --text-tokens 256 --window 64 --no-speed --prompts 0 --json"
        code, out, err = run(command.split(), monkeypatch, capsys)
        assert code == 0 and json.loads(out)
        assert ("was also the text of the compression" in err) == is_known


@pytest.mark.long
def test_a_model_against_its_original(
    files: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small, output = files / "small", files / "out"
    made = f"compress {stories_folder} -o {small} --remove 1 -c {files}/tales.txt --shortlist 2 {FEW}"
    assert run(made.split(), monkeypatch, capsys)[0] == 0
    page = (small / "report.html").read_text()
    assert "streamline-hooks compress stories260k -o small" in page and "original" in page
    assert "-c tales.txt" in page, "of absolute paths the page has the last part alone"
    assert 'id="figure-similarity"' in page
    asked = f"evaluate {small} --against {stories_folder} --text {files}/tales.txt --tasks {files}/girls.jsonl "
    asked += f"--tasks {files}/ends.jsonl --metric acc_norm --prompts 2 --text-tokens 600 --window 64 -o {output}"
    code, out, err = run(asked.split(), monkeypatch, capsys)
    assert code == 0, err
    assert "perplexity, tales" in out and "girls (acc_norm)" in out and "girls (acc)" in out and "stories260k" in out
    found = json.loads((output / "evaluation.json").read_text())
    assert found["reference"] == "stories260k" and found["model"] == "small"
    assert found["mean_perplexity_ratio"] > 1 and found["accuracy"]["ends"]["value"] in (0.0, 1.0)
    assert len(found["samples"]) == 2 and found["speed"]["timings"]
    page = (output / "report.html").read_text()
    assert "streamline-hooks evaluate" in page and "girls" in page
    assert 'id="figure-similarity"' in page  # of how it was compressed, from its own folder
    monkeypatch.setattr(LoadedTask, "run", run_again)
    code, again, _ = run([*asked.split(), "--no-speed", "--json"], monkeypatch, capsys)
    assert code == 0
    kept = json.loads(again)
    assert all(
        kept[name] == found[name] for name in ("accuracy", "perplexity", "agreement", "samples", "seconds", "tasks")
    )


def test_without_anything_named_it_reads_what_comes_with_python(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"evaluate {stories_folder} --text-tokens 300 --no-speed --prompts 1".split()
    assert "perplexity, pydoc" in run(asked, monkeypatch, capsys)[1]
    code, out, _ = run([*asked, "--problems", "probes:1", "--text", "pydoc"], monkeypatch, capsys)
    assert code == 0 and "perplexity, pydoc" in out and "brackets (exact match)" in out and "repetition" in out


def test_a_sweep(
    files: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = files / "swept"
    asked = f"sweep {stories_folder} -o {output} --remove 1,2 --repair none,linear -c {files}/tales.txt --shortlist 1 "
    asked += f"--speed-tokens 16 --repeats 1 {FEW}"
    code, out, err = run(asked.split(), monkeypatch, capsys)
    assert code == 0, err
    rows = list(csv.DictReader((output / "sweep.csv").open()))
    assert [row["remove"] + row["kind"] for row in rows] == ["1none", "1linear", "2none", "2linear"]
    assert all(float(row["perplexity_ratio"]) > 0 and float(row["prefill_ratio"]) > 0 for row in rows)
    page = (output / "report.html").read_text()
    assert "streamline-hooks sweep" in page and 'id="figure-front"' in page
    assert all(f"{float(row['perplexity_ratio']):.3f}" in page for row in rows)
    assert out.count("linear") >= 2


def test_a_sweep_takes_from_a_config_what_is_not_given(
    files: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    CompressionConfig(remove=2, repair=LinearConfig(rank=4), search=WindowSearch(shortlist=1)).save(files / "c.yaml")
    asked = (
        f"sweep {stories_folder} -o {files}/out --config {files}/c.yaml -c {files}/tales.txt --no-speed --json {FEW}"
    )
    for more, points in (
        ([], [("2", "linear:rank=4")]),
        (["--remove", "1"], [("1", "linear:rank=4")]),
        (["--repair", "none,linear"], [("2", "none"), ("2", "linear")]),
    ):
        code, out, err = run([*asked.split(), *more], monkeypatch, capsys)
        assert code == 0, err
        assert [(point["remove"], point["kind"]) for point in json.loads(out)["points"]] == points


def test_a_page_that_cannot_be_written_costs_no_result(
    files: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = files / "out"
    (output / "report.html").mkdir(parents=True)
    asked = f"evaluate {stories_folder} --text {files}/tales.txt --text-tokens 300 --no-speed --prompts 1 -o {output}"
    code, out, err = run(asked.split(), monkeypatch, capsys)
    assert code == 0 and "perplexity, tales" in out and "report.html" in err, err
    assert json.loads((output / "evaluation.json").read_text())["perplexity"]
    code, out, err = run([*asked.split(), "--json"], monkeypatch, capsys)
    assert code == 0 and json.loads(out)["perplexity"] and "report.html" in err

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("libfreetype is missing")

    monkeypatch.setattr("streamline_hooks.pipeline.write_report", broken)
    made = f"compress {stories_folder} -o {files}/small --remove 1 -c {files}/tales.txt --shortlist 1 {FEW}"
    code, out, err = run(made.split(), monkeypatch, capsys)
    assert code == 0 and "perplexity" in out and "libfreetype is missing" in err, err
    assert load(files / "small")
    swept = f"sweep {stories_folder} -o {files}/swept --remove 1 --repair none -c {files}/tales.txt --no-speed {FEW}"
    code, out, err = run(swept.split(), monkeypatch, capsys)
    assert code == 0 and "perplexity x" in out and "libfreetype is missing" in err, err


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_report_is_seen_before_anything_is_measured(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_bytes(content)
    code, _, err = run(["evaluate", tmp_path, "-o", tmp_path / "out"], monkeypatch, capsys)
    assert code == 2 and f"{tmp_path / 'report.json'}" in err and "delete" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", "MODEL", "--problems", "probes:0"], r"'probes:0'.*probes:N"),
        (["evaluate", "MODEL", "--problems", "probes", "--problems", "probes:3"], r"'probes:3'.*once"),
        (["evaluate", "MODEL", "--tasks", "no-such.jsonl"], r"no-such.jsonl cannot be read"),
        (["evaluate", "MODEL", "--text", "pydoc", "--window", "100000"], "the 512 positions"),
        (["sweep", "MODEL", "-o", "x", "--remove", "lots"], "lots"),
        (["sweep", "MODEL", "-o", "x", "--repair", "magic"], r"'magic'.*unknown"),
        (["sweep", "MODEL", "-o", "x", "-c", "self"], "sweep, which generates no text"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    says: str,
    stories_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(stories_folder) if part == "MODEL" else part for part in arguments]
    code, _, err = run(given, monkeypatch, capsys)
    assert code == 2 and re.search(says, err)
    assert not list(tmp_path.iterdir())
