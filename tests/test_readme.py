"""The README's Python runs as it stands there."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streamline_hooks import CompressionConfig, LayerSurgeon, LinearReplacement, Target, save
from streamline_hooks.calibration import read_documents
from tests.other_models import made
from tests.tiny_models import Nudge

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
FIRST, CONFIGS = BLOCKS[0], next(block for block in BLOCKS if "recipe.yaml" in block)
PIECES = [block for block in BLOCKS if block not in (FIRST, CONFIGS)]


class Letters:
    """A token a letter."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 2

    def __call__(self, text: str, add_special_tokens: bool = False, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 61 + 3 for letter in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(61 + token) for token in tokens)


def test_compressing_a_folder(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data_folder / "models" / "stories260k", tmp_path / "my-model")
    (tmp_path / "my-texts").mkdir()
    (tmp_path / "my-texts" / "a.txt").write_text("\n\n\n".join(read_documents("pydoc")[:30]))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(FIRST, names)
    assert "perplexity, repaired" in capsys.readouterr().out
    assert type(names["small"]).__name__ == "StreamlinedLlamaForCausalLM"
    exec(CONFIGS, names)
    assert names["made_with"] == CompressionConfig(remove=0.25)
    assert names["best"].target == Target(blocks=8)
    assert CompressionConfig.load("recipe.yaml") == names["config"] != names["made_with"]


@pytest.mark.parametrize("block", PIECES, ids=lambda text: text.split()[3].rstrip(","))
def test_the_pieces(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=30, num_attention_heads=4
    )
    ids = torch.randint(3, 64, (2, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = LlamaForCausalLM(config).eval()
    before = model(ids).logits
    small = copy.deepcopy(model)
    with LayerSurgeon(small) as surgeon:
        surgeon.replace(range(12, 20), LinearReplacement(32))
        surgeon.commit()
    save(small, "my-model-small")
    names: dict[str, Any] = {"model": model, "inputs": inputs, "my_module": Nudge()}
    names |= {"tokenizer": Letters(), "small": small, "my_replacement": Nudge(), "my_model": small}
    names |= {"loader": [inputs] * 2, "optimizer": torch.optim.SGD(model.parameters(), lr=0.0)}
    if "my-vit" in block:
        _vision(tmp_path)
    exec(block, names)
    assert torch.equal(model(ids).logits, before)
    if "record" in names:
        assert names["record"].outputs[29][2].shape == (2, 1, 32)


def _vision(folder: Path) -> None:
    """A classifier with its processor, and images of each class."""
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    from transformers import ViTImageProcessor

    classifier = made("vit")
    classifier.save_pretrained(folder / "my-vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "my-vit")
    for k in range(60):
        path = folder / "my-images" / classifier.config.id2label[k % 5] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
        pillow.fromarray(values.numpy()).save(path)
