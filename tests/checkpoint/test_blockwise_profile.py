"""A profile made block by block is that of the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamline_hooks import StreamlineError, profile
from streamline_hooks.checkpoint import load
from streamline_hooks.checkpoint.offloaded import open_checkpoint
from streamline_hooks.selection import Selection, verify_shortlist
from streamline_hooks.statistics import check_profile
from tests.checkpoint.block_by_block import FAMILIES, blockwise, calibration, written
from tests.tiny_models import tiny_model


def require_equal(one: Any, other: Any) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(theirs[name]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "memory"), list(zip(FAMILIES, [0, 2**30, 2**30, 0], strict=True)))
def test_profile(family: str, memory: int, tmp_path: Path) -> None:
    folder, whole = written(tmp_path, family)
    model = open_checkpoint(folder)
    found = blockwise(profile, model, calibration(), replicates=20, memory=memory)
    wanted = profile(whole, calibration(), replicates=20)
    require_equal(found.sums, wanted.sums)
    assert found.about == wanted.about
    check_profile(found, whole)
    found.merge(wanted)  # the fingerprints are one


def masks() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(b if isinstance(b, Tensor) else b["input_ids"]).shape for b in calibration()]
    return [torch.rand(shape, generator=generator) < 0.6 for shape in shapes]


@pytest.mark.parametrize(
    "options",
    [{"tokens": "last"}, {"tokens": masks()}, {"skip": 2}, {"protect": [-1, -2]}, {"protect": [0], "replicates": 0}],
    ids=str,
)
def test_options_of_a_profile(options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    found = blockwise(profile, model, calibration(), memory=10_000, **options)
    wanted = profile(model, calibration(), **options)
    require_equal(found.sums, wanted.sums)
    assert found.about == wanted.about and found.num_boundaries == wanted.num_boundaries


def test_parts_give_the_same(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "gemma3", torch.bfloat16)
    sizes = [7 * 2 * 32 * n for n in (33, 18, 14, 20)]
    found = blockwise(profile, open_checkpoint(folder), calibration(), disk=max(sizes))
    require_equal(found.sums, profile(load(folder, dtype="auto"), calibration()).sums)
    with pytest.raises(StreamlineError, match=rf"disk={max(sizes) - 1:,}.*{max(sizes):,}"):
        blockwise(profile, open_checkpoint(folder), calibration(), disk=max(sizes) - 1)
    assert found.sequences == whole_sequences()


def whole_sequences() -> int:
    return sum(len(b if isinstance(b, Tensor) else b["input_ids"]) for b in calibration())


def test_what_is_not_needed_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entering, leaving, and the entrance of a window that is not over: three places at the most."""
    from streamline_hooks.checkpoint.offloaded import StateStore

    held: set[int] = set()
    most = 0
    keep, drop = StateStore.keep, StateStore.drop

    def keeping(self: StateStore, place: int, batch: int, state: Tensor) -> None:
        nonlocal most
        held.add(place)
        most = max(most, len(held))
        keep(self, place, batch, state)

    def dropping(self: StateStore, place: int) -> None:
        held.discard(place)
        drop(self, place)

    monkeypatch.setattr(StateStore, "keep", keeping)
    monkeypatch.setattr(StateStore, "drop", dropping)
    texts = calibration()[:2], calibration()[2:3], calibration()[3:]
    blockwise(verify_shortlist, tiny_model("llama"), [Selection((range(1, 5),))], *texts, check=False)
    assert most == 3


def test_arguments_that_do_not_fit() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=r"tokens='some' is unknown"):
        blockwise(profile, model, calibration(), tokens="some")  # type: ignore[arg-type]
    with pytest.raises(StreamlineError, match=r"1 masks.*4 batches"):
        blockwise(profile, model, calibration(), tokens=masks()[:1])
    with pytest.raises(StreamlineError, match="skip=-1.*at least 0"):
        blockwise(profile, model, calibration(), skip=-1)
    with pytest.raises(StreamlineError, match="holds no token"):
        blockwise(profile, model, [])


def test_a_disk_without_room_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamline_hooks.checkpoint import offloaded

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(offloaded.shutil, "disk_usage", lambda _: usage)
    size = 7 * 4 * 32 * (33 + 18 + 14 + 20)
    with pytest.raises(StreamlineError, match=rf"{size:,} bytes.*{size:,} are.*1,000"):
        blockwise(profile, tiny_model("llama"), calibration(), folder=tmp_path / "states")
    with pytest.raises(StreamlineError, match=rf"{size:,} bytes.*{size - 50:,} are"):
        blockwise(profile, tiny_model("llama"), calibration(), memory=50)
    assert blockwise(profile, tiny_model("llama"), calibration(), memory=size).tokens > 0
