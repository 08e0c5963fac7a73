"""What modules repeat of the configuration follows the surgery, and comes back."""

from __future__ import annotations

import pytest

from streamline_hooks import LayerSurgeon
from streamline_hooks.testing import causal_model_types, tiny_model
from tests.architectures.examine import state_of

pytestmark = pytest.mark.skipif("zamba2" not in causal_model_types(), reason="this Transformers has no Zamba2")


def test_a_map_that_is_keyed_by_block_numbers() -> None:
    model = tiny_model("zamba2")
    before = state_of(model)
    maps = [m for m in model.modules() if hasattr(m, "layer_dic")]
    held = [dict(m.layer_dic) for m in maps]
    assert held and all(list(m) == [2, 5] for m in held)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        assert [m.layer_dic for m in maps] == [{1: m[2], 4: m[5]} for m in held]
        assert model.config.hybrid_layer_ids == [1, 4]
    assert [m.layer_dic for m in maps] == held
    assert state_of(model) == before


def test_a_copy_of_an_absolute_list_on_the_model() -> None:
    model = tiny_model("mllama")
    owner = model.model
    with LayerSurgeon(model) as surgeon:
        assert owner.cross_attention_layers == [3, 7]
        surgeon.remove([0])
        assert owner.cross_attention_layers == owner.config.cross_attention_layers == [2, 6]
    assert owner.cross_attention_layers == [3, 7]


def test_paths_of_tied_weights_name_the_blocks_as_they_are() -> None:
    model = tiny_model("zamba2")
    if not isinstance(model.model._tied_weights_keys, dict):
        pytest.skip("this Transformers lists them as patterns")
    with LayerSurgeon(model) as surgeon:
        before = dict(model.model._tied_weights_keys)
        assert before == {"layers.5.shared_transformer": "layers.2.shared_transformer"}
        surgeon.remove([3])
        assert model.model._tied_weights_keys == {"layers.4.shared_transformer": "layers.2.shared_transformer"}
    assert model.model._tied_weights_keys == before
