"""What a commit writes into the configuration, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from streamline_hooks import LayerSurgeon, UnsupportedSurgery
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import causal_model_types
from streamline_hooks.testing import tiny_model as tiny


@pytest.mark.parametrize(
    ("model_type", "guard"), [("bloom", "transformer.ln_f.weight"), ("llama", "model.norm.weight")]
)
def test_the_guard_is_the_norm_after_the_blocks(model_type: str, guard: str) -> None:
    """BLOOM also has a norm before the blocks."""
    model: Any = tiny(model_type, blocks=3)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], LinearReplacement(model.config.hidden_size))
        surgeon.commit()
    assert model.config.streamline_hooks["guard"] == guard


@pytest.mark.skipif("gemma4_unified" not in causal_model_types(), reason="this Transformers has no unified Gemma 4")
def test_a_list_inside_a_composite_configuration_must_not_change_when_it_is_loaded() -> None:
    model = tiny("gemma4_unified")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([7])
        with pytest.raises(UnsupportedSurgery, match=r"Gemma4UnifiedConfig turns layer_types\[6\] from"):
            surgeon.commit()
