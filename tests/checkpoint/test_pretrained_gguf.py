"""Models that are loaded from GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from streamline_hooks.checkpoint import LoadingConfig, export_gguf, save
from streamline_hooks.checkpoint.pretrained import load_pretrained
from streamline_hooks.core import StreamlineError
from streamline_hooks.modeling import Task
from tests.checkpoint.export.small_tokenizer import small_tokenizer
from tests.tiny_models import tiny_model


def test_a_gguf_file(stories: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = stories
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "model.gguf"
    export_gguf(model, file, tokenizer=tmp_path / "tokenizer")
    loaded, loaded_tokenizer = load_pretrained(file)
    ids = loaded_tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer("Once upon a time", return_tensors="pt").input_ids)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4) and not loaded.training
        rounded = load_pretrained(str(file), torch.bfloat16)[0]
        assert rounded.dtype == torch.bfloat16
        save(loaded, tmp_path / "saved", tokenizer=loaded_tokenizer)
        assert torch.equal(load_pretrained(tmp_path / "saved")[0](ids).logits, loaded(ids).logits)
    for options in ({"task": Task("embedding")}, {"loading": LoadingConfig(revision="main")}):
        with pytest.raises(StreamlineError, match=r"model\.gguf"):
            load_pretrained(file, **options)


def test_a_gguf_file_that_lacks_a_weight(tmp_path: Path) -> None:
    model = tiny_model("llama")
    small_tokenizer(tmp_path, model.config.vocab_size)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tmp_path)
    writer = GGUFWriter(tmp_path / "damaged.gguf", "llama")
    reader = GGUFReader(tmp_path / "model.gguf")
    for name, field in reader.fields.items():
        if name.partition(".")[0] in ("llama", "tokenizer"):
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        if tensor.name != "blk.1.ffn_up.weight":
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StreamlineError, match=r"has no weights for .*They would be random"):
        load_pretrained(tmp_path / "damaged.gguf")
