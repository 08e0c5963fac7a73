"""What is loaded in 4 or 8 bit is ranked, shortened, committed, saved and loaded, or refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, QuantoConfig

from streamline_hooks import LayerSurgeon, StreamlineError, load, profile, save
from streamline_hooks.core import UnsupportedSurgery
from streamline_hooks.replacements import LinearReplacement

IDS = torch.arange(1, 19).view(2, 9)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("original")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantized(folder: Path, bits: str, **options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    if bits == "4 bit":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
            **options,
        }
    else:
        options = {"load_in_8bit": True, **options}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))
    return exact(model)


def exact(model: Any) -> Any:
    """Keep bitsandbytes to one layout: on some CPUs it runs another one, which state_dict() turns back with loss."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
@pytest.mark.parametrize("window", [range(0, 2), range(2, 4), range(4, 6)], ids=["first", "middle", "last"])
def test_a_removal_in_a_quantized_model_comes_back(bits: str, window: range, original: Path, tmp_path: Path) -> None:
    model = quantized(original, bits)
    linear = type(model.model.layers[0].mlp.up_proj)
    assert linear.__module__.startswith("bitsandbytes")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(window)
        expected = logits(model)
        plan = surgeon.commit()
    assert len(plan.removed) == 2 and torch.equal(logits(model), expected)
    save(model, tmp_path / "model")
    for loaded in (load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert type(loaded.model.layers[0].mlp.up_proj) is linear and len(loaded.model.layers) == 4
        torch.testing.assert_close(logits(exact(loaded)), expected)


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_a_module_named_to_stay_in_full_precision_still_does(bits: str, original: Path, tmp_path: Path) -> None:
    model = quantized(original, bits, llm_int8_skip_modules=["model.layers.4.mlp", "lm_head"])
    assert type(model.model.layers[4].mlp.up_proj) is torch.nn.Linear
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1, 2])
        expected = logits(model)
        surgeon.commit()
    save(model, tmp_path / "model")
    loaded: Any = load(tmp_path / "model")
    plain = [k for k in range(4) if type(loaded.model.layers[k].mlp.up_proj) is torch.nn.Linear]
    assert plain == [2]
    torch.testing.assert_close(logits(exact(loaded)), expected)


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_a_quantized_model_is_ranked(bits: str, original: Path) -> None:
    model = quantized(original, bits)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    ours, plain = (profile(each, batches) for each in (model, LlamaForCausalLM.from_pretrained(original)))
    torch.testing.assert_close(ours.cosine, plain.cosine, rtol=0, atol=0.05)


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_a_splice_in_a_quantized_model_is_refused_before_anything_changes(bits: str, original: Path) -> None:
    model = quantized(original, bits)
    before = logits(model)
    with pytest.raises(
        UnsupportedSurgery, match="bitsandbytes.*load its checkpoint with quantization_config"
    ) as raised:
        with LayerSurgeon(model) as surgeon:
            surgeon.replace([2, 3], LinearReplacement(64))
            assert logits(model).isfinite().all()  # in memory it works
            surgeon.commit()
    assert raised.value.cause == "quantized"
    assert type(model) is LlamaForCausalLM and torch.equal(logits(model), before)


def test_a_block_in_full_precision_among_quantized_ones_is_refused(original: Path) -> None:
    block = copy.deepcopy(LlamaForCausalLM.from_pretrained(original).model.layers[2])
    with pytest.raises(UnsupportedSurgery, match=r"model\.layers\.2\.self_attn\.q_proj is in full precision"):
        with LayerSurgeon(quantized(original, "8 bit")) as surgeon:
            surgeon.replace([2, 3], block)
            surgeon.commit()


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_what_was_replaced_in_full_precision_is_loaded_quantized(bits: str, original: Path, tmp_path: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(original)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([2, 3], LinearReplacement.from_map(0.1 * torch.randn(64, 64)))
        surgeon.commit()
    save(model, tmp_path / "model")
    loaded = quantized(tmp_path / "model", bits)
    gap = (logits(loaded) - logits(model)).abs().max() / logits(model).abs().max()
    assert 0 < gap < 0.5
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(exact(again)), logits(loaded))
    with pytest.raises(ValueError, match="quant_method"):
        LlamaForCausalLM.from_pretrained(tmp_path / "again", ignore_mismatched_sizes=True)


def test_quanto_is_refused_with_the_reason(original: Path) -> None:
    pytest.importorskip("optimum.quanto")
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=QuantoConfig(weights="int8"))
    before = logits(model)
    with pytest.raises(StreamlineError, match="quantized with quanto, which Transformers cannot save.*full precision"):
        with LayerSurgeon(model) as surgeon:
            surgeon.remove([2, 3])
            surgeon.commit()
    assert len(model.model.layers) == 6 and torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_is_refused_with_the_reason(original: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(original)
    try:
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this PyTorch has no dynamic quantization: {error}")
    before = logits(model)
    with pytest.raises(StreamlineError, match=r"quantized\.dynamic.*packed weights.*before quantizing"):
        with LayerSurgeon(model) as surgeon:
            surgeon.remove([2, 3])
            surgeon.commit()
    assert len(model.model.layers) == 6 and torch.equal(logits(model), before)


def test_a_refused_commit_leaves_what_bitsandbytes_runs_as_it_is(original: Path) -> None:
    """Without `exact`: on CPUs for which bitsandbytes has a layout of its own, this is what users run."""
    bnb = pytest.importorskip("bitsandbytes")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=options)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    before = logits(model)
    with pytest.raises(UnsupportedSurgery):
        with LayerSurgeon(model) as surgeon:
            surgeon.replace([2], LinearReplacement(64))
            surgeon.commit()
    assert torch.equal(logits(model), before)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        expected = logits(model)
        surgeon.commit()
    assert torch.equal(logits(model), expected)
