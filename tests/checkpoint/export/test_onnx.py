"""ONNX Runtime gives the same logits, with and without splices, for other batches than the one that was traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.checkpoint import export_onnx
from streamline_hooks.checkpoint.export import onnx as onnx_export
from streamline_hooks.testing import tiny_model as any_model
from tests.tiny_models import left_padded, repaired, tiny_model, tokens


def shortened(family: str = "llama") -> nn.Module:
    model = tiny_model(family)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    return model


def session_of(model: nn.Module, folder: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is in the environment of `make engines` only")
    pytest.importorskip("onnxscript")
    return runtime.InferenceSession(str(export_onnx(model, folder / "model.onnx")))  # type: ignore[arg-type]


def run(session: Any, batch: dict[str, Tensor], past: list[Any] | None = None) -> list[Any]:
    """Return the logits, and the keys and values of each block, which the next call takes."""
    names = [entry.name for entry in session.get_inputs()]
    cache = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values")]
    if past is None:
        size = len(batch["input_ids"])
        past = [torch.zeros(size, entry.shape[1], 0, entry.shape[3]).numpy() for entry in cache]
    inputs = {name: batch[name].numpy() for name in names if name in batch}
    result: list[Any] = session.run(
        None, inputs | {entry.name: value for entry, value in zip(cache, past, strict=True)}
    )
    return result


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


@pytest.mark.parametrize("kind", ["plain", "spliced"])
def test_the_same_logits(kind: str, tmp_path: Path) -> None:
    model = shortened() if kind == "plain" else repaired("llama")
    session = session_of(model, tmp_path)
    for batch in ({"input_ids": tokens(3, 11), "attention_mask": torch.ones(3, 11).long()}, left_padded(2, 7)):
        batch["position_ids"] = positions_of(batch["attention_mask"])
        with torch.no_grad():
            expected = model(**batch).logits
        real = batch["attention_mask"].bool()
        assert torch.allclose(torch.tensor(run(session, batch)[0])[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma3"])
@pytest.mark.parametrize("kind", ["plain", "spliced"])
def test_generation_with_the_cache(kind: str, family: str, tmp_path: Path) -> None:
    """Prompts of unequal length in one batch; Gemma 3 attends to a window of four tokens."""
    model = shortened(family) if kind == "plain" else repaired(family)
    session, batch = session_of(model, tmp_path), left_padded(3, 7)
    ids, mask, past = batch["input_ids"], batch["attention_mask"], None
    expected = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    generated, new = ids, ids
    for _ in range(12):
        position = positions_of(mask)[:, -new.shape[1] :]
        logits, *past = run(session, {"input_ids": new, "attention_mask": mask, "position_ids": position}, past)
        new = torch.tensor(logits[:, -1:]).argmax(dim=-1)
        generated, mask = torch.cat([generated, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
    assert torch.equal(generated, expected)


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    model: Any = any_model("mixtral")
    before = model.config._experts_implementation
    ids = tokens(2, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9).expand(2, -1)}
    with torch.no_grad():
        expected = model(ids).logits
    logits = run(session_of(model, tmp_path), batch)[0]
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    assert model.config._experts_implementation == before


def test_bfloat16_weights_are_exported_as_float32(tmp_path: Path) -> None:
    model: Any = shortened().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    session, ids = session_of(model, tmp_path), tokens(2, 9)
    after = model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9).expand(2, -1)}
    with torch.no_grad():
        expected = model.float()(ids).logits
    torch.testing.assert_close(torch.tensor(run(session, batch)[0]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mamba", "recurrent_gemma"])
def test_a_recurrent_state_is_refused(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="it is in the environment of `make engines` only")
    with pytest.raises(StreamlineError, match=r"other contents than keys and values"):
        export_onnx(any_model(model_type), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(StreamlineError, match=r"onnxscript.*pip install \"streamline_hooks\[onnx\]"):
        export_onnx(shortened(), tmp_path / "model.onnx")
