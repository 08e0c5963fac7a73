"""Block by block, weights of blocks that stay are changed once, in the right block, and written as in memory."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import compress, load
from tests.checkpoint.block_by_block import AMOUNTS, compressible, reader
from tests.configured import arguments
from tests.pipeline.test_compress_checkpoint import Interrupted, require_same_bytes, run, weights_in

compressing = sys.modules["streamline_hooks.pipeline.one_round"]
streaming = sys.modules["streamline_hooks.checkpoint.streaming"]
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def compare(found: Any, folder: Path, output: Path, options: dict[str, Any], dtype: Any = "auto") -> None:
    """Compress in memory, and compare the plans and all weights."""
    tokenizer, texts = reader()
    whole = load(folder, dtype=dtype)
    wanted = compress(whole, texts, tokenizer=tokenizer, output=output, **arguments(**options))
    assert found.plan == wanted.plan and found.perplexities == pytest.approx(wanted.perplexities, rel=1e-4)
    assert (found.folder / "config.json").read_text() == (output / "config.json").read_text()
    mine, theirs = weights_in(found.folder), weights_in(output)
    assert sorted(mine) == sorted(theirs)
    for name, weight in mine.items():
        assert weight.dtype == theirs[name].dtype
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def original_names(plan: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names that they had in the original."""

    def renamed(match: re.Match[str]) -> str:
        return f"layers.{plan.kept[int(match[1])]}."

    return {re.sub(r"layers\.(\d+)\.", renamed, name): weight for name, weight in weights.items()}


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["folded", "scale"])
def test_the_right_weights_are_changed_once(kind: str, tmp_path: Path) -> None:
    folder = compressible(tmp_path, "llama", torch.bfloat16)
    found = run(folder, tmp_path / "out", repair=kind, max_shard_size="30KB")
    (repair,) = found.candidates[0].repairs
    before, window = weights_in(folder), repair.window
    after = original_names(found.plan, weights_in(tmp_path / "out"))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    if kind == "folded":
        name = f"model.layers.{window.start - 1}.mlp.down_proj.weight"
        assert changed == {name}
        expected = repair.replacement_module.map.T @ before[name].double()  # y = W x, and y T = Tᵀ W x
        assert torch.equal(after[name], expected.bfloat16())
    else:
        assert changed == {f"model.layers.{k}.{name}" for k in range(window.stop, 6) for name in WRITERS}
        for name in changed:
            assert torch.equal(after[name], before[name] / repair.replacement_module.factor)
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["folded", "scale"])
def test_the_index_has_each_weight_and_its_file(kind: str, tmp_path: Path) -> None:
    found = run(compressible(tmp_path), tmp_path / "out", repair=kind, max_shard_size="30KB")
    index = json.loads((found.folder / "model.safetensors.index.json").read_text())
    for file in found.folder.glob("*.safetensors"):
        one = tmp_path / file.stem
        one.mkdir()
        (one / file.name).write_bytes(file.read_bytes())
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(weights_in(one))
    written = weights_in(found.folder)
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in written.values())


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["folded", "scale"])
def test_another_dtype_is_that_in_memory(kind: str, tmp_path: Path) -> None:
    folder = compressible(tmp_path)
    options = {**AMOUNTS, "repair": kind, "speed": False, "generation": False}
    found = run(folder, tmp_path / "apart", dtype=torch.bfloat16, **options)
    compare(found, folder, tmp_path / "whole", options, torch.bfloat16)
    assert {weight.dtype for weight in weights_in(tmp_path / "apart").values()} == {torch.bfloat16}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["folded", "scale"])
def test_several_windows_are_those_in_memory(kind: str, tmp_path: Path) -> None:
    """A second window is fitted on the model with the first one repaired, and a factor is on top of another."""
    folder = compressible(tmp_path)
    options = {**AMOUNTS, "repair": kind, "remove": 3, "search": "disjoint", "protect": (0,)}
    options |= {"speed": False, "generation": False}
    found = run(folder, tmp_path / "apart", work_folder=tmp_path / "work", **options)
    assert all(len(one.windows) == 2 for one in found.candidates)
    compare(found, folder, tmp_path / "whole", options)


def break_off(*_: Any, **__: Any) -> Any:
    raise Interrupted


@pytest.mark.long
@pytest.mark.parametrize("kind", ["folded", "scale"])
def test_a_continued_run_changes_the_weights_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in passes over the original and over repaired models, and before and after the surgery."""
    folder, work = compressible(tmp_path), tmp_path / "work"
    run(folder, tmp_path / "at once", repair=kind)
    original = streaming.BlockwisePass.advance
    for boundaries in (3, 9, 11):
        left = iter(range(boundaries))

        def advance(self: Any, place: int, left: Any = left) -> int:
            if next(left, None) is None:
                raise Interrupted
            return original(self, place)

        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            patched.setattr(streaming.BlockwisePass, "advance", advance)
            run(folder, tmp_path / "in parts", work_folder=work, repair=kind)
    for name in ("first_applicable", "trial_perplexities", "LayerSurgeon", "save"):
        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            patched.setattr(compressing, name, break_off)
            run(folder, tmp_path / "in parts", work_folder=work, repair=kind)
    assert (work / "verify.safetensors").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(compressing, "verify_shortlist", break_off)  # read from the file
        run(folder, tmp_path / "in parts", work_folder=work, repair=kind)
    assert not work.exists()
    require_same_bytes(tmp_path / "in parts", tmp_path / "at once")
