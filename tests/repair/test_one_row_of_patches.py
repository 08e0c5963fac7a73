"""Stand-ins for a tower whose images all lie in one row of patches (Qwen2-VL's), without an axis for the batch."""

from __future__ import annotations

import pytest
import torch

import benchmarks.baselines  # noqa: F401 - two of the kinds are registered there
from streamline_hooks import DistillationConfig, LayerSurgeon, UnsupportedSurgery, fit_windows, profile, train
from streamline_hooks.cli import parse_replacement
from streamline_hooks.distillation import student_of
from streamline_hooks.modeling import find_stack
from streamline_hooks.repair import LinearConfig, insert_replacement
from tests.other_models import OTHERS, answer, made

NAME, EXACT = "qwen2-vl pictures", {"linear", "mlp", "swiglu", "block", "silenced", "folded", "ghosted"}


@pytest.mark.parametrize("kind", [*sorted(EXACT), "scale", "linearpatch", "feed_forward", "none"])
def test_every_kind_is_fitted_and_put_in(kind: str) -> None:
    """With fewer patches than features the map is exact, so that the model says again what it said."""
    model, case = made(NAME), OTHERS[NAME]
    before = answer(model, NAME)
    (repair,) = fit_windows(model, [range(1, 3)], parse_replacement(kind), [case.batch], [case.batch], stack="vision")
    assert (repair.repaired_error < 1e-8) == (kind in EXACT)
    with LayerSurgeon(model, "vision") as surgeon:
        surgeon.remove(range(1, 3))
        removed = (answer(model, NAME) - before).norm()
    with LayerSurgeon(model, "vision") as surgeon:
        insert_replacement(surgeon, repair.window, repair.replacement_module)
        repaired = (answer(model, NAME) - before).norm()
    assert repaired < 1e-3 * removed if kind in EXACT else repaired <= 2 * removed
    assert torch.equal(answer(model, NAME), before)


def test_the_states_are_compared_and_a_training_is_refused() -> None:
    model, case = made(NAME), OTHERS[NAME]
    measured = profile(model, [case.batch], stack="vision", replicates=0)
    assert measured.tokens == len(case.batch["pixel_values"]) and measured.value("cosine", range(1, 3)) < 0.99
    stack = find_stack(model, "vision")
    (repair,) = fit_windows(model, [range(1, 3)], LinearConfig(), [case.batch], [case.batch], stack="vision")
    student = student_of(stack, [(repair.window, repair.replacement_module)])
    with pytest.raises(UnsupportedSurgery, match="images in one row"):
        train(student, [case.batch], [case.batch], DistillationConfig({"kl": 1.0}))
