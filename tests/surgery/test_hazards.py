"""What else depends on a block is named before it goes."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery
from streamline_hooks.testing import tiny_model as tiny_of_type


def test_shared_keys() -> None:
    model = tiny_of_type("gemma3n_text")
    with LayerSurgeon(model) as surgeon:
        producers = {h.text for k in range(8) for h in surgeon.check([k]) if h.cause == "shared-keys"}
        assert producers and all("produces the keys that" in text for text in producers)
        shared = model.config.num_kv_shared_layers
        for k in range(8 - shared, 8):
            assert [h.cause for h in surgeon.check([k])] == ["shared-keys"]
        assert surgeon.check([0]) == []


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
