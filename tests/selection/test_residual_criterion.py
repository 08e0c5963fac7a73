"""The repaired residual against ridge regression in NumPy on the states themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError, UnsupportedSurgery
from streamline_hooks.repair import RIDGES
from streamline_hooks.selection.model_criteria import repaired_residual
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.testing import tiny_model as tiny
from tests.selection.test_state_criteria import states_of
from tests.tiny_models import BLOCKS, FAMILIES, padded, tiny_model

WINDOWS = [range(0, 2), range(1, 4), range(3, BLOCKS)]


def reference(sequences: list[list[np.ndarray]], w: range) -> float:
    """Relative squared error on the last fifth, of the ridge that is best there, fitted on the others."""
    held = max(1, len(sequences) // 5)
    parts = []
    for some in (sequences[:-held], sequences[-held:]):
        x, y = (np.concatenate([s[k] for s in some]) for k in (w.start, w.stop))
        weight = 1 / np.linalg.norm(y, axis=-1, keepdims=True)
        parts.append((x * weight, (y - x) * weight))
    (x, d), (x_held, d_held) = parts
    gram = x.T @ x
    errors = []
    for ridge in RIDGES:
        w_map = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ d)
        errors.append(((d_held - x_held @ w_map) ** 2).sum(-1).mean())
    return -min(errors)


@given(
    st.sampled_from(FAMILIES),
    st.lists(st.integers(4, 9), min_size=2, max_size=11),
    st.integers(1, 11),
    st.sampled_from(["left", "right"]),
)
def test_it_equals_numpy(family: str, lengths: list[int], size: int, side: str) -> None:
    """Whatever the batches: which sequences are held out does not depend on how they are cut."""
    model, batch = tiny_model(family, torch.float64), padded(lengths, side)
    expected = [reference(states_of(model, batch), w) for w in WINDOWS]
    batches = [{k: v[at : at + size] for k, v in batch.items()} for at in range(0, len(lengths), size)]
    model.train()
    got = score_windows("repaired_residual", WINDOWS, model=model, batches=batches)
    assert model.training
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-10)


def test_the_pass_ends_after_the_last_block_needed() -> None:
    model, called = tiny_model("llama"), []
    for k, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda m, a, o, k=k: called.append(k))
    repaired_residual(model, [padded([5, 5], "left")], [range(0, 2), range(1, 4)])
    assert called == [0, 1, 2, 3]


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(StreamlineError, match=r"1 sequences.*Expected at least two"):
        repaired_residual(tiny_model("llama"), [padded([5], "left")], WINDOWS)
    with pytest.raises(UnsupportedSurgery, match=r"the layout .*without a repair"):
        repaired_residual(tiny("gemma3n_text"), [padded([5, 5], "left")], [range(1, 2)])
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(StreamlineError, match=r"block 3.*NaN"):
        repaired_residual(model, [padded([5, 5], "left")], [range(1, 4)])
