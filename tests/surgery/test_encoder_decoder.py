"""Encoders and decoders of different lengths generate as before: inside the context, committed, and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack
from streamline_hooks.testing.model_state import ModelState

_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4}
_BART = {
    "d_model": 16, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
_SWITCH = {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4, "num_experts": 2, "expert_capacity": 64}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _T5), "umt5": ("UMT5", _T5), "longt5": ("LongT5", _T5),
    "switch": ("SwitchTransformers", {**_T5, **_SWITCH}), "bart": ("Bart", _BART),
    "marian": ("Marian", {**_BART, "decoder_vocab_size": 48}),
}  # fmt: skip
_HEADS = {"bart": "ForConditionalGeneration", "marian": "MTModel"}
IDS = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny(name: str, **changes: Any) -> Any:
    prefix, settings = CLASSES[name]
    special = {"vocab_size": 48, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = getattr(transformers, f"{prefix}Config")(**special, **{**settings, **changes})
    torch.manual_seed(0)
    return getattr(transformers, prefix + _HEADS.get(name, "ForConditionalGeneration"))(config).eval()


def require_generation(model: Any, **given: Any) -> None:
    """Raise unless greedy generation with a cache gives the logits of generation without one."""
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1, "output_logits": True}
    runs = [{"use_cache": True, **given}, {"use_cache": False}]
    logits = [
        torch.stack(model.generate(IDS, **asked, **run, return_dict_in_generate=True).logits) for run in runs
    ]  # fmt: skip
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def follows_the_decoder(name: str) -> bool:
    """Whether Transformers reads the decoder's count for the size of its cache; Transformers 4 does not for T5."""
    return transformers.__version__ >= "5" or CLASSES[name][1].get("encoder_layers") is not None


T5_FOLLOWS = pytest.mark.skipif(not follows_the_decoder("t5"), reason="T5's cache is sized by the encoder: refused")


@pytest.mark.sample(5)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("name", CLASSES)
def test_one_side_becomes_shorter(name: str, side: str, tmp_path: Path) -> None:
    model = tiny(name)
    require_generation(model)  # Switch keeps the precision of its last input
    before = ModelState(model)
    if side == "encoder" and not follows_the_decoder(name):
        with LayerSurgeon(model, side) as surgeon, pytest.raises(UnsupportedSurgery, match="sizes the cache of the 4"):
            surgeon.remove([1, 2])
        assert before.changes() == []
        return
    with LayerSurgeon(model, side) as surgeon:
        surgeon.remove([1, 2])
        require_generation(model)
    assert before.changes() == []
    with LayerSurgeon(model, side) as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    require_generation(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    lengths = {each: len(find_stack(loaded, each)) for each in ("encoder", "decoder")}
    assert lengths == {**dict.fromkeys(lengths, 4), side: 2}
    require_generation(loaded)


@pytest.mark.parametrize("encoder", [2, 4, 5])
@pytest.mark.parametrize("name", ["t5", "longt5", "bart"])
def test_the_decoder_becomes_longer(name: str, encoder: int, tmp_path: Path) -> None:
    """Also than the encoder: each forward of a decoder that was given no cache makes one, as ``generate`` does."""
    old = transformers.__version__ < "5"  # BART's cache has the encoder's length, T5's what the decoder had at first
    if old and encoder < 4:
        pytest.skip("Transformers 4 makes no such model generate")
    count = "encoder_layers" if name == "bart" else "num_layers"
    model = tiny(name, **{count: encoder})
    with LayerSurgeon(model, "decoder") as surgeon:
        if old and (name != "bart" or encoder == 4):
            with pytest.raises(UnsupportedSurgery, match="cache of the 5 decoder blocks"):
                surgeon.insert(4, copy.deepcopy(surgeon.stack[1]))
            surgeon.remove([2])
        surgeon.insert(4, copy.deepcopy(surgeon.stack[1]))
        model(IDS, decoder_input_ids=IDS[:, :3])
        surgeon.commit()
    model(IDS, decoder_input_ids=IDS[:, :3])
    require_generation(model)
    model.save_pretrained(tmp_path)
    require_generation(transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval())


@T5_FOLLOWS
def test_both_sides_become_shorter_in_turn(tmp_path: Path) -> None:
    """What sizes the cache follows the decoder, also in a model that was loaded in between."""
    model = tiny("t5")
    with LayerSurgeon(model, "encoder") as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    model.save_pretrained(tmp_path / "first")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "first").eval()
    with LayerSurgeon(model, "decoder") as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 3)
    assert model.config.get_text_config(decoder=True).num_hidden_layers == 3
    model.save_pretrained(tmp_path / "second")
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "second").eval()
    assert len(find_stack(loaded, "decoder")) == 3
    require_generation(loaded)


@T5_FOLLOWS
def test_a_static_cache_is_sized_by_the_decoder() -> None:
    model = tiny("t5")
    with LayerSurgeon(model, "encoder") as surgeon:
        surgeon.remove([2])
        require_generation(model, cache_implementation="static")


def test_an_encoder_whose_count_cannot_be_told_from_the_decoders_is_refused() -> None:
    """ProphetNet derives the size of the cache from the encoder and lets nobody set it."""
    sizes = {f"num_{side}_layers": 4 for side in ("encoder", "decoder")}
    sizes |= {f"num_{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
    config = transformers.ProphetNetConfig(vocab_size=48, hidden_size=16, max_position_embeddings=32, **sizes)
    model = transformers.ProphetNetForConditionalGeneration(config).eval()
    before = ModelState(model)
    with LayerSurgeon(model, "encoder") as surgeon:
        assert [hazard.cause for hazard in surgeon.check([1])] == ["decoder-cache"]
        with pytest.raises(UnsupportedSurgery, match="cache of the 4 decoder blocks"):
            surgeon.remove([1])
    assert before.changes() == []


@T5_FOLLOWS
def test_a_block_of_another_model_is_inserted_into_a_decoder_that_is_counted_twice() -> None:
    """Transformers reads the size of the cache from a second count, which has no value before."""
    model = tiny("t5", num_layers=2)
    block = copy.deepcopy(model.decoder.block[2])
    for module in block.modules():
        if "layer_idx" in vars(module):
            module.layer_idx = 99  # as in a model of more blocks
    with LayerSurgeon(model, "decoder") as surgeon:
        surgeon.insert(2, block)
        assert [slot.source for slot in surgeon.plan.slots] == [0, 1, None, 2, 3]
        assert model.config.num_decoder_layers == model.config.decoder_layers == 5
        require_generation(model)
    assert "decoder_layers" not in vars(model.config)
