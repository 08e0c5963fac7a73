"""ONNX Runtime gives the same logits, with and without splices, for other batches than the one that was traced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.checkpoint import export_onnx
from streamline_hooks.checkpoint.export import onnx as onnx_export
from tests.tiny_models import left_padded, repaired, tiny_model, tokens


def shortened() -> nn.Module:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    return model


@pytest.mark.parametrize("kind", ["plain", "spliced"])
def test_the_same_logits(kind: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is in the environment of `make engines` only")
    pytest.importorskip("onnxscript")
    model = shortened() if kind == "plain" else repaired("llama")
    session = runtime.InferenceSession(str(export_onnx(model, tmp_path / "model.onnx")))
    for batch in ({"input_ids": tokens(3, 11), "attention_mask": torch.ones(3, 11).long()}, left_padded(2, 7)):
        found = session.run(None, {name: batch[name].numpy() for name in ("input_ids", "attention_mask")})[0]
        with torch.no_grad():
            expected = model(**batch).logits
        real = batch["attention_mask"].bool()
        assert torch.allclose(torch.tensor(found)[real], expected[real], atol=1e-4)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(StreamlineError, match=r"onnxscript.*pip install \"streamline_hooks\[onnx\]"):
        export_onnx(shortened(), tmp_path / "model.onnx")
