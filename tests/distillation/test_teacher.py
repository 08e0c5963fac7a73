"""What the original does at the places that are looked at, in memory and in files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, StreamlineError
from streamline_hooks.core import HardwareConfig
from streamline_hooks.distillation.teacher_cache import cache_teacher_states
from streamline_hooks.modeling import find_stack
from streamline_hooks.testing import tiny_model

SIZE = 2 * 7 * 32 * 4


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of states are written to an empty folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(3, 60, (2, 7)), torch.randint(3, 60, (1, 9)), torch.randint(3, 60, (2, 7))]


@pytest.mark.parametrize(("memory", "files"), [(2**20, 0), (4 * SIZE, 8), (0, 12)])
def test_states_are_the_blocks_own_wherever_they_are_kept(
    memory: int, files: int, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model, windows = tiny_model("llama"), [range(2, 4), range(5, 6)]
    with cache_teacher_states(model, batches, 2, after=windows, hardware=HardwareConfig(state_memory=memory)) as states:
        assert len(list(tmp_path.iterdir())) == files
        for batch, found in zip(batches, states.batches, strict=True):
            with torch.no_grad(), HiddenStateRecorder(model) as record:
                model(batch)
            assert torch.equal(found.entrance, record.inputs[2][0])
            assert torch.equal(found.after[0], record.outputs[3][0])
            assert torch.equal(found.after[1], record.outputs[5][0])
            assert found.exit is not None
            assert torch.equal(found.exit, record.outputs[7][0]), "the state before the final norm is meant"
    assert not list(tmp_path.iterdir()), "the files outlive their use"


def short_of_memory(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    if len(args[0]) > 1:
        raise torch.cuda.OutOfMemoryError("planted")


def state_files(folder: Path) -> list[Path]:
    """Return what is in a folder for temporary files, without the cache that PyTorch's compiler may create there."""
    return [path for path in folder.iterdir() if not path.name.startswith("torchinductor")]


@pytest.mark.parametrize("memory", [2**20, 0])
def test_out_of_memory_runs_fewer_sequences_at_a_time(
    memory: int, batches: list[torch.Tensor], tmp_path: Path, log_messages: list[str]
) -> None:
    model = tiny_model("llama")
    batches = [*batches, torch.randint(3, 60, (5, 7))]
    options = {"after": [range(2, 4)], "hardware": HardwareConfig(state_memory=memory)}
    with cache_teacher_states(model, batches, 2, **options) as expected:
        wanted = expected.batches.copy()
        find_stack(model)[6].register_forward_pre_hook(short_of_memory)
        with cache_teacher_states(model, batches, 2, **options) as states:
            assert [line.split()[5] for line in log_messages] == ["3", "2", "1"]
            assert len(state_files(tmp_path)) == (0 if memory else 24), "files of a broken pass were left"
            for found, one in zip(states.batches, wanted, strict=True):
                for mine, theirs in zip(
                    (found.entrance, *found.after, found.exit), (one.entrance, *one.after, one.exit), strict=True
                ):
                    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not state_files(tmp_path)


def test_out_of_memory_on_one_sequence_is_an_error_of_its_own(batches: list[torch.Tensor], tmp_path: Path) -> None:
    model = tiny_model("llama")
    find_stack(model)[6].register_forward_pre_hook(lambda module, args: short_of_memory(module, (torch.ones(2),)))
    with (
        pytest.raises(torch.cuda.OutOfMemoryError),
        cache_teacher_states(model, batches, 2, hardware=HardwareConfig(state_memory=0)),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_window_at_the_end_and_the_exit_are_one_place(batches: list[torch.Tensor]) -> None:
    with cache_teacher_states(tiny_model("llama"), batches, 6, after=[range(6, 8)]) as states:
        assert states.batches[0].exit is not None
        assert torch.equal(states.batches[0].after[0], states.batches[0].exit)


def test_half_the_room_in_bfloat16(batches: list[torch.Tensor], tmp_path: Path) -> None:
    narrow = HardwareConfig(state_dtype="bfloat16", state_memory=0)
    with cache_teacher_states(tiny_model("llama"), batches, 2, exits=False, hardware=narrow) as states:
        assert {state.entrance.dtype for state in states.batches} == {torch.bfloat16}
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 2 * 32 * (14 + 9 + 14)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"exits": False}, [0, 1, 2]),
        ({"exits": False, "after": [range(3, 5)]}, [0, 1, 2, 3, 4]),
        ({}, list(range(8))),
    ],
)
def test_no_block_and_no_head_is_run_that_is_not_needed(
    options: dict[str, Any], wanted: list[int], batches: list[torch.Tensor]
) -> None:
    model: Any = tiny_model("llama")
    run: list[int] = []
    for k, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, k=k: run.append(k))
    model.lm_head.register_forward_hook(lambda *_: run.append(-1))
    with cache_teacher_states(model, batches[:1], 3, **options):
        assert run == wanted


def test_a_folder_without_room_is_named(
    batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with (
        pytest.raises(StreamlineError, match=r"temporary file.*Increase state_memory"),
        cache_teacher_states(tiny_model("llama"), batches, 2, hardware=HardwareConfig(state_memory=0)),
    ):
        pass


def test_a_full_disk_is_told_before_anything_is_written_to_it(
    batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a mapping without room behind it would end the process by a signal."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with (
        pytest.raises(StreamlineError, match=r"No space left on device.*Increase state_memory"),
        cache_teacher_states(tiny_model("llama"), batches, 2, hardware=HardwareConfig(state_memory=0)),
    ):
        pass
    assert not list(tmp_path.iterdir())
