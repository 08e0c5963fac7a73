"""Block by block, searches that run the model find what they find in memory: greedy removal, and single branches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import StreamlineError, UnsupportedSurgery, find_stack, load
from streamline_hooks.checkpoint import open_checkpoint
from streamline_hooks.pipeline.step_files import read_selections, read_verified, write_selections, write_verified
from streamline_hooks.repair import (
    FoldedConfig,
    FoldedMap,
    LinearConfig,
    NoneConfig,
    ScaleConfig,
    ScaleFactor,
    fit_branch_linear,
)
from streamline_hooks.selection import Selection, verify_shortlist
from streamline_hooks.statistics import measure_branches
from tests.checkpoint.block_by_block import AMOUNTS, blockwise, calibration, compressible, written
from tests.pipeline.test_checkpoint_folded import break_off, compare
from tests.pipeline.test_compress_checkpoint import Interrupted, require_same_bytes, run, weights_in
from tests.tiny_models import padded, tiny_model, tokens

algorithms = sys.modules["streamline_hooks.selection.search_algorithms"]
compressing = sys.modules["streamline_hooks.pipeline.one_round"]
FIT, HELD_OUT = calibration(), [tokens(3, 9, seed=7), padded([8, 4], "right")]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("search", "options"),
    [
        ("greedy", {"shortlist": 1, "remove": 3}),
        ("attention", {"shortlist": 2}),
        ("mlp", {"repair": "none", "shortlist": 2}),
    ],
)
def test_it_is_what_is_compressed_in_memory(search: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = compressible(tmp_path)
    options = {**AMOUNTS, "protect": (0,), "search": search, "speed": False, "generation": False, **options}
    found = run(folder, tmp_path / "apart", work_folder=tmp_path / "work", **options)
    compare(found, folder, tmp_path / "whole", options)
    chosen = found.candidates[0]
    assert len(chosen.blocks) + len(chosen.zeroed) == options["remove"]
    if search != "greedy":
        zero = {name for name, weight in weights_in(tmp_path / "apart").items() if not weight.any()}
        writer = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}[search]
        assert zero == {f"model.layers.{k}.{writer}.weight" for k, _ in chosen.zeroed}
        assert len(chosen.maps) == (options["remove"] if search == "attention" else 0)


def test_rounds_that_are_finished_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, work = compressible(tmp_path), tmp_path / "work"
    options: dict[str, Any] = {"search": "greedy", "shortlist": 1, "remove": 3}
    run(folder, tmp_path / "at once", **options)
    original, rounds = algorithms.measure_profile, []

    def interrupted(*args: Any, **given: Any) -> Any:
        rounds.append(len(args[0].stack))
        if len(rounds) == 2:
            raise Interrupted
        return original(*args, **given)

    monkeypatch.setattr(algorithms, "measure_profile", interrupted)
    with pytest.raises(Interrupted):
        run(folder, tmp_path / "in parts", work_folder=work, **options)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(compressing, "distributed_verify", break_off)
        run(folder, tmp_path / "in parts", work_folder=work, **options)
    run(folder, tmp_path / "in parts", work_folder=work, **options)
    assert rounds == [5, 4, 4] and not work.exists()
    require_same_bytes(tmp_path / "in parts", tmp_path / "at once")


def test_branches_are_measured_and_fitted_as_in_memory(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    whole, model = load(folder), open_checkpoint(folder)
    scores = blockwise(measure_branches, model, FIT, memory=4000)
    wanted = measure_branches(whole, FIT)
    assert torch.equal(scores.tokens, wanted.tokens) and bool(scores.tokens.all())
    torch.testing.assert_close(scores.cosine, wanted.cosine, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores.magnitude, wanted.magnitude, rtol=1e-6, atol=1e-6)
    halves: list[Any] = [(1, "attention"), (1, "mlp"), (4, "mlp")]
    found = blockwise(fit_branch_linear, model, halves, FIT, HELD_OUT, memory=0)
    for one, other in zip(found, fit_branch_linear(whole, halves, FIT, HELD_OUT), strict=True):
        assert (one.block, one.branch, one.is_first, one.ridge) == (
            other.block,
            other.branch,
            other.is_first,
            other.ridge,
        )
        torch.testing.assert_close(one.map, other.map, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [LinearConfig(), FoldedConfig(), ScaleConfig()])
def test_verified_selections_are_read_as_they_were_written(kind: Any, tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    windows = range(1, 2), range(3, 5)  # the first one is shared by two selections
    selections = [
        Selection((range(2, 4),), ((5, "mlp"),), 0.5),
        Selection(windows, (), 0.25),
        Selection((windows[0],), ((5, "mlp"),), 0.0),
    ]
    judged = verify_shortlist(model, selections, FIT, HELD_OUT, FIT[:1], replacement=kind)
    write_verified(judged, tmp_path / "verified")
    found = read_verified(find_stack(model), kind, tmp_path / "verified")
    for one, other in zip(found, judged, strict=True):
        assert (one.windows, one.zeroed, one.score) == (other.windows, other.zeroed, other.score)
        assert (one.distance, one.refused) == (other.distance, other.refused)
        for repair, wanted in zip([*one.repairs, *one.maps], [*other.repairs, *other.maps], strict=True):
            mine, theirs = vars(repair), vars(wanted)
            for name, value in theirs.items():
                module = mine[name]
                if isinstance(value, torch.nn.Module):
                    torch.testing.assert_close(module.state_dict(), value.state_dict(), rtol=0, atol=0)
                elif isinstance(value, (FoldedMap, ScaleFactor)):
                    assert type(module) is type(value) and module.window == repair.window
                    assert module.removal_error == value.removal_error
                    same = "scaled_error" if isinstance(value, ScaleFactor) else "held_out_error"
                    assert getattr(module, same) == getattr(value, same)
                    number = "factor" if isinstance(value, ScaleFactor) else "map"
                    assert torch.equal(*(torch.as_tensor(getattr(one, number)) for one in (module, value)))
                else:
                    assert torch.equal(module, value) if isinstance(value, torch.Tensor) else module == value
    assert sum(len(one.maps) for one in judged) == 2 * int(kind.replaces_branches)
    write_selections(selections, tmp_path / "found")
    assert read_selections(tmp_path / "found") == selections


def test_a_pass_without_other_branches_is_not_continued(tmp_path: Path) -> None:
    """Outputs are zeroed by hooks, which do not show in the weights."""
    folder, _ = written(tmp_path)
    texts = FIT[:1], HELD_OUT[:1], FIT[1:2]

    def verify(source: Any, half: Any) -> None:
        def judge() -> Any:
            return verify_shortlist(source, [Selection((), (half,))], *texts, replacement=NoneConfig())

        source.cached("verify", judge, break_off, break_off)

    options: dict[str, Any] = {"check": False, "folder": tmp_path / "states"}
    with pytest.raises(Interrupted):
        blockwise(verify, open_checkpoint(folder), (1, "mlp"), **options)
    with pytest.raises(StreamlineError, match=r"another pass: zeroed was .*layers.1.mlp.* and is .*layers.2.mlp"):
        blockwise(verify, open_checkpoint(folder), (2, "mlp"), **options)


def test_a_criterion_that_runs_the_model_is_refused(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    with pytest.raises(UnsupportedSurgery, match=r"'kl' runs the model.*on disk.*cosine"):
        blockwise(algorithms.greedy, open_checkpoint(folder), FIT, "kl", 2)
