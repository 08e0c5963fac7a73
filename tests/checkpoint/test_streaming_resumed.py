"""A pass that was interrupted goes on at its block, and comes to the same."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import StreamlineError, find_stack, profile
from streamline_hooks.checkpoint import BlockwiseSource
from streamline_hooks.checkpoint.offloaded import PassJournal, open_checkpoint
from streamline_hooks.checkpoint.streaming import BlockwisePass, StateStorage
from streamline_hooks.core import write_json
from streamline_hooks.pipeline import BlockwiseOptions, compress_checkpoint
from streamline_hooks.statistics import measure_moments
from tests.checkpoint.block_by_block import (  # noqa: F401
    AMOUNTS,
    blockwise,
    calibration,
    compressible,
    places,
    reader,
    reads,
    written,
)
from tests.configured import configured
from tests.processes import in_a_new_process
from tests.tiny_models import tokens

compressing = sys.modules[compress_checkpoint.__module__]


class Interrupted(Exception):
    pass


def interrupted_at(model: Any, block: int, forward: int) -> Any:
    """From the forward of this number on, a block breaks off."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > forward:
            raise Interrupted

    return find_stack(model)[block].register_forward_hook(hook)


def blocks_read(reads: Counter[str]) -> dict[int, int]:  # noqa: F811
    """How often the up projection of each block was read."""
    return {k: reads[f"model.layers.{k}.mlp.up_proj.weight"] for k in range(6)}


@pytest.mark.sample(2)
@pytest.mark.parametrize("block", [0, 2, 5])
@pytest.mark.parametrize("forward", [1, 3])  # of the probe and four batches, in the middle of the states
def test_a_profile_goes_on(block: int, forward: int, tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, whole = written(tmp_path)
    model, states = open_checkpoint(folder), tmp_path / "states"
    handle = interrupted_at(model, block, forward + 1)  # and the whole model's forward before
    with pytest.raises(Interrupted):
        blockwise(profile, model, calibration(), folder=states)
    handle.remove()
    reads.clear()
    found = blockwise(profile, open_checkpoint(folder), calibration(), folder=states)
    # Values for the fingerprint are looked at, of every block; then the rest runs, and the check is not made again.
    looked = min(blocks_read(reads).values()) if block else blocks_read(reads)[0] - 1
    assert blocks_read(reads) == {k: looked + (k >= block) for k in range(6)}
    wanted = profile(whole, calibration())
    for name, value in found.sums.state_dict().items():
        torch.testing.assert_close(value, wanted.sums.state_dict()[name], rtol=1e-9, atol=1e-9)
    assert not states.exists(), "the folder is taken away in the end"


def test_parts_that_are_done_are_not_run_again(tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, whole = written(tmp_path)
    model, states = open_checkpoint(folder), tmp_path / "states"
    options: dict[str, Any] = {"disk": 7 * 4 * 32 * 33, "folder": states, "replicates": 5}
    handle = interrupted_at(model, 1, 2 + 1 + 1)  # truth, probe and one batch; the second part has two
    with pytest.raises(Interrupted):
        blockwise(profile, model, calibration(), **options)
    handle.remove()
    assert len(list(states.glob("part_0000_*.safetensors"))) == 1
    reads.clear()
    found = blockwise(profile, open_checkpoint(folder), calibration(), **options)
    assert found.sums.similarity.count[0] == profile(whole, calibration()).tokens
    torch.testing.assert_close(found.cosine, profile(whole, calibration()).cosine, rtol=1e-9, atol=1e-9)
    assert not states.exists()


def test_the_folder_that_contains_the_states_stays(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    (tmp_path / "mine").mkdir()
    blockwise(profile, open_checkpoint(folder), calibration(), folder=tmp_path / "mine" / "states")
    assert list((tmp_path / "mine").iterdir()) == []


def test_parts_of_other_batches_are_not_taken(tmp_path: Path) -> None:
    folder, whole = written(tmp_path)
    others = [tokens(2, 9, seed=7), tokens(3, 9, seed=8), tokens(2, 9, seed=9), tokens(1, 9, seed=10)]
    with BlockwiseSource(open_checkpoint(folder), disk=7 * 4 * 32 * 33, folder=tmp_path / "states") as source:
        assert len(source.groups(calibration(), 6)) > 1
        found = [profile(source, batches) for batches in (calibration(), others)]
    for one, batches in zip(found, (calibration(), others), strict=True):
        torch.testing.assert_close(one.cosine, profile(whole, batches).cosine, rtol=1e-9, atol=1e-9)


def test_sums_of_other_options_are_not_taken(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    model, states, windows = open_checkpoint(folder), tmp_path / "states", [range(1, 3), range(2, 5)]
    handle = interrupted_at(model, 4, 2 + 1 + 1)
    with pytest.raises(Interrupted):
        blockwise(measure_moments, model, calibration(), windows, folder=states)
    handle.remove()
    assert list(states.rglob("sums_0000_*.safetensors"))
    with pytest.raises(StreamlineError, match="another pass: sums was"):
        blockwise(measure_moments, open_checkpoint(folder), calibration(), windows, weighted=False, folder=states)


@pytest.mark.sample(1)
@pytest.mark.parametrize("step", ["profile", "verify", "measure"])
def test_states_are_there_until_the_result_is(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed where a step of a compression is over and about to be kept, it runs no block of that step again."""
    folder, out, work = compressible(tmp_path), tmp_path / "out", tmp_path / "work"
    tokenizer, texts = reader()
    given: dict[str, Any] = {"tokenizer": tokenizer, "blockwise": BlockwiseOptions(work_folder=work)}
    run: list[int] = []
    advance, cached = BlockwisePass.advance, BlockwiseSource.cached
    monkeypatch.setattr(BlockwisePass, "advance", lambda self, place: (run.append(place), advance(self, place))[1])

    def breaking_off(*_: Any) -> Any:
        raise Interrupted

    def broken(self: BlockwiseSource, name: str, make: Any, write: Any, read: Any) -> Any:
        return cached(self, name, make, breaking_off if name == step else write, read)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(BlockwiseSource, "cached", broken)
        compress_checkpoint(folder, texts, configured(**AMOUNTS), output=out, **given)
    before = list(run)
    compress_checkpoint(folder, texts, configured(**AMOUNTS), output=out, **given)
    assert not work.exists()
    again = run[len(before) :]
    run.clear()
    compress_checkpoint(folder, texts, configured(**AMOUNTS), output=tmp_path / "at once", **given)
    assert before + again == run, "nothing was run twice"


KILLED = """
    import os, sys
    from pathlib import Path
    from streamline_hooks import find_stack
    from streamline_hooks.checkpoint import open_checkpoint, BlockwisePass, StateStorage
    from tests.checkpoint.block_by_block import calibration
    model, calls = open_checkpoint(sys.argv[1]), []
    def kill(*_):
        calls.append(1)
        if len(calls) == 4:
            os._exit(9)
    find_stack(model)[3].register_forward_hook(kill)
    with BlockwisePass(model, calibration(), storage=StateStorage(folder=Path(sys.argv[2]))) as states:
        for place in states:
            states.drop(place - 1)
"""


def test_a_killed_process_leaves_what_another_one_goes_on_with(tmp_path: Path) -> None:
    folder, whole = written(tmp_path)
    killed = in_a_new_process(KILLED, folder, tmp_path / "states", check=False)
    assert killed.returncode == 9, killed.stderr
    assert len(list((tmp_path / "states" / "place_0004").iterdir())) < len(calibration()), "half of a place is there"
    wanted, seen = places(whole, calibration()), []
    with BlockwisePass(
        open_checkpoint(folder), calibration(), storage=StateStorage(folder=tmp_path / "states")
    ) as states:
        for place in states:
            seen.append(place)
            for number, of_batch in enumerate(wanted):
                assert torch.equal(states.read(place, number), of_batch[place])
        (tmp_path / "states" / "notes.txt").write_text("mine")
        states.delete_folder()
    assert seen == [3, 4, 5, 6]
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["notes.txt"], "only what it wrote is gone"


def begun(folder: Path, states: Path) -> None:
    with BlockwisePass(open_checkpoint(folder), calibration(), storage=StateStorage(folder=states)) as one:
        for place in one:
            if place == 2:
                break


def test_another_pass_is_not_gone_on_with(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    begun(folder, tmp_path / "states")
    model, states = open_checkpoint(folder), tmp_path / "states"
    with pytest.raises(StreamlineError, match=r"batches was \w+ and is \w+.*Choose"):
        BlockwisePass(model, calibration()[:2], storage=StateStorage(folder=states))
    with pytest.raises(StreamlineError, match="stop was 6 and is 4"):
        BlockwisePass(model, calibration(), stop=4, storage=StateStorage(folder=states))
    other, _ = written(tmp_path, "qwen3")
    with pytest.raises(StreamlineError, match=r"LlamaForCausalLM.*Qwen3ForCausalLM"):
        BlockwisePass(open_checkpoint(other), calibration(), storage=StateStorage(folder=states))


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    begun(folder, tmp_path / "states")
    file = tmp_path / "states" / "place_0002" / "batch_000001.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with BlockwisePass(
        open_checkpoint(folder), calibration(), storage=StateStorage(folder=tmp_path / "states")
    ) as states:
        with pytest.raises(StreamlineError, match=r"batch_000001.safetensors.*Delete"):
            list(states)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StreamlineError, match=r"not empty.*pass.json"):
        PassJournal(tmp_path, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    write_json(tmp_path / "pass.json", {"run": 3})
    with pytest.raises(StreamlineError, match=r"pass.json is damaged"):
        PassJournal(tmp_path, {})
