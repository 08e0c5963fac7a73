"""Checkpoints for mlx-lm are plain, and refused if it would run other attention than Transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, save
from streamline_hooks.checkpoint import export_folder, export_mlx, load
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model as any_tiny_model
from tests.checkpoint.export.small_tokenizer import small_tokenizer
from tests.tiny_models import tiny_model

WINDOW = 4  # tokens, of the sliding windows
IDS = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(1))


def sliding(model_type: str, blocks: int) -> Any:
    """Return a model whose text is longer than its sliding window."""
    config = copy.deepcopy(any_tiny_model(model_type).config)
    config.num_hidden_layers, config.sliding_window = blocks, WINDOW
    period = 6 if model_type == "gemma3_text" else 4
    config.layer_types = ["sliding_attention" if (k + 1) % period else "full_attention" for k in range(blocks)]
    return with_visible_weights(config)


def with_visible_weights(config: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def shortened(model: Any, window: range, folder: Path) -> Path:
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(window)
        surgeon.commit()
    return save(model, folder)


@pytest.mark.parametrize(("window", "warns"), [(WINDOW, True), (None, False)])
def test_an_ignored_window_is_reported(
    window: int | None, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = any_tiny_model("mixtral")
    model.config.sliding_window = window
    caplog.set_level("WARNING", logger="streamline_hooks")
    export_mlx(model, tmp_path / "mlx")
    assert ("sequences of more than 4 tokens" in caplog.text) == warns


@pytest.mark.parametrize("model_type", ["gemma3_text", "cohere2"])
def test_other_attention_is_refused(model_type: str, tmp_path: Path) -> None:
    folder = shortened(sliding(model_type, 13), range(2, 4), tmp_path / "small")
    with pytest.raises(
        StreamlineError, match=r"blocks \d, \d+, \.\.\. attend.*only [\d, ]+ do(es)?, so.*Expected.*vLLM"
    ):
        export_folder(folder, tmp_path / "mlx", "mlx")
    assert not (tmp_path / "mlx").exists()
    export_folder(folder, tmp_path / "plain", "plain")


@pytest.mark.parametrize(("model_type", "window"), [("gemma3_text", range(2, 8)), ("cohere2", range(1, 5))])
def test_the_same_attention_is_exported(model_type: str, window: range, tmp_path: Path) -> None:
    folder = shortened(sliding(model_type, 13), window, tmp_path / "small")
    export_folder(folder, tmp_path / "mlx", "mlx")
    assert "streamline" not in (tmp_path / "mlx" / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "mlx")(IDS).logits, load(folder)(IDS).logits)


def test_fewer_blocks_than_a_period_are_refused(tmp_path: Path) -> None:
    folder = shortened(sliding("gemma3_text", 8), range(2, 6), tmp_path / "small")
    with pytest.raises(StreamlineError, match="no block does"):
        export_folder(folder, tmp_path / "mlx", "mlx")


def test_a_splice_is_refused_with_the_kinds_to_fit_instead(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(2, 4), LinearReplacement(model.config.hidden_size))
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"no plain form.*--refit.*folded.*silenced"):
        export_folder(save(model, tmp_path / "small"), tmp_path / "mlx", "mlx")


ROPE: dict[str, dict[str, Any]] = {
    "base": {"rope_type": "default", "rope_theta": 50.0},
    "linear": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}  # fmt: skip


def with_rope(kind: str) -> Any:
    """Return a model whose rotary positions are not those that mlx-lm has by default."""
    config = copy.deepcopy(tiny_model("llama").config)
    config.rope_parameters = ROPE[kind]
    return with_visible_weights(config)


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_positions_get_the_names_that_mlx_reads(kind: str, tmp_path: Path) -> None:
    model = with_rope(kind)
    folder = export_mlx(model, tmp_path / "mlx")
    content = json.loads((folder / "config.json").read_text())
    assert content["rope_theta"] == 50.0
    assert (content["rope_scaling"] or {}).get("factor") == ROPE[kind].get("factor")
    with torch.no_grad():
        assert torch.equal(load(folder)(IDS).logits, model(IDS).logits)
        assert not torch.allclose(tiny_model("llama")(IDS).logits, model(IDS).logits, atol=1e-2)


def logits_of_mlx(folder: Path) -> torch.Tensor:
    mlx_lm: Any = pytest.importorskip("mlx_lm", reason="MLX is in the environment of `make engines` only")
    import mlx.core as mx

    served, _ = mlx_lm.load(str(folder))
    return torch.tensor(served(mx.array(IDS.tolist())).tolist())


@pytest.mark.parametrize("kind", ROPE)
def test_mlx_computes_the_same_rotary_positions(kind: str, tmp_path: Path) -> None:
    model = with_rope(kind)
    small_tokenizer(save(model, tmp_path / "saved"), model.config.vocab_size)
    export_folder(tmp_path / "saved", tmp_path / "served", "mlx")
    with torch.no_grad():
        assert torch.allclose(logits_of_mlx(tmp_path / "served"), model(IDS).logits, atol=1e-3)
        if kind == "linear":  # the reason for the export
            assert not torch.allclose(logits_of_mlx(tmp_path / "saved"), model(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("window", [range(2, 8), range(2, 4)])
def test_mlx_agrees_and_the_refusal_is_needed(window: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sliding("gemma3_text", 13)
    small_tokenizer(shortened(model, window, tmp_path / "small"), model.config.vocab_size)
    if len(window) == 6:
        export_folder(tmp_path / "small", tmp_path / "served", "mlx")
    else:
        monkeypatch.setattr("streamline_hooks.checkpoint.export.mlx.check_mlx", lambda config: None)
        export_folder(tmp_path / "small", tmp_path / "served", "mlx")
    with torch.no_grad():
        expected = model(IDS).logits
    assert torch.allclose(logits_of_mlx(tmp_path / "served"), expected, atol=1e-3) == (len(window) == 6)
