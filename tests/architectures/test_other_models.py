"""The contracts of surgery, repair and checkpoints on models that are no causal language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import (
    LayerSurgeon,
    LinearReplacement,
    UnsupportedSurgery,
    find_stack,
    fit_windows,
    load,
    perplexity,
    read_plans,
    save,
)
from streamline_hooks.evaluation.perplexity import perplexity_of_candidates
from streamline_hooks.hidden_state import read_input, write_input
from streamline_hooks.repair import student_of, train
from tests.other_models import OTHERS, answer, made


@pytest.mark.parametrize("name", OTHERS)
def test_an_identity_changes_nothing_and_a_removal_is_undone(name: str) -> None:
    model = made(name)
    stack = OTHERS[name].path(model)
    before, weights = answer(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    with LayerSurgeon(model, stack) as surgeon:
        surgeon.insert(2, torch.nn.Identity())
        assert torch.equal(answer(model, name), before)
    with LayerSurgeon(model, stack) as surgeon:
        surgeon.remove([1])
        assert not torch.allclose(answer(model, name), before, atol=1e-3)
    assert torch.equal(answer(model, name), before) and model.config.to_dict() == config
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_committed_is_loaded(name: str, repaired: bool, tmp_path: Path) -> None:
    model, case = made(name), OTHERS[name]
    length = len(find_stack(model, case.path(model)))
    with LayerSurgeon(model, case.path(model)) as surgeon:
        if repaired:
            map_ = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
            surgeon.replace(case.removed, LinearReplacement.from_map(map_))
        else:
            surgeon.remove(case.removed)
        surgeon.commit()
    expected = answer(model, name)
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved").eval()
    assert torch.equal(answer(loaded, name), expected)
    assert len(find_stack(loaded, case.path(loaded))) == length - len(case.removed)
    assert read_plans(loaded)[0].removed == case.removed
    assert type(loaded).__name__ == ("Streamlined" if repaired else "") + type(made(name)).__name__


@pytest.mark.parametrize("name", ["llava pictures", "vit", "clip text"])
def test_a_factor_is_shown_on_what_runs_the_stack(name: str) -> None:
    """LLaVA takes its pictures' features without a norm, so that what is multiplied there cannot be divided out."""
    model = made(name)
    with LayerSurgeon(model, OTHERS[name].path(model)) as surgeon:
        truth = scaled_by_hook(model, name)
        try:
            surgeon.scale(2, 4.0)
        except UnsupportedSurgery as refusal:
            assert name == "llava pictures", refusal
        else:
            torch.testing.assert_close(answer(model, name), truth, rtol=1e-3, atol=1e-3)


def scaled_by_hook(model: Any, name: str) -> torch.Tensor:
    """What a model says with the state before block 2 multiplied by 4."""
    block = find_stack(model, OTHERS[name].path(model))[2]

    def enter(_: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return write_input(args, kwargs, 4.0 * read_input(args, kwargs))

    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        return answer(model, name)
    finally:
        handle.remove()


def test_the_perplexity_of_a_tower_is_that_of_the_text() -> None:
    """The head's tokens are masked as the text is, whatever the stack."""
    model, case = made("llava pictures"), OTHERS["llava pictures"]
    original, _ = perplexity_of_candidates(model, [case.batch], [], stack=case.path(model))
    assert original.value == pytest.approx(perplexity(model, [case.batch]).value)


def test_an_encoder_and_a_decoder_are_not_trained() -> None:
    model, case = made("bart decoder"), OTHERS["bart decoder"]
    student = student_of(find_stack(model, case.path(model)), [(range(1, 2), LinearReplacement(32))])
    with pytest.raises(UnsupportedSurgery, match="is an encoder and a decoder, whose tokens have masks of their own"):
        train(student, [case.batch], [case.batch])


@pytest.mark.parametrize("name", OTHERS)
def test_a_window_is_repaired_on_its_own_tokens(name: str) -> None:
    """More tokens than features are not there, so that the map that was fitted is exact, and it is put in its place."""
    model, case = made(name), OTHERS[name]
    window = range(case.removed[0], case.removed[-1] + 1)
    (repair,) = fit_windows(model, [window], "linear", [case.batch], [case.batch], stack=case.path(model))
    assert repair.repaired_error < 0.2 * repair.removal_error
    before = answer(model, name)
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove(window)
        removed = (answer(model, name) - before).norm()
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.replace(window, repair.stand_in)
        assert (answer(model, name) - before).norm() < removed
