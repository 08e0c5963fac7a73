"""A shorter model is a claim: each way in which it can be false is planted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack, load, save
from streamline_hooks.replacements import LinearReplacement
from tests.other_models import OTHERS, answer, made
from tests.tiny_models import Nudge, repaired, tiny_model, tokens


class ClockConfig(PretrainedConfig):
    model_type = "streamline-test-clock"

    def __init__(self, num_hidden_layers: int = 5, baked: str = "", **kwargs: Any) -> None:
        self.num_hidden_layers, self.baked, self.vocab_size = num_hidden_layers, baked, 16
        super().__init__(**kwargs)


class ClockBlock(nn.Module):
    """Computes with something that may have been baked in from its number."""

    def __init__(self, config: ClockConfig, number: int) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        if config.baked == "buffer":
            self.register_buffer("phase", torch.full((8,), float(number)), persistent=False)
        elif config.baked == "attribute":
            self.phase = 0.1 * number
        elif config.baked == "shape":
            self.phase = nn.Parameter(torch.zeros(8 + number % 2))
        elif config.baked == "class" and number == 0:
            self.inner = _Linear(8, 8)
        elif config.baked == "function":
            self.last = nn.Hardtanh(-100, 100) if number else nn.Identity()
        elif config.baked == "dropout":
            self.last = nn.Dropout(0.1) if number else nn.Identity()
        elif config.baked == "behind dropout":
            self.last = nn.Dropout(0.1) if number else nn.Identity()
            self.behind = nn.Linear(8, 8) if number else _Linear(8, 8)
        elif config.baked == "rounding":
            self.phase = 0.1 * (number + 1) / (number + 1)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + getattr(self, "last", nn.Identity())(self.inner(state))


class _Linear(nn.Linear):
    pass


built: list[str] = []  # where the weights of each ClockModel are, in the order in which they were made


class ClockModel(PreTrainedModel):
    config_class = ClockConfig
    base_model_prefix = ""

    def __init__(self, config: ClockConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(ClockBlock(config, k) for k in range(config.num_hidden_layers))
        built.append(self.layers[0].inner.weight.device.type)
        self.head = nn.Linear(8, 16)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutput:
        state = self.embed(input_ids)
        for layer in self.layers:
            state = layer(state)
        return CausalLMOutput(logits=self.head(state))


PLANTED = {
    "buffer": "phase is a buffer",
    "attribute": r"phase is 0.1.*0.0",
    "shape": r"layers.0.phase.*\(9,\).*\(8,\)",
    "class": r"inner is a Linear.*a _Linear",
    "function": r"last is a Hardtanh.*a Identity",
    "behind dropout": r"behind is a Linear.*a _Linear",
}


@pytest.mark.parametrize("baked", PLANTED)
def test_what_is_baked_from_the_number_is_refused(baked: str) -> None:
    model = ClockModel(ClockConfig(baked=baked)).eval()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        with pytest.raises(UnsupportedSurgery, match=PLANTED[baked]):
            surgeon.commit()
    assert len(model.layers) == 5 and not hasattr(model.config, "streamline_hooks")


def test_what_is_random_in_training_alone_is_no_part_of_a_checkpoint() -> None:
    """Of a block that becomes the first, the class builds none; the mode of the one that is there stays."""
    model = ClockModel(ClockConfig(baked="dropout")).train()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.commit()
    assert [type(block.last).__name__ for block in model.layers] == ["Dropout"] * 4
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("baked", ["", "buffer"])
def test_what_is_built_to_compare_takes_no_memory_for_weights(baked: str) -> None:
    """Also where buffers are compared, which need values."""
    with LayerSurgeon(ClockModel(ClockConfig(baked=baked)).eval()) as surgeon:
        surgeon.remove([4])
        built.clear()
        surgeon.commit()
    assert built == ["meta"]


def test_a_number_that_differs_by_rounding_alone_is_the_same() -> None:
    model = ClockModel(ClockConfig(baked="rounding")).eval()
    assert model.layers[2].phase != model.layers[1].phase
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.commit()
    assert len(model.layers) == 4


@pytest.mark.parametrize("name", ["beit", "data2vec"])
def test_the_first_block_without_stochastic_depth_goes(name: str, tmp_path: Path) -> None:
    model, path = made(name), OTHERS[name].path(made(name))
    with LayerSurgeon(model, path) as surgeon:
        surgeon.remove([0])
        surgeon.commit()
    assert "DropPath" in type(find_stack(model, path)[0].drop_path).__name__
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert type(find_stack(loaded, path)[0].drop_path) is nn.Identity
    assert torch.equal(answer(loaded.eval(), name), answer(model, name))


def test_removing_from_the_end_changes_no_number() -> None:
    for baked in PLANTED:
        model = ClockModel(ClockConfig(baked=baked)).eval()
        with LayerSurgeon(model) as surgeon:
            surgeon.remove([4])
            surgeon.commit()
        assert len(model.layers) == 4


def test_a_kind_of_model_that_is_registered_by_its_user(tmp_path: Path) -> None:
    AutoConfig.register("streamline-test-clock", ClockConfig, exist_ok=True)
    AutoModelForCausalLM.register(ClockConfig, ClockModel, exist_ok=True)
    model = ClockModel(ClockConfig()).eval()
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1, 2], LinearReplacement.from_map(0.1 * torch.randn(8, 8)))
        surgeon.commit()
    save(model, tmp_path / "model")
    ids = torch.arange(6)[None]
    assert torch.equal(load(tmp_path / "model")(ids).logits, model(ids).logits)


class SaysItsHead(ClockModel):
    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_the_head_of_a_model_that_does_not_say_its_embedding_is_no_guard() -> None:
    """Loading may pad a head and tie it by its shape, which must be what the class expects."""
    guards = []
    for model_class in (ClockModel, SaysItsHead):
        model = model_class(ClockConfig(tie_word_embeddings=False)).eval()
        with LayerSurgeon(model) as surgeon:
            surgeon.replace([1, 2], LinearReplacement(8))
            surgeon.commit()
        guards.append(model.config.streamline_hooks["guard"])
    assert guards == ["head.bias", "layers.0.inner.bias"]


def test_a_model_whose_configuration_counts_no_blocks() -> None:
    model = ClockModel(ClockConfig())
    model.config.num_hidden_layers = 99
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        with pytest.raises(UnsupportedSurgery, match=r"number of blocks of layers \(5 before"):
            surgeon.commit()


class Distiller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = tiny_model("llama"), tiny_model("llama")


def test_another_stack_of_the_same_class_and_length_keeps_its_configuration() -> None:
    both = Distiller()
    teacher = both.teacher(tokens(1, 5)).logits
    with LayerSurgeon(both, stack="student.model.layers") as surgeon:
        surgeon.remove([0])
        assert both.student.config.num_hidden_layers == 5 and both.teacher.config.num_hidden_layers == 6
        assert torch.equal(both.teacher(tokens(1, 5)).logits, teacher)
        surgeon.commit()
    assert torch.equal(both.teacher(tokens(1, 5)).logits, teacher)


def test_a_model_inside_a_plain_module_is_settled_and_saved(tmp_path: Path) -> None:
    both = Distiller()
    with LayerSurgeon(both, stack="student.model.layers") as surgeon:
        surgeon.replace([2], LinearReplacement.from_map(0.1 * torch.randn(32, 32)))
        surgeon.commit()
    assert type(both.student).__name__ == "StreamlinedLlamaForCausalLM"
    save(both.student, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(tokens(1, 5)).logits, both.student(tokens(1, 5)).logits)


def test_one_block_that_is_left_can_be_committed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 6))
        surgeon.commit()
    assert len(find_stack(model)) == 1
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_a_part_of_a_committed_model_is_not_saved_alone(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"LlamaModel.*configuration.*spliced modules"):
        repaired("llama").model.save_pretrained(tmp_path / "part")
    whole = tiny_model("llama")
    with LayerSurgeon(whole.model) as surgeon:
        surgeon.replace([2], Nudge())
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"LlamaForCausalLM.*configuration"):
        whole.save_pretrained(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_notes_are_json_and_do_not_hide_the_plan() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        with pytest.raises(StreamlineError, match="JSON values"):
            surgeon.commit(data=object())
        surgeon.commit(removed="nothing", data="mine")
    said = model.config.streamline_hooks["history"][0]
    assert said["removed"] == [1] and said["data"] == "mine" and set(said["versions"]) >= {"torch", "transformers"}
