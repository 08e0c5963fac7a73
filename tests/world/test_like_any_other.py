"""What one does with a model after compressing it: quantize, export, stream, draft, put in a pipeline."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer, pipeline

from streamline_hooks import LayerSurgeon, compress, save
from streamline_hooks.replacements import LinearReplacement, SwiGLUReplacement
from tests.configured import configured
from tests.tiny_models import FAMILIES, left_padded, repaired, tiny_model, tokens

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 9)).logits


@pytest.fixture(scope="module")
def short_stories(stories: tuple[Any, Any], story_texts: list[str]) -> tuple[Any, Any]:
    """A compressed model that still writes, and its tokenizer."""
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    compress(
        model,
        story_texts,
        configured(
            remove=1,
            protect=[0],
            repair="linear",
            sequence_length=64,
            calibration_tokens=4096,
            validation_tokens=512,
            test_tokens=512,
        ),
        tokenizer=tokenizer,
    )
    return model, tokenizer


@pytest.fixture
def torchao() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("torchao.quantization", reason="torchao is in the environment of `make engines` only")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_quantized_as_it_is_loaded_saved_so_and_loaded_again(family: str, torchao: Any, tmp_path: Path) -> None:
    """A quantizer reads the weights past what save_pretrained is given, the guard among them."""
    model = repaired(family)
    save(model, tmp_path / "model")
    asked = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=asked)
    splice = loaded.model.layers[1].spliced_before[0].projection
    assert type(splice.weight).__name__ == "Int8Tensor", "the splice itself was not quantized"
    gap = (logits(loaded) - logits(model)).abs().max() / logits(model).abs().max()
    assert 0 < gap < 0.1
    norm = loaded.model.norm.weight
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.model.norm.weight is norm, "an optimizer would go on with a weight that is not the model's"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))
    with pytest.raises((RuntimeError, ValueError), match="mismatch|size|quant_method"):
        type(model).__mro__[2].from_pretrained(tmp_path / "again")


def test_quantized_in_memory(torchao: Any) -> None:
    model = repaired("llama")
    whole = logits(model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert 0 < (logits(model) - whole).abs().max() / whole.abs().max() < 0.1


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_by_torch_with_its_splices(family: str) -> None:
    model = repaired(family).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2, max=64)}

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    traced = (tokens(2, 8), torch.ones(2, 8).long())
    with torch.no_grad():
        program = torch.export.export(
            Logits().eval(), traced, dynamic_shapes={"input_ids": sizes, "attention_mask": sizes}
        ).module()
        for batch in ({"input_ids": tokens(3, 11), "attention_mask": torch.ones(3, 11).long()}, left_padded(3, 9)):
            found = program(batch["input_ids"], batch["attention_mask"])
            real = batch["attention_mask"].bool()
            torch.testing.assert_close(found[real], model(**batch).logits[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # a full cache, and mixed kinds of caches
def test_it_drafts_for_its_own_original(family: str) -> None:
    """Assisted generation gives the tokens of the original, whoever drafts."""
    model = tiny_model(family)
    alone = model.generate(tokens(1, 7), **OPTIONS)
    assert torch.equal(model.generate(tokens(1, 7), assistant_model=repaired(family), **OPTIONS), alone)


def test_drafting_takes_fewer_passes_of_the_original(stories: tuple[Any, Any], short_stories: tuple[Any, Any]) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    original, (draft, tokenizer) = copy.deepcopy(stories[0]), short_stories
    handle = original.register_forward_pre_hook(count)
    given = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 40, "do_sample": False}
    alone = original.generate(**given, **options)
    unaided, passes = passes, 0
    assert torch.equal(original.generate(**given, assistant_model=draft, **options), alone)
    assert passes < unaided
    handle.remove()


def test_in_a_pipeline_batched_and_streamed(short_stories: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = short_stories
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    save(model, tmp_path / "model", tokenizer=tokenizer)
    written = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    written.tokenizer.padding_side = "left"
    prompts = ["Once upon a time", "Lily had a big red ball. One day"]
    config = GenerationConfig(max_new_tokens=16, do_sample=False)
    together = [one[0]["generated_text"] for one in written(prompts, batch_size=2, generation_config=config)]
    alone = [written(prompt, generation_config=config)[0]["generated_text"] for prompt in prompts]
    assert together == alone and all(text.startswith(p) for text, p in zip(alone, prompts, strict=True))
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    given = tokenizer(prompts[0], return_tensors="pt", return_token_type_ids=False)
    model.generate(**given, streamer=streamer, max_new_tokens=16, do_sample=False)
    assert "".join(streamer).strip() == alone[0].strip()


@pytest.mark.parametrize("make", [lambda: LinearReplacement(32), lambda: SwiGLUReplacement(32, 48)])
def test_surgery_on_a_quantized_model(make: Any, torchao: Any) -> None:
    """Its weights are no plain tensors; what is put in among them is."""
    model = tiny_model("llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    before = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), make())
        inside = logits(model)
    assert torch.equal(logits(model), before) and not torch.equal(inside, before)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), make())
        surgeon.commit()
    assert len(model.model.layers) == 4 and torch.isfinite(logits(model)).all()
