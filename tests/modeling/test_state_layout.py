"""States that are not (batch, tokens, features): compared token by token, all streams together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import FSMTConfig, FSMTForConditionalGeneration

from streamline_hooks import HiddenStateRecorder, UnsupportedSurgery, profile
from streamline_hooks.core import prepare_inputs
from streamline_hooks.modeling.state_layout import STATE_LAYOUTS, by_token, layout_of
from streamline_hooks.recording import Intervention, Zero
from streamline_hooks.statistics import measure_moments
from streamline_hooks.testing import tiny_inputs, tiny_model

TYPES = {"xlnet": "XLNetLayer", "gemma3n_text": "Gemma3nTextDecoderLayer", "deepseek_v4": "DeepseekV4DecoderLayer",
         "hy_v4": "HYV4DecoderLayer"}  # fmt: skip


def token_of(state: torch.Tensor, layout: str, row: int, place: int) -> np.ndarray:
    """One token's numbers, found by the names of the axes."""
    index = tuple({"batch": row, "tokens": place}.get(axis, slice(None)) for axis in layout.split())
    return state[index].flatten().double().numpy()


@pytest.mark.parametrize("model_type", TYPES)
def test_cosine_is_right(model_type: str) -> None:
    model = tiny_model(model_type)
    batch = tiny_inputs(model)
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        model(**prepare_inputs(model, batch))
    layout = layout_of(record.stack[0])
    assert type(record.stack[0]).__name__ == TYPES[model_type] and layout == STATE_LAYOUTS[TYPES[model_type]]
    found = profile(model, [batch])
    rows, places = batch["input_ids"].shape
    for a, b in ((0, 3), (2, 7)):
        cosines = []
        for row in range(rows):
            for place in range(places):
                x = token_of(record.inputs[a][0], layout, row, place)
                y = token_of(record.inputs[b][0], layout, row, place)
                cosines.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        assert found.cosine[a, b].item() == pytest.approx(np.mean(cosines), rel=1e-6)
    assert found.tokens == rows * places


@pytest.mark.parametrize("model_type", TYPES)
def test_a_repair_of_such_states_is_refused(model_type: str) -> None:
    model = tiny_model(model_type)
    with pytest.raises(UnsupportedSurgery, match=r"the layout .*Expected .batch, tokens, features"):
        measure_moments(model, [tiny_inputs(model)], [range(1, 3)])


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_torchs_own_layers_say_which_axis_is_first(kind: type[nn.Module]) -> None:
    second = kind(8, 2, 8)
    assert layout_of(second) == "tokens batch features"
    state = torch.randn(5, 2, 8)
    assert torch.equal(by_token(state, second), state.transpose(0, 1))
    first = kind(8, 2, 8, batch_first=True)
    assert by_token(state, first) is state


def test_a_state_of_two_axes_is_one_row_of_tokens() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    state = torch.randn(5, 8)
    assert torch.equal(by_token(state, layer), state[None])


def test_fsmt_has_the_tokens_first() -> None:
    """Its blocks have the names of others, so the module counts too."""
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = FSMTConfig(langs=["a", "b"], src_vocab_size=32, tgt_vocab_size=32, **sizes, **heads)
    model = FSMTForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(3, 32, (2, 5), generator=generator) for name in ("input_ids", "decoder_input_ids")}
    with torch.no_grad(), HiddenStateRecorder(model, [1], tokens="last") as last:
        states = model(**batch, output_hidden_states=True).decoder_hidden_states[-1]
    torch.testing.assert_close(last.outputs[1][0], states[:, -1])
    with pytest.raises(UnsupportedSurgery, match=r"the layout \(tokens, batch, features\)"):
        Intervention(model, {("block.output", 0): Zero()}).__enter__()
