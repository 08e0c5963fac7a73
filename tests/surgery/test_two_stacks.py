"""Both stacks of a model with two: shortened one after the other, each with a repair of its own, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamline_hooks import LayerSurgeon, find_stack, fit_windows, load, save
from streamline_hooks.checkpoint import read_plans
from streamline_hooks.repair import LinearConfig
from streamline_hooks.replacements import LinearReplacement
from tests.other_models import OTHERS, answer, made

PAIRS = {
    "llava": ("llava pictures", "llava text"),
    "gemma3": ("gemma3 pictures", "gemma3 text"),
    "clip": ("clip pictures", "clip text"),
    "bart": ("bart encoder", "bart decoder"),
}
if transformers.__version__ >= "5":  # before, the cache of T5's decoder is sized by the encoder, which is refused
    PAIRS["t5"] = ("t5 encoder", "t5 decoder")


def paths(model: Any, names: tuple[str, str]) -> list[str]:
    return [OTHERS[name].path(model) for name in names]


BOTH = [(pair, (True, True)) for pair in PAIRS] + [
    (pair, repaired) for pair in ("llava", "bart") for repaired in ((False, False), (True, False), (False, True))
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("pair", "repaired"), BOTH)
def test_both_are_committed_and_come_back(pair: str, repaired: tuple[bool, bool], tmp_path: Path) -> None:
    names = PAIRS[pair]
    model = made(names[0])
    for number, path in enumerate(paths(model, names)):
        with LayerSurgeon(model, path) as surgeon:
            if repaired[number]:
                map_ = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(number))
                surgeon.replace([1 + number], LinearReplacement.from_map(map_))
            else:
                surgeon.remove([1 + number])
            surgeon.commit()
    expected = answer(model, names[0])
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert torch.equal(answer(loaded, names[0]), expected)
    assert [len(find_stack(loaded, path)) for path in paths(loaded, names)] == [3, 3]
    assert [(plan.stack, plan.removed) for plan in read_plans(loaded)] == [
        (path, (1 + number,)) for number, path in enumerate(paths(model, names))
    ]


@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_two_surgeons_at_once_are_undone_in_turn(names: tuple[str, str]) -> None:
    model = made(names[0])
    first, second = paths(model, names)
    before = answer(model, names[0])
    with LayerSurgeon(model, first) as one:
        one.remove([1])
        alone = answer(model, names[0])
        with LayerSurgeon(model, second) as other:
            other.remove([2])
            assert not torch.equal(answer(model, names[0]), alone)
        assert torch.equal(answer(model, names[0]), alone)
    assert torch.equal(answer(model, names[0]), before)


@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_the_second_is_fitted_on_what_the_first_left(names: tuple[str, str]) -> None:
    model, batch = made(names[0]), OTHERS[names[0]].batch
    first, second = paths(model, names)
    original = answer(model, names[0])
    with LayerSurgeon(model, first) as one:
        one.remove([1])
        changed = answer(model, names[0])
        (repair,) = fit_windows(model, [range(2, 3)], LinearConfig(), [batch], [batch], stack=second)
        with LayerSurgeon(model, second) as other:
            other.replace(range(2, 3), repair.replacement_module)
            repaired = (answer(model, names[0]) - changed).norm()
        with LayerSurgeon(model, second) as other:
            other.remove([2])
            removed = (answer(model, names[0]) - changed).norm()
    assert repaired < removed
    assert torch.equal(answer(model, names[0]), original)


def test_the_first_stack_is_operated_on_again(tmp_path: Path) -> None:
    """What was spliced into the other one meanwhile stays in what the configuration says."""
    model = made("clip text")
    vision, text = paths(model, PAIRS["clip"])
    for path, window in ((vision, [1]), (text, [2]), (vision, [2])):
        with LayerSurgeon(model, path) as surgeon:
            surgeon.replace(window, LinearReplacement(32))
            surgeon.commit()
    expected = answer(model, "clip text")
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert torch.equal(answer(loaded, "clip text"), expected)
    said = loaded.config.streamline_hooks
    assert said["format"] == 3 and [(e.get("stack", said["stack"]), e["block"]) for e in said["splices"]] == [
        (vision, 1),
        (vision, 1),  # behind it: the last block went
        (text, 2),
    ]
