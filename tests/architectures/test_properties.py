"""Over types, windows, paddings, caches, batch sizes and precisions at once: right, or refused by name."""

from __future__ import annotations

import copy
import functools

import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import causal_model_types, tiny_inputs, tiny_model
from tests.architectures.examine import bypassed, logits, passes, same, stepwise

FAMILIES = (
    "bloom", "cohere2", "deepseek_v3", "falcon", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granitemoehybrid",
    "jamba", "llama", "mixtral", "olmo2", "opt", "phi3", "qwen3_next", "recurrent_gemma", "zamba2",
)  # fmt: skip
# An older Transformers lacks the newest types, and its RecurrentGemma keeps its state from one call to the next.
STATEFUL = {"recurrent_gemma"} if transformers.__version__ < "5" else set()
TYPES = sorted({*FAMILIES} & {*causal_model_types()} - STATEFUL)
BLOCKS = 6


@functools.cache
def model_of(model_type: str, dtype: torch.dtype) -> tuple[nn.Module, dict[bool, bool]]:
    """A model, and whether its own cached decoding equals its forward, unpadded and padded."""
    model = tiny_model(model_type, blocks=BLOCKS, dtype=dtype)
    return model, {padded: passes(lambda padded=padded: stepwise(model, padded)) for padded in (False, True)}


@given(
    model_type=st.sampled_from(TYPES),
    start=st.integers(0, BLOCKS - 1),
    length=st.integers(1, BLOCKS - 2),
    spliced=st.booleans(),
    padded=st.booleans(),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_right_or_refused(
    model_type: str, start: int, length: int, spliced: bool, padded: bool, batch: int, dtype: torch.dtype
) -> None:
    model, own = model_of(model_type, dtype)
    window = range(start, min(start + length, len(find_stack(model))))
    inputs = tiny_inputs(model, batch=batch, tokens=10, left_padding=padded)
    map_ = 0.2 * torch.randn(32, 32, generator=torch.Generator().manual_seed(start))
    module = LinearReplacement.from_map(map_).to(dtype).eval() if spliced else None
    truth = bypassed(model, window, copy.deepcopy(module), inputs)
    keys = list(model.state_dict())
    try:
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(window, module)
            assert same(logits(model, inputs), truth, inputs, tolerance=2e-4 if dtype == torch.float32 else 5e-2)
            if own[padded] and dtype == torch.float32:
                assert stepwise(model, padded)
    except UnsupportedSurgery as refusal:
        assert "cannot be removed: " in str(refusal)
    assert list(model.state_dict()) == keys
