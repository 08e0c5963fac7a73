"""Checkpoints for mlx-lm are plain, and refused if it would run other attention than Transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, save
from streamline_hooks.checkpoint import export_folder, load
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model as any_tiny_model
from tests.checkpoint.export.small_tokenizer import small_tokenizer
from tests.tiny_models import tiny_model

WINDOW, TOKENS = 4, 20


def sliding(model_type: str, blocks: int) -> Any:
    """Return a model whose text is longer than its sliding window, with random weights of visible size."""
    config = copy.deepcopy(any_tiny_model(model_type).config)
    config.num_hidden_layers, config.sliding_window = blocks, WINDOW
    period = 6 if model_type == "gemma3_text" else 4
    config.layer_types = ["sliding_attention" if (k + 1) % period else "full_attention" for k in range(blocks)]
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


@pytest.mark.parametrize("model_type", ["gemma3_text", "cohere2"])
def test_other_attention_is_refused(model_type: str, tmp_path: Path) -> None:
    folder = shortened(sliding(model_type, 13), range(2, 4), tmp_path / "small")
    with pytest.raises(StreamlineError, match=r"mlx-lm lets every \dth block.*Expected.*vLLM"):
        export_folder(folder, tmp_path / "mlx", "mlx")
    assert not (tmp_path / "mlx").exists()
    export_folder(folder, tmp_path / "plain", "plain")


@pytest.mark.parametrize(("model_type", "window"), [("gemma3_text", range(2, 8)), ("cohere2", range(1, 5))])
def test_the_same_attention_is_exported(model_type: str, window: range, tmp_path: Path) -> None:
    folder = shortened(sliding(model_type, 13), window, tmp_path / "small")
    export_folder(folder, tmp_path / "mlx", "mlx")
    assert "streamline" not in (tmp_path / "mlx" / "config.json").read_text()
    ids = torch.randint(3, 60, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "mlx")(ids).logits, load(folder)(ids).logits)


def test_a_splice_is_refused_with_the_kinds_to_fit_instead(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(2, 4), LinearReplacement(model.config.hidden_size))
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"no plain form.*--refit.*folded.*silenced"):
        export_folder(save(model, tmp_path / "small"), tmp_path / "mlx", "mlx")


@pytest.mark.parametrize("window", [range(2, 8), range(2, 4)])
def test_mlx_agrees(window: range, tmp_path: Path) -> None:
    """Run the models that are exported, and show that the refusal is needed."""
    mlx_lm: Any = pytest.importorskip("mlx_lm", reason="MLX is in the environment of `make engines` only")
    import mlx.core as mx

    model = sliding("gemma3_text", 13)
    small_tokenizer(shortened(model, window, tmp_path / "small"), model.config.vocab_size)
    export_folder(tmp_path / "small", tmp_path / "served", "mlx" if len(window) == 6 else "plain")
    ids = torch.randint(3, 60, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    served, _ = mlx_lm.load(str(tmp_path / "served"))
    logits = torch.tensor(served(mx.array(ids.tolist())).tolist())
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.allclose(logits, expected, atol=1e-3) == (len(window) == 6)
