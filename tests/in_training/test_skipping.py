"""What a draw leaves of a model is what LayerSurgeon leaves, whatever was drawn before."""

from __future__ import annotations

import pytest
from torch import nn

from streamline_hooks import LayerSurgeon, find_stack
from streamline_hooks.in_training.skipping import Skipping
from streamline_hooks.testing import causal_model_types, tiny_model
from tests.surgery.test_surgeon import fingerprint

TYPES = ("bamba", "cohere2", "gemma3_text", "gpt_oss", "lfm2", "llama", "qwen3_next", "smollm3")


def said(model: nn.Module) -> list[object]:
    """Everything by which the parts of a model know how many blocks there are, and which."""
    rows: list[object] = [str(model.config.to_dict())]
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        plain = {key: str(v) for key, v in own.items() if isinstance(v, (bool, int, float, str, list, tuple, dict))}
        rows.append((name, id(module), plain))
        if "config" in own:
            rows.append((name, str(own["config"].to_dict())))
    return rows


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("draws", [[(0,), (5, 7), (1, 2, 6)], [(6, 7), (0, 3)]])
def test_it_is_what_a_surgeon_leaves(model_type: str, draws: list[tuple[int, ...]]) -> None:
    if model_type not in causal_model_types():
        pytest.skip(f"this Transformers has no {model_type}")
    model = tiny_model(model_type)
    layers = find_stack(model)
    for number, block in enumerate(layers.blocks):  # as some remote code does: each block has its own copies
        block.of_layers = layers.config.num_hidden_layers
        block.all_kinds = getattr(layers.config, "layer_types", None)
        block.mine = number
    before = fingerprint(model)
    skipping = Skipping(model, layers)
    for drawn in draws:
        with LayerSurgeon(model, probe=False) as surgeon:
            for k in drawn:
                surgeon.remove([k], despite_hazards=True)
            expected = said(model)
        skipping.leave_out(drawn)
        got = said(model)
        skipping.put_back()
        assert got == expected
        assert fingerprint(model) == before
