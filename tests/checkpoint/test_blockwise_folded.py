"""Block by block, maps and factors that change weights of blocks that stay are those found in memory."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import StreamlineError, UnsupportedSurgery, find_stack, fit_windows, load
from streamline_hooks.checkpoint import BlockwiseSource
from streamline_hooks.checkpoint.offloaded import open_checkpoint
from streamline_hooks.repair import (
    FoldedConfig,
    FoldedMap,
    MLPConfig,
    ScaleConfig,
    fit_branch_linear,
    measure_fold_moments,
)
from streamline_hooks.selection import Selection, Trial, trial_perplexities, verify_shortlist
from streamline_hooks.statistics import WindowMoments, measure_branches
from streamline_hooks.testing import tiny_model
from tests.checkpoint.block_by_block import blockwise, on_disk, reads, written  # noqa: F401
from tests.checkpoint.test_blockwise_verify import FIT, HELD_OUT, SELECTIONS, TEXTS, numbers

WINDOWS = [range(2, 4), range(1, 4), range(4, 6), range(3, 4), range(2, 5)]


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("llama", torch.float32, {"memory": 0}),
        ("gpt_neox", torch.float32, {"memory": 4000}),  # parallel branches
        ("gpt2", torch.bfloat16, {"check": False}),
    ],
)
def test_maps_are_those_in_memory(family: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = written(tmp_path, family, dtype)
    whole, model = load(folder, dtype="auto"), open_checkpoint(folder)
    wanted = fit_windows(whole, WINDOWS, FoldedConfig(), FIT, HELD_OUT)
    found = blockwise(fit_windows, model, WINDOWS, FoldedConfig(), FIT, HELD_OUT, **options)
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(one.replacement_module, FoldedMap) and isinstance(other.replacement_module, FoldedMap)
        torch.testing.assert_close(one.replacement_module.map, other.replacement_module.map, rtol=1e-6, atol=1e-8)
        assert one.ridge == other.ridge and one.repaired_error == pytest.approx(other.repaired_error, rel=1e-6)
        assert one.removal_error == pytest.approx(other.removal_error, rel=1e-6)
    assert all(on_disk(model))


@pytest.mark.parametrize("kind", [FoldedConfig(), ScaleConfig()])
def test_selections_are_judged_as_in_memory(kind: Any, tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    found = blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS[1:], *TEXTS, replacement=kind, memory=4000)
    wanted = verify_shortlist(load(folder), SELECTIONS[1:], *TEXTS, replacement=kind)
    for one, other in zip(numbers(found), numbers(wanted), strict=True):
        assert one[0] == other[0] and one[1:-1] == pytest.approx(other[1:-1], rel=1e-5) and one[-1] == other[-1]


def test_a_window_at_the_start_is_refused_alone(tmp_path: Path) -> None:
    """The others are fitted in the same pass."""
    folder, _ = written(tmp_path)
    found = blockwise(
        verify_shortlist, open_checkpoint(folder), SELECTIONS[:3], *TEXTS, replacement=FoldedConfig(), check=False
    )
    assert found[-1].windows == (range(0, 2),) and "no block precedes" in found[-1].refused
    assert not any(one.refused for one in found[:-1])
    with pytest.raises(UnsupportedSurgery, match="no block precedes"):
        blockwise(fit_windows, open_checkpoint(folder), [range(0, 2)], FoldedConfig(), FIT, HELD_OUT)


def test_a_block_is_read_once_in_the_pass_and_once_for_each_window_after_it(
    tmp_path: Path,
    reads: Counter[str],  # noqa: F811
) -> None:
    model = open_checkpoint(written(tmp_path)[0])
    windows = [range(2, 4), range(3, 5)]
    blockwise(fit_windows, model, windows, FoldedConfig(), FIT, HELD_OUT, check=False)
    counts = {k: reads[f"model.layers.{k}.mlp.up_proj.weight"] for k in range(6)}
    # One forward finds the branches; the blocks before the windows are loaded to run them on these tokens.
    assert counts == {0: 2, 1: 4, 2: 4, 3: 2, 4: 2, 5: 1}


def test_the_states_of_one_batch_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the MLPs add in all batches, whose size grows with the text."""
    model, alive = open_checkpoint(written(tmp_path)[0]), []
    original = WindowMoments.update
    kept: list[weakref.ref[torch.Tensor]] = []

    def watched(self: WindowMoments, entering: torch.Tensor, *args: Any, **options: Any) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in kept))
        kept.append(weakref.ref(entering))
        original(self, entering, *args, **options)

    monkeypatch.setattr(WindowMoments, "update", watched)
    source = blockwise(measure_fold_moments, model, FIT * 3, [range(2, 4), range(3, 5)], memory=0, check=False)
    assert len(source) == 2 and len(alive) == 24 and max(alive) <= 1, "the states of the block that ran last"
    assert find_stack(model)


@pytest.mark.parametrize(
    "read",
    [
        lambda model: fit_windows(model, [range(2, 4)], FoldedConfig(), FIT, HELD_OUT),
        lambda model: fit_branch_linear(model, [(2, "mlp")], FIT, HELD_OUT),
        lambda model: measure_branches(model, FIT),
    ],
)
def test_branches_of_a_model_that_accelerate_offloads_are_refused(read: Any, tmp_path: Path) -> None:
    """Its weights are loaded part by part, and a source that keeps a block in memory is named."""
    model = open_checkpoint(written(tmp_path)[0])
    with pytest.raises(UnsupportedSurgery, match=r"block \d.*offloaded.*BlockwiseSource"):
        read(model)


def test_a_fit_is_not_continued_from_the_sums_of_another_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both branches of a block have the same window and sums of the same class."""
    model, folder = written(tmp_path)[0], tmp_path / "work"
    expected = fit_branch_linear(load(model), [(2, "mlp")], FIT, HELD_OUT)[0]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("streamline_hooks.repair.branch_linear.solve_least_squares", interrupt)
        with pytest.raises(KeyboardInterrupt), BlockwiseSource(open_checkpoint(model), folder=folder) as source:
            fit_branch_linear(source, [(2, "attention")], FIT, HELD_OUT)
    with BlockwiseSource(open_checkpoint(model), folder=folder) as source:
        try:
            result = fit_branch_linear(source, [(2, "mlp")], FIT, HELD_OUT)[0]
        except StreamlineError as error:
            assert "another" in str(error)
        else:
            torch.testing.assert_close(result.map, expected.map)


@pytest.mark.parametrize("other", [{"seed": 2}, {"activation": "relu"}, {"width": 17}])
def test_a_fit_is_not_continued_from_the_sums_of_another_replacement(
    other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of a network depend on its first layers, which least squares does not solve."""
    model, folder = written(tmp_path)[0], tmp_path / "work"
    config, windows = MLPConfig(width=16, linear=False, seed=1), [range(1, 3), range(2, 5)]
    expected = fit_windows(load(model), windows, config, FIT, HELD_OUT)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("streamline_hooks.repair.fit.solve_projection", interrupt)
        with pytest.raises(KeyboardInterrupt), BlockwiseSource(open_checkpoint(model), folder=folder) as source:
            fit_windows(source, windows, config, FIT, HELD_OUT)
    with (
        pytest.raises(StreamlineError, match="states of another pass"),
        BlockwiseSource(open_checkpoint(model), folder=folder) as source,
    ):
        fit_windows(source, windows, replace(config, **other), FIT, HELD_OUT)
    with BlockwiseSource(open_checkpoint(model), folder=folder) as source:
        found = fit_windows(source, windows, config, FIT, HELD_OUT)
    assert [r.repaired_error for r in found] == pytest.approx([r.repaired_error for r in expected], rel=1e-6)


@pytest.mark.long
def test_the_states_of_earlier_branches_are_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive = open_checkpoint(written(tmp_path)[0]), []
    original = WindowMoments.update
    blocks: list[list[weakref.ref[torch.Tensor]]] = []

    def watched(self: WindowMoments, entering: torch.Tensor, *args: Any, **options: Any) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for refs in blocks for ref in refs))
        blocks.append([weakref.ref(entering)])
        original(self, entering, *args, **options)

    monkeypatch.setattr(WindowMoments, "update", watched)
    branches = [(k, "mlp") for k in range(1, 5)]
    blockwise(fit_branch_linear, model, branches, FIT, HELD_OUT, memory=0, check=False)
    assert len(alive) >= 8 and max(alive) <= 1


def test_many_zeroed_branches_have_a_folder_with_a_short_name(tmp_path: Path) -> None:
    tiny_model("llama", blocks=20).save_pretrained(tmp_path / "model")
    trial = Trial(Selection((), tuple((k, "attention") for k in range(2, 18))))
    batches, results = [torch.arange(3, 43).view(4, 10)], []
    for folder in (None, tmp_path / "work"):
        with BlockwiseSource(open_checkpoint(tmp_path / "model"), folder=folder) as source:
            results.append(trial_perplexities(source, batches, [trial], "perplexity")[1][0].value)
    assert results[0] == results[1]
