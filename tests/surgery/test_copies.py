"""What modules repeat of the configuration follows the surgery, and comes back."""

from __future__ import annotations

import pytest
import torch

from streamline_hooks import LayerSurgeon, find_stack
from streamline_hooks.surgery.layer_indices import find_config_copies
from streamline_hooks.testing import causal_model_types, tiny_model
from streamline_hooks.testing.model_state import ModelState

pytestmark = pytest.mark.skipif("zamba2" not in causal_model_types(), reason="this Transformers has no Zamba2")


def test_a_map_that_is_keyed_by_block_numbers() -> None:
    model = tiny_model("zamba2")
    before = ModelState(model)
    maps = [m for m in model.modules() if hasattr(m, "layer_dic")]
    held = [dict(m.layer_dic) for m in maps]
    assert held and all(list(m) == [2, 5] for m in held)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        assert [m.layer_dic for m in maps] == [{1: m[2], 4: m[5]} for m in held]
        assert model.config.hybrid_layer_ids == [1, 4]
    assert [m.layer_dic for m in maps] == held
    assert not before.changes()


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


def test_hooks_whose_ids_look_like_block_numbers_are_no_map_of_blocks() -> None:
    """Hooks are kept by a number too; a list of blocks that reads the same must not make a map of them."""
    model = tiny_model("llama")
    block, runs = model.model.layers[5], []
    block.register_forward_hook(lambda *given: runs.append(5))
    numbers = list(block._forward_hooks)
    block.by_number = {n: "a map, for comparison" for n in numbers}
    sources = [*range(2), *range(3, 8), *numbers]
    found = list(find_config_copies(find_stack(model), {"mlp_only_layers": numbers}, {"mlp_only_layers": [0]}, sources))
    assert [name for _, name, _ in found] == ["by_number"]


@pytest.mark.parametrize("blocks", [2, 8])
def test_a_tower_inside_the_decoder_keeps_its_own_count(blocks: int) -> None:
    model = tiny_model("llama", blocks=blocks)
    tower = torch.nn.Module()
    tower.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(blocks))
    tower.num_hidden_layers = blocks
    model.model.tower, model.model.num_hidden_layers = tower, blocks
    model.model.layers[1].tower = tower
    with LayerSurgeon(model, "model.layers", probe=False) as surgeon:
        surgeon.remove([0])
        assert (tower.num_hidden_layers, model.model.num_hidden_layers) == (blocks, blocks - 1)
    assert model.model.num_hidden_layers == blocks


def test_a_tower_of_as_many_blocks_follows_in_what_it_holds_of_the_decoder() -> None:
    """Its own count, which comes first, stays."""
    model = tiny_model("llama")
    model.model.tower = tower = torch.nn.Module()
    tower.num_hidden_layers, tower.attends_with = 8, (sparse := [2, 5])
    sources = [0, 2, 3, 4, 5, 6, 7]
    old, new = ({"num_hidden_layers": n, "mlp_only_layers": kinds} for n, kinds in ((8, sparse), (7, [1, 4])))
    found = [(name, value) for module, name, value in find_config_copies(find_stack(model), old, new, sources)]
    assert found == [("attends_with", [1, 4])]


@pytest.mark.parametrize("change", [{"dtype": torch.float64}])
def test_slices_come_back_to_where_the_model_is_then(change: dict[str, torch.dtype]) -> None:
    model = tiny_model("gemma3n_text")
    before = model(torch.arange(3, 9)[None]).logits
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        model.to(**change)
    after = model(torch.arange(3, 9)[None]).logits
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif("gemma4_text" not in causal_model_types(), reason="this Transformers has no Gemma 4")
def test_the_first_block_that_shares_keys_follows() -> None:
    model = tiny_model("gemma4_text", num_kv_shared_layers=2)
    assert model.model.first_kv_shared_layer_idx == 6
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        assert model.model.first_kv_shared_layer_idx == 5 and model.config.num_kv_shared_layers == 2
    assert model.model.first_kv_shared_layer_idx == 6
