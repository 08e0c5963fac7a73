"""The contracts of surgery, repair and checkpoints on models that are no causal language models."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack, perplexity
from streamline_hooks.distillation import student_of, train
from streamline_hooks.evaluation import perplexity_of_candidates
from streamline_hooks.modeling import BRANCHES, read_input, write_input
from streamline_hooks.replacements import LinearReplacement
from tests.architectures.other_checks import CHECKS, REFUSED, checks_of, require_restored
from tests.other_models import OTHERS, answer, made

# Transformers 4 sizes the cache of T5's decoder by the encoder, whose blocks cannot be removed then.
_SIZED_BY_ENCODER = {("t5 encoder", check) for check in ("removal", "closed form", "saved", "generate")}
_REFUSED_BEFORE_5 = _SIZED_BY_ENCODER if transformers.__version__ < "5" else set()
CASES = [case for name in OTHERS for check in checks_of(name) if (case := (name, check)) not in _REFUSED_BEFORE_5]


@pytest.mark.sample(60)
@pytest.mark.parametrize(("name", "check"), CASES, ids=[f"{name}, {check}" for name, check in CASES])
def test_it_holds_or_is_refused(name: str, check: str) -> None:
    reason = REFUSED.get(name, {}).get(check)
    if reason is None:
        CHECKS[check](name)
        return
    with pytest.raises(UnsupportedSurgery, match=re.escape(reason)):
        CHECKS[check](name)


@pytest.mark.sample(10)
@pytest.mark.parametrize(("name", "check"), [(name, check) for name in REFUSED for check in REFUSED[name]])
def test_what_is_refused_changes_nothing(name: str, check: str) -> None:
    """Each branch is refused, and to the bit the model is what it was."""
    model = made(name)
    before, weights = answer(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    for branch in BRANCHES:
        with LayerSurgeon(model, OTHERS[name].path(model)) as surgeon, pytest.raises(UnsupportedSurgery):
            surgeon.zero_branch(1, branch) if check == "zero_branch" else surgeon.fold(1, torch.eye(32), branch)
    require_restored(model, name, before, weights)


def test_a_tower_goes_on_knowing_which_blocks_attend_to_everything() -> None:
    """Qwen2.5-VL lists them by number."""
    model, case = made("qwen2.5-vl pictures"), OTHERS["qwen2.5-vl pictures"]
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove([1])
        assert list(model.config.vision_config.fullatt_block_indexes) == [1]
        assert list(surgeon.stack.ancestors[-1].fullatt_block_indexes) == [1]
    assert list(model.config.vision_config.fullatt_block_indexes) == [2]


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


def test_a_decoder_beside_an_encoder_is_trained() -> None:
    """On the decoder's own tokens."""
    model, case = made("bart decoder"), OTHERS["bart decoder"]
    student = student_of(find_stack(model, case.path(model)), [(range(1, 2), LinearReplacement(32))])
    trained = train(student, [case.batch], [case.batch])
    assert trained.distance < trained.distance_before
