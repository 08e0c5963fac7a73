"""What a student knows of a text where its teacher is another model: its own entrance, and how the other ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from streamline_hooks import HiddenStateRecorder, StreamlineError, train
from streamline_hooks.core import HardwareConfig
from streamline_hooks.distillation import teacher_cache
from streamline_hooks.distillation.optimizer import cached_autocast_weights
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.teacher_cache import cache_for_student, cache_teacher_states
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model

BATCHES = [torch.arange(k, k + 24).view(2, 12) for k in (3, 13, 23)]
STATE = 2 * 12 * 32 * 4  # bytes of a batch at one place


def student() -> Student:
    return Student(tiny_model("llama"), [(range(2, 4), LinearReplacement(32))], teacher=tiny_model("llama", seed=1))


def test_there_are_the_own_entrance_and_the_other_s_end() -> None:
    one = student()
    with cache_for_student(one, BATCHES, HardwareConfig()) as states:
        found = states.batches
        assert (states.start, len(found)) == (2, 3)
    for batch, taught in zip(BATCHES, found or [], strict=False):
        with torch.no_grad(), HiddenStateRecorder(one.model, [2]) as own, HiddenStateRecorder(one.teacher, [-1]) as its:
            one.model(batch)
            one.teacher(batch)
        assert taught.exit is not None
        assert torch.equal(taught.entrance, own.inputs[2][0])
        assert torch.equal(taught.exit, next(iter(its.outputs.values()))[0])


@pytest.mark.parametrize("memory", [6 * STATE, 4 * STATE, 0])
def test_both_take_the_memory_for_one_text(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is kept that is not looked at, such as what enters the teacher's last block."""
    kept: list[int] = []
    make: Any = teacher_cache.TeacherStateStore.keep

    def keep(room: Any, state: Tensor) -> Tensor:
        found: Tensor = make(room, state)
        kept.append(state.nbytes if found is state else 0)
        return found

    monkeypatch.setattr(teacher_cache.TeacherStateStore, "keep", keep)
    with cache_for_student(student(), BATCHES, HardwareConfig(state_memory=memory)):
        assert len(kept) == 6 and sum(kept) == memory


def test_a_teacher_has_no_gradients_and_is_narrowed_too() -> None:
    one = student()
    one.teacher.lm_head.requires_grad_(False)
    with one.frozen_originals(), cached_autocast_weights([one.teacher], torch.bfloat16) as taken:
        linear = [m for m in one.teacher.modules() if isinstance(m, torch.nn.Linear)]
        assert taken == sum(m.weight.numel() for m in linear) * 2
        assert not any(p.requires_grad for p in one.teacher.parameters())
    assert [n for n, p in one.teacher.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.requires_grad for p in one.model.parameters())


def test_states_of_other_batches_are_refused() -> None:
    one = Student(tiny_model("llama"), [(range(2, 4), LinearReplacement(32))])
    with cache_teacher_states(one.model, BATCHES, one.start) as states:
        one.teacher_cache = states
        assert train(one, BATCHES, BATCHES).steps == len(BATCHES)
        with pytest.raises(StreamlineError, match="other batches, or of these in another order"):
            train(one, BATCHES[::-1], BATCHES)
