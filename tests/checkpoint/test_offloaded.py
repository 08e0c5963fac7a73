"""A checkpoint opened without its blocks is the model that is loaded whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from streamline_hooks import StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.checkpoint import load
from streamline_hooks.checkpoint.offloaded import offloaded_identity, open_checkpoint, stored_bytes
from streamline_hooks.checkpoint.streaming import BlockwisePass
from streamline_hooks.core import weights_in_memory
from streamline_hooks.statistics import model_identity
from streamline_hooks.testing import tiny_model
from tests.checkpoint.block_by_block import DTYPES, FAMILIES, calibration, on_disk, places, reads, written  # noqa: F401
from tests.tiny_models import left_padded, repaired, tiny_config, tokens


@pytest.mark.parametrize(("family", "dtype"), list(zip(FAMILIES, DTYPES, strict=True)))
def test_only_the_blocks_are_on_disk(family: str, dtype: torch.dtype, tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, _ = written(tmp_path, family, dtype)
    whole, model = load(folder, dtype="auto"), open_checkpoint(folder)
    assert not reads, "opening reads no block"
    assert all(on_disk(model))
    assert not model.training
    stack, wanted = find_stack(model), dict(whole.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(wanted)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == wanted[name].dtype == dtype
        inside = name.startswith(f"{stack.path}.") or name == "lm_head.weight"
        assert parameter.is_meta == inside, name
        assert inside or torch.equal(parameter, wanted[name])
    buffers = dict(whole.named_buffers())
    assert list(buffers) == [name for name, _ in model.named_buffers()]
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_in_memory_while_it_is_needed(family: str, tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, whole = written(tmp_path, family)
    model: Any = open_checkpoint(folder)
    block, wanted = find_stack(model)[2], find_stack(whole)[2].state_dict()
    with weights_in_memory(block):
        assert on_disk(model) == [True, True, False, True, True, True]
        assert all(torch.equal(value, wanted[name]) for name, value in block.state_dict().items())
        model(tokens(1, 5))
        model(tokens(1, 5))
        assert on_disk(model) == [True, True, False, True, True, True]
    of_block = {name: n for name, n in reads.items() if f".{2}." in name}
    assert len(of_block) == len(wanted) and set(of_block.values()) == {1}
    assert all(on_disk(model))
    batch = left_padded(2, 7)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, whole(**batch).logits), "afterwards it is read for each forward again"


def test_a_block_is_let_go_of_when_something_fails(tmp_path: Path) -> None:
    model = open_checkpoint(written(tmp_path)[0])
    with pytest.raises(ZeroDivisionError), weights_in_memory(find_stack(model)[1]):
        1 / 0  # noqa: B018
    assert all(on_disk(model))
    assert model(tokens(1, 4)).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_is_that_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    folder, whole = written(tmp_path, family)
    stack = find_stack(open_checkpoint(folder))
    assert offloaded_identity(stack) == model_identity(find_stack(whole))
    shard = next(folder / name for key, name in _where(folder).items() if f"{stack.path}.3." in key)
    values = load_file(shard)
    name = next(name for name in values if f"{stack.path}.3." in name)
    save_file({**values, name: values[name] + 1}, shard, {"format": "pt"})
    assert offloaded_identity(find_stack(open_checkpoint(folder))) != model_identity(find_stack(whole)), (
        "a block's weights count"
    )


def test_bytes_are_those_in_the_files(tmp_path: Path) -> None:
    folder, whole = written(tmp_path, "llama", torch.bfloat16)
    numbers = find_stack(whole).parameters_per_block[1]
    for dtype in (None, torch.float32):
        model = open_checkpoint(folder, dtype=dtype)
        assert next(model.model.layers[1].parameters()).dtype == (dtype or torch.bfloat16)
        assert stored_bytes(model.model.layers[1]) == 2 * numbers
    assert stored_bytes(find_stack(whole)[1]) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_in_memory(tied: bool, tmp_path: Path) -> None:
    whole: Any = transformers.LlamaForCausalLM(tiny_config("llama", tie_word_embeddings=tied)).eval()
    whole.save_pretrained(tmp_path)
    model: Any = open_checkpoint(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.is_meta != tied
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 6)).logits, whole(tokens(2, 6)).logits)


def _where(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("key", ["model.layers.3.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_weight_is_named(key: str, tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    shard = folder / said["weight_map"].pop(key)
    index.write_text(json.dumps(said))
    values = load_file(shard)
    del values[key]
    save_file(values, shard, {"format": "pt"})
    with pytest.raises(StreamlineError, match=rf"{key}.*missing"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    shard = folder / _where(folder)["model.layers.3.mlp.up_proj.weight"]
    shard.unlink()
    with pytest.raises(StreamlineError, match=rf"{shard.name} is missing"):
        open_checkpoint(folder)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    transformers.T5Config(d_model=8, num_layers=2).save_pretrained(tmp_path / "t5")
    save_file({"a": torch.zeros(1)}, tmp_path / "t5" / "model.safetensors")
    with pytest.raises(UnsupportedSurgery, match=r"contains a t5.*output of its encoder.*Load"):
        open_checkpoint(tmp_path / "t5")
    repaired("llama").save_pretrained(tmp_path / "spliced")
    with pytest.raises(UnsupportedSurgery, match="spliced modules"):
        open_checkpoint(tmp_path / "spliced")
    folder, _ = written(tmp_path)
    said = json.loads((folder / "config.json").read_text())
    quantized = {**said, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(UnsupportedSurgery, match=r"float32.*float16.*bfloat16"):
        open_checkpoint(folder)
    with pytest.raises(StreamlineError, match=r"is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    save_file({"a": torch.zeros(1)}, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(StreamlineError, match=r"a vit.*no causal language model"):
        open_checkpoint(tmp_path / "vit")


def test_experts_that_are_stored_apart(tmp_path: Path) -> None:
    """Transformers 5 stacks the experts' weights when it loads them; Transformers 4 has them as they are stored."""
    tiny_model("mixtral").save_pretrained(tmp_path / "mixtral", max_shard_size="50KB")
    whole, folder = load(tmp_path / "mixtral"), tmp_path / "mixtral"
    if int(transformers.__version__.split(".")[0]) >= 5:
        with pytest.raises(UnsupportedSurgery, match=r"MixtralForCausalLM.*offload_folder="):
            open_checkpoint(folder)
    model = open_checkpoint(folder, offload_folder=tmp_path / "experts")
    assert all(on_disk(model))
    assert offloaded_identity(find_stack(model)) == model_identity(find_stack(whole))
    batches = calibration()
    wanted = places(whole, batches)
    with BlockwisePass(model, batches) as states:
        for place in states:
            assert all(torch.equal(states.read(place, n), of_batch[place]) for n, of_batch in enumerate(wanted))
    assert stored_bytes(find_stack(model)[1]) == 4 * find_stack(whole).parameters_per_block[1]
