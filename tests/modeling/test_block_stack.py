"""Where the blocks are found, and what is said where that is a guess."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streamline_hooks import StreamlineError, find_stack
from streamline_hooks.modeling import find_stacks
from tests.other_models import OTHERS, made
from tests.tiny_models import BLOCKS, FAMILIES, tiny_model

PATHS = {
    "llama": "model.layers",
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "qwen3": "model.layers",
    "gemma3": "model.layers",
}


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Plain(nn.Module):
    def __init__(self, **stacks: nn.Module) -> None:
        super().__init__()
        for name, stack in stacks.items():
            setattr(self, name, stack)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family: str) -> None:
    model = tiny_model(family)
    stack = find_stack(model)
    assert (stack.path, len(stack)) == (PATHS[family], BLOCKS)
    assert stack.config is model.config and vars(stack.config)[stack.count_attribute] == BLOCKS
    assert stack.container is model.get_submodule(stack.path)
    assert stack.model is model


def test_a_base_model() -> None:
    assert find_stack(tiny_model("llama").model).path == "layers"


def test_the_largest_of_several() -> None:
    model = Plain(small=nn.ModuleList(Block() for _ in range(5)), large=nn.Sequential(*(Block(9) for _ in range(3))))
    assert find_stack(model).path == "large"
    assert [s.path for s in find_stacks(model)] == ["small", "large"]
    assert find_stack(model, "small").path == "small"


def test_experts_inside_blocks_are_no_stack() -> None:
    blocks = nn.ModuleList(Plain(experts=nn.ModuleList(Block() for _ in range(8))) for _ in range(2))
    assert [s.path for s in find_stacks(Plain(layers=blocks))] == ["layers"]


def test_lists_of_bare_layers_are_no_stack() -> None:
    model = Plain(mlp=nn.Sequential(nn.Linear(2, 2), nn.ReLU()), norms=nn.ModuleList(nn.LayerNorm(2) for _ in range(9)))
    with pytest.raises(StreamlineError, match=r"No stack.*Plain.*Expected an nn.ModuleList"):
        find_stack(model)


def test_equally_good_stacks_are_listed() -> None:
    model = Plain(left=nn.ModuleList(Block() for _ in range(3)), right=nn.ModuleList(Block() for _ in range(3)))
    text = r"2 equally plausible.*'left' \(3 blocks\), 'right' \(3 blocks\).*stack='left'"
    with pytest.raises(StreamlineError, match=text):
        find_stack(model)


def test_what_it_prints() -> None:
    text = str(find_stack(tiny_model("llama")))
    assert text.startswith("model.layers: 6 x LlamaDecoderLayer, ")
    assert text.endswith("described by LlamaConfig.num_hidden_layers")


def test_of_an_encoder_and_a_decoder_the_decoder_with_its_own_count() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    config = BartConfig(
        vocab_size=20, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=64, decoder_ffn_dim=8, **sizes
    )
    model = BartForConditionalGeneration(config)
    stack = find_stack(model)
    assert (stack.path, stack.count_attribute) == ("model.decoder.layers", "decoder_layers")
    encoder = find_stack(model, "model.encoder.layers")
    assert encoder.count_attribute == "encoder_layers"


def test_a_stack_that_the_configuration_counts_comes_before_a_larger_one() -> None:
    model = tiny_model("llama")
    model.model.extra = nn.ModuleList(Block(99) for _ in range(7))
    assert find_stack(model).path == "model.layers"
    assert {s.path for s in find_stacks(model)} == {"model.layers", "model.extra"}


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("clip pictures", "vision"),
        ("clip text", "text"),
        ("llava pictures", "vision"),
        ("llava text", "text"),
        ("t5 encoder", "encoder"),
        ("bart decoder", "decoder"),
        ("whisper encoder", "encoder"),
    ],
)
def test_a_stack_answers_to_what_it_is_for(name: str, asked: str) -> None:
    model = made(name)
    assert find_stack(model, asked).path == OTHERS[name].path(model)


def test_a_word_that_several_stacks_answer_to_is_not_guessed() -> None:
    with pytest.raises(StreamlineError, match=r"2 stacks.*'encoder'.*CLIPModel.*Expected.*'text_"):
        find_stack(made("clip text"), "encoder")
    with pytest.raises(StreamlineError, match=r"'audio'.*CLIPModel"):
        find_stack(made("clip text"), "audio")


def repeated(how: str) -> nn.ModuleList:
    a, b, c, d = (Block() for _ in range(4))
    return nn.ModuleList({"two": [a, b, c, b], "twice two": [b, c, b, c, d], "one": [b] * 4, "None": [a, None, b]}[how])


@pytest.mark.parametrize(
    ("how", "positions"),
    [("two", r"Block .*\(1, 3\)"), ("twice two", r"\(0, 2; 1, 3\)"), ("one", r"\(0, 1, 2, 3\)")],
)
@pytest.mark.parametrize("path", [None, "layers"])
def test_a_module_at_several_positions_is_counted_at_each_and_refused(
    how: str, positions: str, path: str | None
) -> None:
    model = Plain(layers=repeated(how))
    (stack,) = find_stacks(model)
    assert len(stack) == len(model.layers) and all(a is b for a, b in zip(stack.blocks, model.layers, strict=True))
    with pytest.raises(StreamlineError, match=rf"layers of Plain.*{positions}.*deepcopy"):
        find_stack(model, path)


def test_an_empty_position_is_refused() -> None:
    with pytest.raises(StreamlineError, match=r"position 1"):
        find_stack(Plain(layers=repeated("None")))


def test_a_shared_head_in_a_list_does_not_hide_the_stack() -> None:
    head = Plain(project=nn.Linear(40, 40))
    model = Plain(layers=nn.ModuleList(Block(24) for _ in range(6)), heads=nn.ModuleList([head] * 6))
    assert find_stack(model).path == "layers"
    assert [len(stack) for stack in find_stacks(model)] == [6, 6]
