"""Which attributes and which lists speak of a block's number."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from streamline_hooks import LayerSurgeon, find_stack
from streamline_hooks.surgery.layer_indices import IndexAttribute, config_for_blocks, find_index_attributes
from tests.other_models import made
from tests.tiny_models import FAMILIES, tiny_model

INSIDE = {
    "llama": ["self_attn.layer_idx"],
    "opt": ["self_attn.layer_idx"],
    "gpt2": ["attn.layer_idx"],
    "gpt_neox": ["attention.layer_idx"],
    "qwen3": ["self_attn.layer_idx"],
    "gemma3": ["layer_idx", "self_attn.layer_idx"],
}


def block(**attributes: Any) -> nn.Module:
    made = nn.Module()
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family: str) -> None:
    found = find_index_attributes(find_stack(tiny_model(family)).blocks)
    assert sorted(f"{i.path}.{i.name}".lstrip(".") for i in found) == INSIDE[family]


def test_a_number_that_equals_its_position_by_chance_is_no_index() -> None:
    """A Llama's key-value groups, 3 in every block, equal the number of block 3; a Mixtral's top-k that of block 2."""
    groups = [block(groups=3) for _ in range(6)]
    assert find_index_attributes(groups) == []
    two = [block(), block(rank=1), block(rank=2), block()]
    assert find_index_attributes(two) == []
    three = [block(rank=0), block(), block(rank=2), block(rank=3)]
    assert find_index_attributes(three) == [IndexAttribute("", "rank")]


def test_under_a_usual_name_fewer_are_enough_and_counting_may_start_at_one() -> None:
    assert find_index_attributes([block(layer_idx=0), block()]) == [IndexAttribute("", "layer_idx")]
    assert find_index_attributes([block(layer_number=1), block(layer_number=2)]) == [
        IndexAttribute("", "layer_number", 1)
    ]
    assert find_index_attributes([block(layer_idx=0), block(layer_idx=7)]) == []
    assert find_index_attributes([block(rank=1), block(rank=2), block(rank=3)]) == []
    assert find_index_attributes([block(layer_idx=True), block(layer_idx=True)]) == []


def test_lists_counts_and_numbers_in_the_configuration() -> None:
    config = SimpleNamespace(
        num_hidden_layers=4,
        layer_types=["a", "b", "c", "d"],
        no_rope_layers=(1, 0, 1, 0),
        eos_token_id=[1, 2, 3, 4],
        architectures=["w", "x", "y", "z"],
        other=[1, 2, 3],
        first_k_dense_replace=2,
        mlp_only_layers=[0, 3],
    )
    assert config_for_blocks(config, "num_hidden_layers", 4, [0, 3]) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "d"],
        "no_rope_layers": (1, 0),
        "first_k_dense_replace": 1,
        "mlp_only_layers": [0, 1],
    }


def test_numbers_from_one_and_numbers_of_other_blocks_in_the_configuration() -> None:
    config = SimpleNamespace(num_hidden_layers=6, ple_layer_ids=[3, 6], kv_source_layers=[0, 1, 1, 3, 3, 5])
    new = config_for_blocks(config, "num_hidden_layers", 6, [0, 1, 2, 4, 5])
    assert new["ple_layer_ids"] == [3, 5]  # Qwen 4 counts from 1
    assert new["kv_source_layers"] == [0, 1, 1, -1, 4]  # Mistral Large 4; the source of block 4 is removed
    assert config_for_blocks(config, "num_hidden_layers", 6, [1, 2, 3, 4])["kv_source_layers"] == [0, 0, 2, 2]


def test_lists_that_are_as_long_as_the_stack_by_chance() -> None:
    names = ("conv_dim", "conv_stride", "tdnn_dim", "tdnn_dilation", "begin_suppress_tokens")
    config = SimpleNamespace(num_hidden_layers=2, **{name: [7, 8] for name in names})
    assert config_for_blocks(config, "num_hidden_layers", 2, [1]) == {"num_hidden_layers": 1}


def test_overrides_by_number_follow_their_block() -> None:
    spec = SimpleNamespace(per_layer_overrides={1: {"width": 5}, 3: {"width": 7}})
    config = SimpleNamespace(num_hidden_layers=4, _heterogeneity_spec=spec)
    new = config_for_blocks(config, "num_hidden_layers", 4, [0, 2, 3])["_heterogeneity_spec"]
    assert new.per_layer_overrides == {2: {"width": 7}}
    assert spec.per_layer_overrides == {1: {"width": 5}, 3: {"width": 7}}


def test_counts_of_other_kinds() -> None:
    config = SimpleNamespace(
        num_hidden_layers=8,
        num_blocks=8,
        moe_layer_start_index=2,
        moe_layer_end_index=6,
        block_types=["r", "r", "a"],
        scale_depth=1.4,
    )
    new = config_for_blocks(config, "num_hidden_layers", 8, [1, 2, 3, 5, 6, 7])
    assert new["num_hidden_layers"] == new["num_blocks"] == 6
    assert (new["moe_layer_start_index"], new["moe_layer_end_index"]) == (1, 4)
    assert new["block_types"] == ["r", "a", "r", "a", "r", "r"]
    assert new["scale_depth"] / 6**0.5 == pytest.approx(1.4 / 8**0.5)


def test_two_attentions_a_block_and_what_grows_evenly() -> None:
    def pair(k: int) -> nn.Module:
        made = block(layer_idx=k, slot=3 + 2 * k)
        made.a, made.b = block(layer_idx=2 * k), block(layer_idx=2 * k + 1)
        return made

    found = {(i.path, i.name): (i.first, i.stride) for i in find_index_attributes([pair(k) for k in range(5)])}
    assert found == {
        ("", "layer_idx"): (0, 1),
        ("", "slot"): (3, 2),
        ("a", "layer_idx"): (0, 2),
        ("b", "layer_idx"): (1, 2),
    }
    assert IndexAttribute("b", "layer_idx", 1, 2).of(3) == 7


def test_the_heads_that_whisper_tells_the_time_of_a_word_by_follow_their_blocks() -> None:
    model: Any = made("whisper decoder")
    model.generation_config.alignment_heads = [[1, 0], [3, 0], [3, 1]]
    with LayerSurgeon(model, "model.decoder.layers") as surgeon:
        surgeon.remove([1])
        assert model.generation_config.alignment_heads == [[2, 0], [2, 1]]
        surgeon.insert(0, copy.deepcopy(model.model.decoder.layers[0]))
        assert model.generation_config.alignment_heads == [[3, 0], [3, 1]]
        surgeon.remove([3])
        assert not hasattr(model.generation_config, "alignment_heads")  # and Whisper says that it cannot tell
    assert model.generation_config.alignment_heads == [[1, 0], [3, 0], [3, 1]]
    with LayerSurgeon(model, "model.encoder.layers") as surgeon:
        surgeon.remove([1])
        assert model.generation_config.alignment_heads == [[1, 0], [3, 0], [3, 1]]
