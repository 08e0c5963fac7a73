"""PEFT's wrapper, put on before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, UnsupportedSurgery, find_stack, load, save
from tests.tiny_models import BLOCKS, Nudge, left_padded, repaired, tiny_model, tokens

peft = pytest.importorskip("peft", reason="peft is not installed")
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
families = pytest.mark.parametrize("family", TARGETS)


def adapted(model: nn.Module, family: str = "llama", seed: int = 0) -> Any:
    """With an adapter that changes the output."""
    torch.manual_seed(seed)
    settings = peft.LoraConfig(target_modules=TARGETS[family], init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    return peft.get_peft_model(model, settings).eval()


def logits(model: nn.Module, **batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**(batch or {"input_ids": tokens(2, 7)}), use_cache=False).logits


@families
def test_found_and_recorded_through_the_wrapper(family: str) -> None:
    model = adapted(tiny_model(family), family)
    stack, inside = find_stack(model), find_stack(model.get_base_model())
    assert stack.container is inside.container and stack.path == f"base_model.model.{inside.path}"
    assert stack.config is inside.config and stack.count_attribute == inside.count_attribute
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        states = model(**left_padded(3, 9), output_hidden_states=True).hidden_states
    for k in range(BLOCKS):
        assert torch.equal(record.inputs[k][0], states[k])


@families
@pytest.mark.parametrize("tokens_kept", ["all", "last", "real"])
def test_a_batch_is_completed_as_for_the_model_inside(family: str, tokens_kept: Any) -> None:
    """The wrapper's forward does not name position_ids, without which GPT-2 counts the padding."""
    model = adapted(tiny_model(family), family)
    with torch.no_grad(), HiddenStateRecorder(model, tokens=tokens_kept) as record:
        record(**left_padded(3, 9))
    with torch.no_grad(), HiddenStateRecorder(model.get_base_model(), tokens=tokens_kept) as expected:
        expected(**left_padded(3, 9))
    for k in range(BLOCKS):
        assert torch.equal(record.inputs[k][0], expected.inputs[k][0])


@families
def test_surgery_through_the_wrapper_is_surgery_inside_it(family: str) -> None:
    model, inside = adapted(tiny_model(family), family), adapted(tiny_model(family), family).get_base_model()
    keys, before = list(model.state_dict()), logits(model)
    with LayerSurgeon(model) as surgeon, LayerSurgeon(inside) as expected:
        for one in (surgeon, expected):
            one.remove(range(1, 3))
            one.insert(4, Nudge())
        assert torch.equal(logits(model), logits(inside))
        assert model.config.num_hidden_layers == BLOCKS - 2
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        written = [model.generate(**left_padded(2, 5), **options, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*written)
    assert list(model.state_dict()) == keys and torch.equal(logits(model), before)
    assert model.config.num_hidden_layers == BLOCKS


def test_an_adapter_is_trained_beside_a_splice() -> None:
    model, nudge = adapted(tiny_model("llama")).train(), Nudge()
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), nudge)
        ids = tokens(2, 7)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert nudge.weight.grad is not None
    assert learning and all("lora_" in name for name in learning)
    assert not any(f".layers.{k}." in name for name in learning for k in (1, 2))


def test_saving_and_committing_under_the_wrapper_are_refused(tmp_path: Path) -> None:
    from streamline_hooks import StreamlineError

    model = adapted(tiny_model("llama"))
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        with pytest.raises(StreamlineError, match=r"save_pretrained.*LayerSurgeon"):
            model.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedSurgery, match=r"PeftModel\w*.*PEFT"):
            surgeon.commit()
    with LayerSurgeon(model.get_base_model()) as surgeon:
        surgeon.remove(range(1, 3))
        with pytest.raises(UnsupportedSurgery, match="merge_and_unload"):
            surgeon.commit()
    assert not list(tmp_path.iterdir())


def test_merged_first_it_is_committed(tmp_path: Path) -> None:
    model = adapted(tiny_model("llama")).merge_and_unload()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        surgeon.commit()
    save(model, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_wrapped_after_a_commit(tmp_path: Path) -> None:
    model = adapted(repaired("llama"))
    expected = logits(model)
    assert not torch.allclose(expected, logits(repaired("llama")))
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        record(input_ids=tokens(2, 7))
    assert sorted(record.inputs) == list(range(BLOCKS - 2))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(repaired("llama"), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "StreamlinedLlamaForCausalLM"
    save(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected)
