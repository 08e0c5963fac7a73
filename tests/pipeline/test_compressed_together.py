"""Two and four processes compress a model as one does, and only the first writes and speaks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import load
from tests.pipeline.compressed_together import fresh, one_test_sequence, plain, trained
from tests.processes import in_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, story_texts: list[str]) -> Path:
    found = tmp_path_factory.mktemp("compressed")
    (found / "texts.json").write_text(json.dumps(story_texts))
    return found


@pytest.fixture(scope="module")
def one(stories_folder: Path, story_texts: list[str]) -> dict[str, Any]:
    return {call.__name__: call(stories_folder, story_texts) for call in (plain, trained, one_test_sequence)}


@pytest.fixture(scope="module")
def two(folder: Path, stories_folder: Path) -> list[dict[str, Any]]:
    code = """
        from pathlib import Path
        from tests.pipeline.compressed_together import in_several
        torch.save(in_several(Path(folder), Path(args[0]), rank), f"{folder}/{rank}.pt")
    """
    in_processes(code, folder, 2, stories_folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_alike(mine: dict[str, Any], theirs: dict[str, Any], within: float) -> None:
    for a, b in zip(mine["matrices"], theirs["matrices"], strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=min(within, 1e-9), equal_nan=True)
    assert mine["chosen"] == theirs["chosen"] and len(mine["chosen"]) == 3
    assert mine["kls"] == pytest.approx(theirs["kls"], rel=within)
    assert mine["errors"] == pytest.approx(theirs["errors"], rel=within)
    assert mine["perplexities"] == pytest.approx(theirs["perplexities"], rel=within)
    assert [row["distance"] for row in mine["history"]] == pytest.approx(
        [row["distance"] for row in theirs["history"]], rel=within
    )
    assert mine["weights"].keys() == theirs["weights"].keys()
    for name, value in mine["weights"].items():
        torch.testing.assert_close(value, theirs["weights"][name], rtol=0.0, atol=within)


@pytest.mark.parametrize("what", ["plain", "trained", "one_test_sequence"])
def test_two_processes_end_with_the_model_of_one(one: dict[str, Any], two: list[dict[str, Any]], what: str) -> None:
    for found in two:
        assert_alike(found[what], one[what], 1e-6)
    assert_alike(two[0][what], two[1][what], 0.0)
    assert two[0][what]["seconds"] == two[1][what]["seconds"]


def test_random_weights_choose_in_several_no_more_than_in_one(
    two: list[dict[str, Any]], stories_folder: Path, story_texts: list[str]
) -> None:
    wanted = fresh(stories_folder, story_texts)
    assert two[0]["fresh"] == two[1]["fresh"] == wanted and len(set(wanted)) == 4


def test_what_was_compared_was_trained(one: dict[str, Any]) -> None:
    history = one["trained"]["history"]
    assert len(history) == 3 and history[-1]["distance"] < history[0]["distance"]
    assert one["plain"]["weights"].keys() != one["trained"]["weights"].keys()


def test_only_the_first_writes_and_speaks(one: dict[str, Any], two: list[dict[str, Any]], folder: Path) -> None:
    assert two[0]["said"] and not two[1]["said"]
    assert two[0]["files"] == two[1]["files"] and "out/report.json" in two[0]["files"]
    assert two[0]["trained"]["folder"] == two[1]["trained"]["folder"] == str(folder / "out")
    assert not [path for path in folder.iterdir() if "training" in path.name], "what was to be gone on from is left"
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["training"]["history"] == two[1]["trained"]["history"]
    loaded = load(folder / "out").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in two[1]["trained"]["weights"].items())


def test_what_both_models_wrote_is_known_to_all(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["plain"]["samples"] == two[1]["plain"]["samples"] == one["plain"]["samples"] != []
    assert two[0]["plain"]["timed"] and two[1]["plain"]["timed"]


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        ("not free", "StreamlineError: Process 0 of 2: "),
        ("rounds not free", "StreamlineError: Process 0 of 2: "),
        ("one fails", "StreamlineError: Process 1 of 2: .*9"),
        ("other config", "StreamlineError: Processes 0 and 1 of 2 .*different config.search ..*'cosine'.*'angular'"),
        ("other texts", "StreamlineError: Processes 0 and 1 of 2 .*batches"),
    ],
)
def test_what_goes_wrong_in_one_is_raised_in_both(two: list[dict[str, Any]], case: str, pattern: str) -> None:
    for found in two:
        assert re.match(pattern, found[case], re.DOTALL)


@pytest.mark.long
def test_four_processes_end_with_the_model_of_one(
    one: dict[str, Any], stories_folder: Path, folder: Path, tmp_path: Path
) -> None:
    code = """
        import json
        from pathlib import Path
        from tests.pipeline.compressed_together import plain
        texts = json.loads(Path(args[1]).read_text())
        torch.save(plain(Path(args[0]), texts, speed=False, generation=False), f"{folder}/{rank}.pt")
    """
    in_processes(code, tmp_path, 4, stories_folder, folder / "texts.json")
    four = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    for found in four:
        assert_alike(found, one["plain"], 1e-6)
        assert_alike(found, four[0], 0.0)


@pytest.mark.long
def test_batches_that_are_tensors_come_to_one_model(tmp_path: Path) -> None:
    code = """
        from streamline_hooks import compress
        from streamline_hooks.testing import tiny_model
        batches = [torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(k)) for k in range(6)]
        parts = {"calibration": batches[:3], "validation": batches[3:5], "test": batches[5:]}
        result = compress(tiny_model("llama"), parts, remove=2)
        torch.save([list(result.plan.removed), list(result.model.state_dict().values())], f"{folder}/{rank}.pt")
    """
    in_processes(code, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[0] == second[0] and len(first[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
