"""Models that modify themselves depending on their input are as before after whatever the library runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from streamline_hooks import LayerSurgeon, find_stack, load, profile, save
from streamline_hooks.modeling import inference, preserve_forward_state
from streamline_hooks.surgery.bypass import bypassing
from streamline_hooks.testing import tiny_model
from streamline_hooks.testing.model_state import ModelState

SHORT = torch.arange(3, 11)[None]
LONG = torch.randint(3, 60, (2, 48), generator=torch.Generator().manual_seed(0))
_SPARSE = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}


def big_bird() -> Any:
    return tiny_model("big_bird", blocks=4, is_decoder=False, **_SPARSE)


def pegasus() -> Any:
    """Its encoder has the sparse attention; blocks of both sides are counted by one name each."""
    sizes = {"d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 96}
    torch.manual_seed(0)
    config = transformers.BigBirdPegasusConfig(vocab_size=64, pad_token_id=0, **sizes, **heads, **_SPARSE)
    return transformers.BigBirdPegasusForConditionalGeneration(config).eval()


def dynamic_rope() -> Any:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return tiny_model("llama", blocks=4, max_position_embeddings=12, **rope_argument(rope))


def long_rope() -> Any:
    rope: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    if transformers.__version__ >= "5":
        rope |= {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12}
    else:
        rope["type"] = "longrope"
    return tiny_model(
        "phi3", blocks=4, max_position_embeddings=96, original_max_position_embeddings=12, **rope_argument(rope)
    )


def rope_argument(rope: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters" if transformers.__version__ >= "5" else "rope_scaling": rope}


def sinusoidal() -> Any:
    """XGLM computes its table of positions anew for a longer text."""
    return tiny_model("xglm", blocks=4, max_position_embeddings=4)


@torch.no_grad()
def answer(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids).logits
    return logits


MODELS: dict[str, Callable[[], Any]] = {
    "big_bird": big_bird, "dynamic rope": dynamic_rope, "long rope": long_rope, "sinusoidal": sinusoidal,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_removal_leaves_the_model_as_it_was(name: str) -> None:
    """It is probed on a short text, after the model has run a long one."""
    model = MODELS[name]()
    expected, before = answer(model, LONG), ModelState(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
    assert before.changes() == []
    assert torch.equal(answer(model, LONG), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_removal_equals_the_bypassed_block_on_a_long_text(name: str) -> None:
    model = MODELS[name]()
    with bypassing(model, range(2, 3)):
        expected = answer(model, LONG)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        torch.testing.assert_close(answer(model, LONG), expected)


@pytest.mark.parametrize("name", MODELS)
def test_measuring_on_a_short_text_leaves_the_model_as_it_was(name: str) -> None:
    model = MODELS[name]()
    before, batch = ModelState(model), {"input_ids": SHORT, "attention_mask": torch.ones_like(SHORT)}
    profile(model, [batch])
    assert before.changes() == []


@pytest.mark.parametrize("ids", [SHORT, LONG], ids=["short", "long"])
def test_a_committed_big_bird_comes_back(ids: torch.Tensor, tmp_path: Path) -> None:
    """Also if the model has run a short text before, which replaces its attention modules."""
    model = big_bird()
    answer(model, ids)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        surgeon.commit()
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved").eval()
    assert loaded.config.attention_type == "block_sparse" and len(find_stack(loaded)) == 3
    torch.testing.assert_close(answer(loaded, SHORT), answer(model, SHORT))
    if ids is LONG:
        torch.testing.assert_close(answer(load(tmp_path / "saved").eval(), LONG), answer(big_bird_without(2), LONG))


def big_bird_without(k: int) -> Any:
    model = big_bird()
    del model.bert.encoder.layer[k]
    return model


def test_an_encoder_with_sparse_attention_and_a_decoder() -> None:
    model = pegasus()
    given = {"input_ids": LONG, "decoder_input_ids": SHORT.expand(2, -1)}
    before, state = model(**given).logits, ModelState(model)
    with LayerSurgeon(model, "encoder") as surgeon:
        surgeon.remove([1])
        assert model(**given).logits.shape == before.shape
    assert state.changes() == [] and torch.equal(model(**given).logits, before)
    with LayerSurgeon(model, "encoder") as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    assert model.config.encoder_layers == 3


class SelfModifying(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Linear(4, 4)
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.register_buffer("means", torch.zeros(2, 2))
        self.register_buffer("order", torch.zeros(2, 2, dtype=torch.long), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.state = torch.zeros(3)
        self.seen: list[int] = []
        self.by_length: dict[int, str] = {1: "one"}
        self._length = 0
        self.config = transformers.LlamaConfig()

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        self.inner = nn.Identity()
        self.table = torch.ones(5)
        self.register_buffer("new_table", torch.ones(1), persistent=False)
        for buffer in (self.means, self.order, self.calls):
            buffer += 1
        self.state += 1
        self.seen.append(state.shape[1])
        self.by_length[state.shape[1]] = "many"
        self._length = self.new_attribute = state.shape[1]
        self.config.problem_type = "regression"
        return state


def test_everything_that_a_forward_changes_is_restored() -> None:
    model = nn.Sequential(SelfModifying())
    before, keys = ModelState(model), list(model.state_dict())
    with preserve_forward_state(model):
        model(torch.zeros(1, 7, 4))
        assert before.changes()
    assert before.changes() == [] and list(model.state_dict()) == keys
    assert not hasattr(model[0], "new_attribute") and not hasattr(model[0], "new_table")
    assert model[0].config.problem_type is None and model[0].state.tolist() == [0, 0, 0]


def test_hidden_states_are_complete_after_they_were_first_requested_inside() -> None:
    """Transformers installs its hooks once; those on a module that is put back must not be counted on."""
    model = big_bird()
    with preserve_forward_state(model):
        model(SHORT, output_hidden_states=True, output_attentions=True)
    output = model(LONG, output_hidden_states=True)
    assert len(output.hidden_states) == len(find_stack(model)) + 1
    assert len(model(LONG, output_attentions=True).attentions) == len(find_stack(model))


def test_a_model_that_scales_its_weights_for_evaluation_does_so_once() -> None:
    """RWKV divides weights in place and remembers it in an attribute; restoring that alone would divide them twice."""
    model: Any = tiny_model("rwkv", blocks=8, rescale_every=2)
    model.train().eval()
    ids = torch.arange(3, 15)[None]
    expected = copy.deepcopy(model)(ids, use_cache=False).logits
    for _ in range(2):
        with inference(model):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
