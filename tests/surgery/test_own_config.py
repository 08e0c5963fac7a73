"""Models that share a configuration object with the one that is operated on are not affected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from streamline_hooks import LayerSurgeon, find_stack, load, save
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery.resume import resume
from streamline_hooks.training import ProgressiveRemoval, StochasticDepth
from tests.other_models import OTHERS, answer, made
from tests.tiny_models import BLOCKS, FAMILIES, WIDTH, tiny_config, tiny_model, tokens


def pair(family: str = "llama") -> tuple[Any, Any]:
    """A teacher and a student that share one configuration object."""
    config = tiny_config(family)
    teacher, student = (type(tiny_model(family))(config).eval() for _ in range(2))
    return teacher, student


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 9)).logits


def written(model: Any) -> torch.Tensor:
    return model.generate(tokens(1, 5), max_new_tokens=4, do_sample=False, eos_token_id=None)


def configs(model: nn.Module) -> list[Any]:
    """The configuration of every module that has one."""
    return [vars(module)["config"] for module in model.modules() if "config" in vars(module)]


class Unchanged:
    """A model, its configuration and what it computes, as they are now."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.held = [id(config) for config in configs(model)]
        self.values, self.kind = copy.deepcopy(vars(model.config)), type(model.config)
        self.logits, self.written = logits(model), written(model)

    def require(self) -> None:
        assert self.model.config is self.config and type(self.config) is self.kind
        assert [id(config) for config in configs(self.model)] == self.held
        assert vars(self.config) == self.values
        assert torch.equal(logits(self.model), self.logits)
        assert torch.equal(written(self.model), self.written)


CHANGES: dict[str, Callable[[LayerSurgeon], Any]] = {
    "removed": lambda surgeon: surgeon.remove(range(1, 3)),
    "spliced": lambda surgeon: surgeon.replace(range(1, 3), LinearReplacement(WIDTH)),
    "slot": lambda surgeon: surgeon.insert(2, surgeon.stack[1]),
}


def require_one(student: Any, shared: Any, change: Callable[[LayerSurgeon], Any]) -> None:
    """One configuration in the whole model, but for that of a block that is a deep copy; and not the shared one."""
    held = {id(config) for config in configs(student)}
    if student.config.model_type == "gemma3_text" and transformers.__version__ < "5":
        held -= {id(student.model.rotary_emb_local.config)}  # which has a copy of its own from the start
    assert len(held) == (2 if change is CHANGES["slot"] else 1) and id(shared) not in held
    assert student.config is student.base_model.config
    assert all(config.num_hidden_layers == len(find_stack(student)) for config in configs(student))


# A splice removes a window too.
AFFECTED = [(family, name) for family in FAMILIES for name in CHANGES if family == "llama" or name != "removed"]


@pytest.mark.parametrize(("family", "name"), AFFECTED)
def test_the_other_model_is_not_affected(family: str, name: str, tmp_path: Path) -> None:
    (teacher, student), change = pair(family), CHANGES[name]
    shared, before, restored = teacher.config, Unchanged(teacher), Unchanged(student)
    with LayerSurgeon(student) as surgeon:
        change(surgeon)
        before.require()
        require_one(student, shared, change)
        assert student.config.num_hidden_layers == len(find_stack(student)) != shared.num_hidden_layers
        torch.testing.assert_close(
            written(student),
            student.generate(tokens(1, 5), max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False),
        )
    restored.require()
    assert student.config is shared and surgeon.stack.config is shared
    with LayerSurgeon(student) as surgeon:
        change(surgeon)
        surgeon.commit()
    before.require()
    require_one(student, shared, change)
    assert find_stack(student).config is student.config
    save(student, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(student))


def test_a_second_commit_changes_nothing_that_the_first_model_says() -> None:
    teacher, student = pair()
    with LayerSurgeon(student) as surgeon:
        surgeon.replace([1], LinearReplacement(WIDTH))
        surgeon.commit()
    third = copy.deepcopy(student)
    for module in third.modules():
        if "config" in vars(module):
            module.config = student.config
    before = Unchanged(third)
    removal = ProgressiveRemoval(student, {1: range(2, 3), 2: range(3, 4)})
    for step in (1, 2):
        removal.step(step)
        before.require()
    assert len(find_stack(student)) == BLOCKS - 3 and len(find_stack(teacher)) == BLOCKS


def test_what_the_user_sets_inside_stays() -> None:
    teacher, student = pair()
    with LayerSurgeon(student) as surgeon:
        surgeon.remove([1])
        student.config.use_cache = False
        student.config.note = "mine"
        surgeon.remove([3])
        assert student.config.note == "mine"
    assert student.config is teacher.config
    assert student.config.use_cache is False and student.config.note == "mine"
    assert student.config.num_hidden_layers == BLOCKS


def test_nested_surgeons_share_the_copy() -> None:
    teacher, student = pair()
    before, restored = Unchanged(teacher), Unchanged(student)
    with LayerSurgeon(student) as outer:
        outer.remove([0])
        own = student.config
        with LayerSurgeon(student) as inner:
            inner.remove([1, 2])
            assert student.config.num_hidden_layers == BLOCKS - 3
            before.require()
        assert student.config is own and own.num_hidden_layers == BLOCKS - 1
        before.require()
    restored.require()
    before.require()


@pytest.mark.parametrize("last", [0, 1])
def test_surgeons_on_two_stacks_close_in_any_order(last: int) -> None:
    model = made("bart encoder")
    other = type(model)(model.config).eval()
    state, values = answer(other, "bart encoder"), copy.deepcopy(vars(model.config))
    config, expected = model.config, answer(model, "bart encoder")
    surgeons = [LayerSurgeon(model, f"model.{side}.layers") for side in ("encoder", "decoder")]
    if not hasattr(model, "model"):
        surgeons = [LayerSurgeon(model, f"{side}.layers") for side in ("encoder", "decoder")]
    for surgeon in surgeons:
        surgeon.__enter__()
    surgeons[0].remove([1])
    surgeons[1].remove([2, 3])
    assert (model.config.encoder_layers, model.config.decoder_layers) == (3, 2)
    assert torch.equal(answer(other, "bart encoder"), state)
    surgeons[1 - last].__exit__(None, None, None)
    assert model.config is not config
    surgeons[last].__exit__(None, None, None)
    assert model.config is config and vars(config) == values
    assert torch.equal(answer(model, "bart encoder"), expected)
    assert torch.equal(answer(other, "bart encoder"), state)


@pytest.mark.parametrize("last", [0, 1])
def test_each_tower_has_its_configuration_back_whichever_surgeon_closes_last(last: int) -> None:
    """The one around both is still needed when the first surgeon closes."""
    model = made("clip text")
    held, values = configs(model), copy.deepcopy(model.config.to_dict())
    surgeons = [LayerSurgeon(model, OTHERS[name].path(model)) for name in ("clip text", "clip pictures")]
    for surgeon in surgeons:
        surgeon.__enter__()
        surgeon.remove([1])
    surgeons[1 - last].__exit__(None, None, None)
    surgeons[last].__exit__(None, None, None)
    assert all(now is before for now, before in zip(configs(model), held, strict=True))
    assert model.config.to_dict() == values


@pytest.mark.parametrize("name", ["llava text", "llava pictures", "clip text", "t5 encoder", "whisper decoder"])
def test_a_part_of_a_composite_configuration(name: str) -> None:
    if name == "t5 encoder" and transformers.__version__ < "5":
        pytest.skip("a T5 encoder cannot become shorter than its decoder before Transformers 5")
    model = made(name)
    other = type(model)(model.config).eval()
    for module, twin in zip(model.modules(), other.modules(), strict=True):
        for attribute, value in vars(module).items():
            if "config" in attribute and hasattr(value, "to_dict"):
                vars(twin)[attribute] = value
    before, config = copy.deepcopy(model.config.to_dict()), model.config
    state, path = answer(other, name), OTHERS[name].path(model)
    held = [id(value) for value in configs(model)]
    for permanent in (False, True):
        with LayerSurgeon(model, path) as surgeon:
            surgeon.remove(OTHERS[name].removed)
            described = find_stack(model, path).config
            assert any(described is value for value in [model.config, *vars(model.config).values(), *configs(model)])
            assert config.to_dict() == before
            assert torch.equal(answer(other, name), state)
            if permanent:
                surgeon.commit()
        assert config.to_dict() == before
        assert torch.equal(answer(other, name), state)
        assert ([id(value) for value in configs(model)] == held) is not permanent


def test_a_copy_that_is_made_inside_is_a_model_of_its_own() -> None:
    teacher, student = pair()
    with LayerSurgeon(student) as surgeon:
        surgeon.remove([1])
        duplicate = copy.deepcopy(student)
        expected = logits(student)
    assert duplicate.config.num_hidden_layers == BLOCKS - 1 and duplicate.config is not student.config
    with LayerSurgeon(duplicate) as surgeon:
        surgeon.commit()
    assert torch.equal(logits(duplicate), expected)
    assert teacher.config.num_hidden_layers == student.config.num_hidden_layers == BLOCKS


class Both(nn.Module):
    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student, self.config = teacher, student, teacher.config


def test_a_teacher_and_a_student_in_one_module() -> None:
    teacher, student = pair()
    both, before = Both(teacher, student), Unchanged(teacher)
    with LayerSurgeon(both, stack="student.model.layers") as surgeon:
        surgeon.remove([1, 2])
        before.require()
        assert student.config.num_hidden_layers == BLOCKS - 2 and both.config is teacher.config
    assert student.config is teacher.config
    with LayerSurgeon(student) as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    before.require()


@pytest.mark.parametrize("permanent", [False, True])
def test_a_model_without_its_head_shares_with_its_head_and_with_no_other(permanent: bool) -> None:
    teacher, student = pair()
    before, shared = Unchanged(teacher), teacher.config
    with LayerSurgeon(student.model) as surgeon:
        surgeon.remove([1, 2])
        before.require()
        assert student.config is student.model.config and student.config.num_hidden_layers == BLOCKS - 2
        if permanent:
            surgeon.commit()
    before.require()
    assert (student.config is shared) is not permanent and student.config is student.model.config
    logits(student)


def test_a_block_of_another_model_brings_no_configuration_along() -> None:
    teacher, student = tiny_model("llama"), tiny_model("llama")
    before = copy.deepcopy(vars(teacher.config))
    with LayerSurgeon(student) as surgeon:
        surgeon.replace([1, 2], teacher.model.layers[1])
        assert vars(teacher.config) == before
    assert teacher.model.layers[1].self_attn.config is teacher.config and vars(teacher.config) == before


@dataclass
class PlainConfig:
    n_layer: int = 4
    width: int = 8


class PlainBlock(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class PlainModel(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(self.config.n_layer):
            x = self.blocks[k](x)
        return x


@pytest.mark.parametrize("wrapped", [False, True])
def test_plain_modules_share_a_configuration(wrapped: bool) -> None:
    config, state = PlainConfig(), torch.ones(1, 2, 8)
    teacher, student = PlainModel(config), PlainModel(config)
    expected, own = teacher(state), student(state)
    model, path = (Both(teacher, student), "student.blocks") if wrapped else (student, "blocks")
    with LayerSurgeon(model, path) as surgeon:
        surgeon.remove([1])
        assert (config.n_layer, student.config.n_layer) == (4, 3)
        assert torch.equal(teacher(state), expected) and not torch.equal(student(state), own)
    assert student.config is config and config.n_layer == 4 and torch.equal(student(state), own)
    with LayerSurgeon(model, path) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    assert (config.n_layer, student.config.n_layer) == (4, 3) and torch.equal(teacher(state), expected)


class ConfigOfTheClass(PlainModel):
    config = PlainConfig()

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList(PlainBlock(self.config) for _ in range(4))


def test_a_configuration_that_no_module_holds_is_changed_in_place() -> None:
    model = ConfigOfTheClass()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        assert model.config.n_layer == 3
        model(torch.ones(1, 2, 8))
    assert model.config.n_layer == 4


def test_blocks_that_are_skipped_in_training_leave_the_other_model_alone() -> None:
    teacher, student = pair()
    expected, shared, seen = logits(teacher), teacher.config, []

    def run_the_teacher(*_: Any) -> None:
        seen.append((torch.equal(logits(teacher), expected), student.config.num_hidden_layers))

    student.train()
    with StochasticDepth(student, 0.9, seed=0) as depth:
        student.lm_head.register_forward_pre_hook(run_the_teacher)
        for _ in range(4):
            student(input_ids=tokens(1, 5))
            assert depth.skipped is not None
    assert all(same for same, _ in seen) and min(length for _, length in seen) < BLOCKS
    assert all(config is shared for config in [*configs(student), *configs(teacher)])
    assert shared.num_hidden_layers == BLOCKS


def test_a_surgeon_that_opens_after_stochastic_depth_was_made() -> None:
    model = tiny_model("llama").train()
    lengths: list[int] = []
    with StochasticDepth(model, 0.9, seed=0):
        model.lm_head.register_forward_pre_hook(lambda *_: lengths.append(model.config.num_hidden_layers))
        with LayerSurgeon(model, probe=False) as surgeon:
            surgeon.commit()
        for _ in range(4):
            model(input_ids=tokens(1, 5))
    assert min(lengths) < BLOCKS and model.config.num_hidden_layers == BLOCKS


def test_a_pass_from_a_block_on_leaves_the_other_model_alone() -> None:
    teacher, student = pair()
    expected, seen = logits(teacher), []
    student.lm_head.register_forward_pre_hook(lambda *_: seen.append(torch.equal(logits(teacher), expected)))
    with torch.no_grad():
        resume(student, 3, torch.zeros(2, 9, WIDTH), {"input_ids": tokens(2, 9)})
    assert seen == [True] and student.config is teacher.config


def test_heads_that_align_words_are_not_renumbered_in_the_other_model() -> None:
    model = made("whisper decoder")
    other = type(model)(model.config)
    shared = transformers.GenerationConfig(alignment_heads=[[1, 0], [3, 1]])
    model.generation_config = other.generation_config = shared
    with LayerSurgeon(model, OTHERS["whisper decoder"].path(model)) as surgeon:
        surgeon.remove([1])
        assert model.generation_config.alignment_heads == [[2, 1]]
        assert shared.alignment_heads == [[1, 0], [3, 1]]
    assert model.generation_config is shared
