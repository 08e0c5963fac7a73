"""A student and its teacher share one model: each must be what it would be alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from streamline_hooks import HealingConfig, HiddenStateRecorder, LayerSurgeon, StreamlineError, UnsupportedSurgery
from streamline_hooks.cli import parse_healing
from streamline_hooks.core import HardwareConfig, prepare_inputs
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.healing import student_of
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.train import train
from streamline_hooks.modeling import find_stack
from streamline_hooks.repair import FoldedConfig, ScaleConfig, WindowReplacement, fit_windows, insert_replacement
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
}
REAL = BATCH["attention_mask"].bool()


def linear(seed: int = 0) -> LinearReplacement:
    torch.manual_seed(seed)
    return LinearReplacement.from_map(torch.randn(32, 32) * 0.1)


def entering(model: nn.Module, k: int) -> torch.Tensor:
    with torch.no_grad(), HiddenStateRecorder(model, [k], sites=["block.input"], stop=True) as record:
        record(**BATCH)
    return record.inputs[k][0]


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    run: list[int] = []
    handles = [block.register_forward_hook(lambda *_, k=k: run.append(k)) for k, block in enumerate(model.model.layers)]
    yield run
    for handle in handles:
        handle.remove()


STUDENTS = {
    "one window": [(range(2, 4), 0)],
    "two windows": [(range(1, 2), 0), (range(4, 6), 1)],
    "at the end": [(range(6, 8), 0)],
    "the first blocks": [(range(0, 2), 0)],
    "with a slot": [(range(3, 5), "block")],
    "removed": [(range(3, 5), None)],
}


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("type_", ["llama", "gpt2", "opt"])
def test_both_say_what_they_say_alone(name: str, type_: str) -> None:
    model: Any = tiny_model(type_)
    blocks = Student(model, [(range(2, 4), linear())]).stack.blocks
    features = entering(model, 0).shape[-1]
    replacement_modules: list[Any] = []
    for window, what in STUDENTS[name]:
        module = copy.deepcopy(blocks[window.start]) if what == "block" else None
        if isinstance(what, int):
            torch.manual_seed(what)
            module = LinearReplacement.from_map(torch.randn(features, features) * 0.1)
        replacement_modules.append((window, module))
    student = Student(model, replacement_modules)
    entrance = entering(model, student.start)
    with torch.no_grad():
        ours = student.run(entrance, BATCH, logits=True, states=True)
        mask = {"attention_mask": BATCH["attention_mask"]}
        positions = (BATCH["attention_mask"].cumsum(1) - 1).clamp(min=0)
        given = {"input_ids": BATCH["input_ids"], **mask, "position_ids": positions} if type_ != "opt" else BATCH
        with HiddenStateRecorder(model) as record:
            wanted = model(**given).logits
        original = student.original_answers(record.outputs[len(student.stack) - 1][0], BATCH)
        torch.testing.assert_close(original, wanted[REAL])
        with LayerSurgeon(model) as surgeon:
            for window, module in replacement_modules:
                surgeon.replace(window, module)
            torch.testing.assert_close(ours[0].logits[REAL], model(**given).logits[REAL])
    assert len(ours[1]) == len(replacement_modules)
    assert not torch.equal(ours[0].logits[REAL], original)
    for state, (window, _) in zip(ours[1], replacement_modules, strict=True):
        theirs = record.outputs[window.stop - 1][0]
        assert state.shape == theirs.shape
        assert not torch.equal(state[REAL], theirs[REAL])


def test_the_state_after_a_window_is_what_the_stand_in_made_of_the_entrance() -> None:
    model, module = tiny_model("llama"), linear()
    student = Student(model, [(range(2, 4), module)])
    entrance = entering(model, 2)
    _, (state,) = student.run(entrance, BATCH, logits=False, states=True)
    assert torch.equal(state, module(entrance))
    assert state.requires_grad


@pytest.mark.parametrize(("logits", "wanted"), [(False, []), (True, [4, 5, 6, 7])])
def test_no_block_is_run_that_is_not_needed(logits: bool, wanted: list[int]) -> None:
    model = tiny_model("llama")
    student = Student(model, [(range(2, 4), linear())])
    entrance = entering(model, 2)
    head: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: head.append(1))
    with torch.no_grad(), counted(model) as run:
        student.run(entrance, BATCH, logits=logits, states=not logits)
    assert run == wanted
    assert len(head) == logits


def test_copies_of_blocks_are_trained_and_the_teacher_keeps_its_own() -> None:
    model: Any = tiny_model("llama")
    block = copy.deepcopy(model.model.layers[5])
    student = Student(model, [(range(2, 4), linear())], copies={5: block})
    entrance = entering(model, 2)
    leaving = entering(model, 0)
    with torch.no_grad():
        before = student.original_answers(leaving, BATCH)
        first, _ = student.run(entrance, BATCH, logits=True, states=False)
        for parameter in block.parameters():
            parameter.mul_(1.5)
        after = student.original_answers(leaving, BATCH)
        second, _ = student.run(entrance, BATCH, logits=True, states=False)
    assert torch.equal(before, after)
    assert not torch.equal(first.logits, second.logits)
    assert {name.partition(".")[0] for name in student.parameters()} == {"2-3", "5"}
    student.copy_weights_to_model()
    assert all(torch.equal(a, b) for a, b in zip(model.model.layers[5].parameters(), block.parameters(), strict=True))


def test_the_model_is_as_it_was_to_the_bit() -> None:
    model: Any = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = Student(model, [(range(2, 4), linear())])
    student.run(entering(model, 2), BATCH, logits=True, states=False)[0].logits.sum().backward()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model.model.layers) == 8
    with student.frozen_originals():
        assert not any(p.requires_grad for p in model.parameters())
        assert all(p.requires_grad for p in student.parameters().values())
    assert all(p.requires_grad for p in model.parameters())


def test_windows_that_touch_and_nothing_to_train_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=r"1 to 2 and of blocks 3 to 4 .*no block between"):
        Student(model, [(range(3, 5), linear()), (range(1, 3), linear())])
    with pytest.raises(StreamlineError, match="nothing to train"):
        Student(model, [])


def test_what_is_trained_is_no_part_of_the_original_and_stands_in_one_place() -> None:
    """The original would change, or a copy would be made and thrown away at every step."""
    model: Any = tiny_model("llama")
    for replacement_modules, copies in (
        ([(range(2, 4), model.model.layers[2])], {}),
        ([(range(2, 4), model.model.layers[5])], {}),
        ([], {5: model.model.layers[5]}),
    ):
        with pytest.raises(StreamlineError, match=r"weights with the original.*deepcopy"):
            Student(model, replacement_modules, copies=copies)
    module = linear()
    with pytest.raises(StreamlineError, match=r"LinearReplacement.*used twice"):
        Student(model, [(range(1, 2), module), (range(4, 6), module)])


class InPlace(nn.Module):
    """Works on its input, as an activation with inplace=True does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state.mul_(1.5) + self.layer(state)


def test_the_states_that_are_kept_outlive_what_works_in_place() -> None:
    model = tiny_model("llama")
    student, entrance = Student(model, [(range(2, 4), InPlace())]), entering(model, 2)
    before = entrance.clone()
    student.run(entrance, BATCH, logits=True, states=True)
    assert torch.equal(entrance, before)


@pytest.mark.sample(6)
@pytest.mark.parametrize("window", [range(2, 4), range(2, 6), range(0, 2), range(1, 3), range(3, 5)], ids=str)
@pytest.mark.parametrize("healing", [None, "partial:where=beside,count=2"])
@pytest.mark.parametrize("gone", [range(2, 4), range(0, 2)], ids=str)
def test_what_an_earlier_surgery_put_in_is_run_once(window: range, healing: str | None, gone: range) -> None:
    """The entrance has passed what stands before its block and those in front: run again, it is another model."""
    model: Any = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(gone, linear(4))
        surgeon.commit()
    stack = find_stack(model)
    with torch.no_grad(), LayerSurgeon(model) as surgeon:
        surgeon.replace(window, linear(5))
        wanted = model(**prepare_inputs(model, BATCH)).logits[REAL]
    student = student_of(stack, [(window, linear(5))], parse_healing(healing) if healing else None)
    student.training = False
    entrance = entering(model, student.start)
    with torch.no_grad():
        found, _ = student.run(entrance, BATCH, logits=True, states=False)
        torch.testing.assert_close(found.logits[REAL], wanted, rtol=1e-5, atol=1e-5)
        with student.applied():
            torch.testing.assert_close(model(**prepare_inputs(model, BATCH)).logits[REAL], wanted, rtol=1e-5, atol=1e-5)


def test_states_that_have_passed_an_earlier_module_are_not_compared() -> None:
    model: Any = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(4, 6), linear(4))
        surgeon.commit()
    student = Student(model, [(range(2, 4), linear(5))])
    settings = DistillationConfig({"mse": 1.0})
    with pytest.raises(UnsupportedSurgery, match="directly after a window"):
        train(student, [BATCH], [BATCH], settings)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    teacher = tiny_model("llama", vocabulary=80)
    with pytest.raises(StreamlineError, match=r"80 tokens.*LlamaForCausalLM.*64"):
        Student(tiny_model("llama"), [(range(2, 4), linear())], teacher=teacher)


INSIDE = {"folded": FoldedConfig(), "scale": ScaleConfig()}


def trained_inside(
    kind: str, where: str = "all", hardware: HardwareConfig | None = None
) -> tuple[Student, WindowReplacement, Any]:
    """Train a student whose replacement is part of a block, and other blocks."""
    model = tiny_model("llama")
    batches = [torch.arange(3 + k, 51 + k).view(4, 12) for k in range(4)]
    (repair,) = fit_windows(model, [range(3, 6)], INSIDE[kind], batches[:3], batches[3:])
    module = repair.replacement_module
    assert module is not None
    student = student_of(
        find_stack(model), [(range(3, 6), module)], HealingConfig("partial", where, int(where == "last"))
    )
    config = DistillationConfig(validations=1, learning_rate=1e-4)
    result = train(student, batches[:3], batches[3:], config, hardware=hardware)
    return student, module, result


@pytest.mark.parametrize("kind", INSIDE)
def test_a_replacement_inside_a_block_is_applied_once(kind: str) -> None:
    student, module, result = trained_inside(kind)
    model, batch = student.model, torch.arange(6, 54).view(4, 12)
    with torch.no_grad():
        expected = model(batch).logits.log_softmax(-1)
    student.merge()
    with pytest.raises(StreamlineError, match=r"apply again.*Call insert_replacement and commit first"):
        student.copy_weights_to_model()
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, range(3, 6), module)
        surgeon.commit()
    student.copy_weights_to_model()
    with torch.no_grad():
        found = model(batch).logits.log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) == pytest.approx(result.distance, rel=1e-3)


@pytest.mark.parametrize("where", ["all", "last"])  # the block with the replacement is trained or frozen
@pytest.mark.parametrize("kind", INSIDE)
def test_a_replacement_inside_a_block_is_trained_in_bfloat16(kind: str, where: str) -> None:
    exact, half = (trained_inside(kind, where, hardware)[2] for hardware in (None, HardwareConfig(autocast="bfloat16")))
    assert half.distance == pytest.approx(exact.distance, rel=0.05)


def test_offloaded_blocks_are_not_healed() -> None:
    """Their weights are on the meta device, where writing has no effect."""
    model = tiny_model("llama")
    cpu_offload(model.model.layers[7], execution_device=torch.device("cpu"))
    window = [(range(3, 5), linear())]
    with pytest.raises(StreamlineError, match=r"Block 7 is offloaded, so its trained weights cannot be written back"):
        student_of(find_stack(model), window, HealingConfig("partial", "last", 1))
    assert student_of(find_stack(model), window, HealingConfig("partial", "beside", 1)).copies.keys() == {2, 5}


def test_adapters_are_not_added_to_offloaded_weights() -> None:
    student = student_of(find_stack(tiny_model("llama")), [(range(3, 5), linear())], HealingConfig("lora", "last", 1))
    other = tiny_model("llama")
    cpu_offload(other.model.layers[7], execution_device=torch.device("cpu"))
    with pytest.raises(StreamlineError, match=r"of block 7 is offloaded, so nothing can be added to it"):
        student.add_adapters_to(other)


def test_adapters_are_not_added_to_a_model_with_fewer_blocks() -> None:
    """The numbers of its blocks no longer are those of the student."""
    student = student_of(find_stack(tiny_model("llama")), [(range(3, 5), linear())], HealingConfig("lora", "last", 1))
    shortened = tiny_model("llama")
    with LayerSurgeon(shortened) as surgeon:
        surgeon.remove(range(0, 1))
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"The model has 7 blocks\. Expected the 8"):
        student.add_adapters_to(shortened)
