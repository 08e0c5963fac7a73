"""What else depends on a block is named before it goes."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery
from streamline_hooks.testing import causal_model_types
from streamline_hooks.testing import tiny_model as tiny_of_type


def test_shared_keys_and_per_layer_embeddings() -> None:
    model = tiny_of_type("gemma3n_text")
    shared = model.config.num_kv_shared_layers
    with LayerSurgeon(model) as surgeon:
        for k in range(8):
            causes = [h.cause for h in surgeon.check([k])]
            assert "per-layer-embeddings" in causes
            assert ("shared-keys" in causes) == (k >= 8 - shared or k in _producers(model))
        with pytest.raises(UnsupportedSurgery, match="has a part for each of its 8 blocks"):
            surgeon.remove([0])


def _producers(model: torch.nn.Module) -> set[int]:
    types, first = model.config.layer_types, 8 - model.config.num_kv_shared_layers
    return {max(k for k in range(first) if types[k] == kind) for kind in set(types[first:])}


def test_a_block_that_its_number_is_baked_into_is_found_by_trying() -> None:
    from tests.architectures.examine import state_of

    model = tiny_of_type("diffllama")
    before = state_of(model)
    with LayerSurgeon(model) as surgeon:
        found = surgeon.check([0])
        assert [h.cause for h in found] == ["rebuild"] and "lambda_init is" in found[0].text
        assert surgeon.check([7]) == []
        surgeon.remove([0])  # in memory it is right
    assert state_of(model) == before


@pytest.mark.skipif("dory" not in causal_model_types(), reason="this Transformers has no Dory")
def test_a_loop_over_blocks_by_number_is_found_by_trying() -> None:
    with LayerSurgeon(tiny_of_type("dory")) as surgeon:
        assert [h.cause for h in surgeon.check([0])] == ["probe"]
        with pytest.raises(UnsupportedSurgery, match="other logits than with them bypassed"):
            surgeon.remove([0])


def test_the_owner_of_the_position_bias() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=4, num_decoder_layers=4, num_heads=4)
    model = T5ForConditionalGeneration(config)
    with LayerSurgeon(model, stack="encoder.block") as surgeon:
        with pytest.raises(
            UnsupportedSurgery, match="block 0 owns the relative position bias that the other blocks use"
        ):
            surgeon.remove([0])
        assert surgeon.check([1, 2]) == []


def test_wrapped_models_are_refused(tmp_path: object) -> None:
    from torch.distributed import destroy_process_group, init_process_group

    model = tiny_of_type("llama")
    init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(
            StreamlineError, match="is wrapped in DistributedDataParallel already. Surgery comes before"
        ):
            LayerSurgeon(wrapped).__enter__()
    finally:
        destroy_process_group()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])


def test_a_model_without_a_head_is_probed_too() -> None:
    with LayerSurgeon(tiny_of_type("zaya").model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match="other logits than with them bypassed|the model fails"):
            surgeon.remove([4])


def test_a_model_that_cannot_be_probed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_of_type("llama")

    def refuse(**given: object) -> None:
        raise ValueError("pixels are missing")

    monkeypatch.setattr(model, "forward", refuse)
    with LayerSurgeon(model) as surgeon, pytest.warns(UserWarning, match=r"not held against .*ValueError: pixels are"):
        surgeon.remove([1])
