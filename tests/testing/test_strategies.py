"""The strategies give what they say, all of it, and shrink to something small."""

from __future__ import annotations

import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.testing import causal_model_types
from streamline_hooks.testing.strategies import model_types, padded_batches, windows
from tests.processes import in_a_new_process


@given(st.data())
def test_a_window_leaves_a_block_and_is_in_range(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(2, 9))
    window = data.draw(windows(blocks))
    assert window.step == 1 and 0 <= window.start < window.stop <= blocks and 1 <= len(window) < blocks


def test_every_window_can_come() -> None:
    for start in range(4):
        for stop in range(start + 1, 5):
            wanted = range(start, stop)
            if len(wanted) < 4:
                assert find(windows(4), lambda window, wanted=wanted: window == wanted) == wanted
    assert len(find(windows(3, max_length=3), lambda window: len(window) > 1)) == 2
    assert len(find(windows(5, min_length=2, max_length=2), lambda window: window.stop == 5)) == 2


@given(windows(3, max_length=3))
def test_a_block_is_left_whatever_length_is_asked_for(window: range) -> None:
    assert len(window) < 3


@given(padded_batches(20, max_rows=4, max_tokens=6, min_tokens=2, special=(0, 3), pad_token=3))
def test_padding_is_at_one_side_and_never_everything(batch: dict) -> None:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape and ids.dtype == mask.dtype and mask.sum(1).min() >= 2
    assert mask.bool().all(dim=0).any() or mask.shape[0] > 1
    left, right = bool(mask[:, -1].all()), bool(mask[:, 0].all())
    assert left or right
    steps = mask.diff(dim=1)
    assert ((steps >= 0).all() if left else (steps <= 0).all()) and mask.sum(1).max() == mask.shape[1]
    assert (ids[mask == 0] == 3).all()
    assert not {0, 3} & set(ids[mask == 1].tolist()) and ids.max() < 20


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_can_be_chosen(side: str) -> None:
    batch = find(padded_batches(9, sides=[side]), lambda b: bool((b["attention_mask"] == 0).any()))
    assert batch["attention_mask"].tolist() in ([[0, 1], [1, 1]], [[1, 1], [0, 1]], [[1, 0], [1, 1]], [[1, 1], [1, 0]])
    assert bool(batch["attention_mask"][:, -1 if side == "left" else 0].all())


@given(model_types(without=["llama"]))
def test_model_types(name: str) -> None:
    assert name in causal_model_types() and name != "llama"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: windows(1), "1 to 0 of 1 blocks"),
        (lambda: windows(3, min_length=3, max_length=3), "3 to 2 of 3 blocks"),
        (lambda: windows(5, min_length=4, max_length=3), "4 to 3 of 5 blocks"),
        (lambda: padded_batches(3), "0 ordinary tokens"),
        (lambda: padded_batches(9, sides=["middle"]), "'left' and 'right'"),
        (lambda: padded_batches(9, sides=[]), "'left' and 'right'"),
        (lambda: padded_batches(9, min_tokens=4, max_tokens=3), "4 to 3 tokens"),
        (lambda: model_types(among=["no-such-type"]), "No model type"),
    ],
)
def test_what_cannot_be_drawn_is_said_at_once(call: object, words: str) -> None:
    with pytest.raises(StreamlineError, match=words):
        call()  # type: ignore[operator]


def test_hypothesis_is_needed_for_the_strategies_alone() -> None:
    done = in_a_new_process(
        """
        import sys
        import streamline_hooks.testing
        print("assert_causal" in dir(streamline_hooks.testing), "hypothesis" in sys.modules)
        sys.modules["hypothesis"] = None
        try:
            import streamline_hooks.testing.strategies
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert done.stdout.splitlines()[0] == "True False"
    assert "pip install hypothesis" in done.stdout
