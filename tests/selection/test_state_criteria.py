"""Criteria that are read off a profile, against NumPy on the states themselves."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError, find_stack
from streamline_hooks.selection.criteria import CRITERIA
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.statistics import profile
from tests.tiny_models import BLOCKS, FAMILIES, padded, shuffled_batches, tiny_model

WINDOWS = [range(0, 1), range(1, 4), range(2, BLOCKS), range(0, BLOCKS)]
NAMES = ["cosine", "angular", "last_angular", "block_influence", "relative_magnitude"]


def states_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[list[np.ndarray]]:
    """For each sequence, run alone and without padding, its states at each place, to the last block's own output."""
    states: list[np.ndarray] = []

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[0].double().numpy())

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0].double().numpy())

    blocks = find_stack(model).blocks
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(leave))
    with torch.no_grad():
        for ids, mask in zip(*batch.values(), strict=True):
            model(ids[mask.bool()][None])
    for handle in handles:
        handle.remove()
    return [states[at : at + BLOCKS + 1] for at in range(0, len(states), BLOCKS + 1)]


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def reference(name: str, sequences: list[list[np.ndarray]], w: range) -> float:
    a, b = w.start, w.stop
    together = [np.concatenate([s[k] for s in sequences]) for k in range(BLOCKS + 1)]
    match name:
        case "cosine":
            return cosines(together[a], together[b]).mean()
        case "angular":
            return 1 - np.arccos(cosines(together[a], together[b])).mean() / np.pi
        case "last_angular":
            return 1 - np.mean([np.arccos(cosines(s[a][-1], s[b][-1])) for s in sequences]) / np.pi
        case "block_influence":
            return -sum(1 - cosines(together[k], together[k + 1]).mean() for k in w)
        case "relative_magnitude":
            change = [together[k + 1] - together[k] for k in range(BLOCKS)]
            ratios = [
                np.linalg.norm(c, axis=-1) / np.linalg.norm(x, axis=-1)
                for c, x in zip(change, together[:-1], strict=True)
            ]
            return -sum(ratios[k].mean() for k in w)
    raise AssertionError(name)


@given(
    st.sampled_from(FAMILIES),
    st.lists(st.integers(2, 8), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from(["left", "right"]),
    st.randoms(),
)
def test_they_equal_numpy(family: str, lengths: list[int], size: int, side: str, random: Random) -> None:
    """Whatever the batches, their order and the side of the padding; in training mode as in evaluation."""
    model, batch = tiny_model(family, torch.float64), padded(lengths, side)
    states = states_of(model, batch)
    model.train()
    found = profile(model, shuffled_batches(batch, size, random), replicates=0)
    assert model.training
    for name in NAMES:
        expected = [reference(name, states, w) for w in WINDOWS]
        assert score_windows(name, WINDOWS, profile=found) == pytest.approx(expected, rel=1e-6, abs=2e-8), name


def test_a_saved_profile_is_enough(tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), [padded([6, 4], "left")]
    path = profile(model, batches, replicates=0).save(tmp_path / "profile.safetensors")
    loaded = type(profile(model, batches)).load(path)
    for name in NAMES:
        assert score_windows(name, WINDOWS, profile=loaded) == score_windows(
            name, WINDOWS, model=model, batches=batches
        )


def test_a_window_that_the_profile_does_not_cover() -> None:
    some = profile(tiny_model("llama"), [padded([6, 4], "left")], protect=[-1])
    for name in NAMES:
        with pytest.raises(StreamlineError, match=r"5 is.*blocks 0.*4"):
            CRITERIA[name].score(some, range(2, 6))
