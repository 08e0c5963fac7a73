"""Write small files of the present version for later versions to read: python -m tests.checkpoint.write_earlier NAME.

Run it before a change of the formats or of the package's structure, with a NAME that no folder in `earlier` has, and
commit the folder. `test_earlier_checkpoints` reads every folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from streamline_hooks import LayerSurgeon, profile, save
from streamline_hooks.checkpoint import CHECKSUMS
from streamline_hooks.replacements import LinearReplacement, MLPReplacement, SwiGLUReplacement
from streamline_hooks.testing import tiny_model

CODE = "modeling_streamline_hooks.py"
EARLIER = Path(__file__).parent / "earlier"
WIDTH, WINDOWS = 32, ((1, 2), (3, 5))


def filled(module: nn.Module, scale: float = 64.0) -> nn.Module:
    """Give a module the same weights on every machine."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            values = (torch.arange(parameter.numel()) * 37 + 11 * number) % 101 - 50
            parameter.copy_((values / (64 * scale)).view_as(parameter))
    return module


def input_ids() -> torch.Tensor:
    """Two rows of 12 tokens."""
    return (torch.arange(24) * 7 % 50 + 3).view(2, 12)


def replacements() -> dict[str, nn.Module]:
    """One replacement of each class that checkpoints name."""
    return {
        "linear": filled(LinearReplacement(WIDTH, rank=2)),
        "mlp": filled(MLPReplacement(WIDTH, width=8)),
        "swiglu": filled(SwiGLUReplacement(WIDTH, width=8)),
    }


def encoder() -> nn.TransformerEncoder:
    """A model that is not from Transformers."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return filled(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), scale=1.0).eval()


def encoder_states() -> torch.Tensor:
    """Its input, shape (1, 5, 16)."""
    return (torch.arange(80) % 13 - 6).view(1, 5, 16) / 8


def write(folder: Path) -> None:
    """Write a spliced checkpoint of two windows, one of a plain module, a profile and pickled replacements."""
    folder.mkdir()
    expected: dict[str, object] = {}
    model = filled(tiny_model("llama", blocks=6), scale=1.0).eval()
    sums = profile(model, [input_ids()])
    sums.save(folder / "profile.safetensors")
    expected["cosine"] = sums.cosine.tolist()
    with LayerSurgeon(model) as surgeon:
        made = replacements()
        surgeon.replace(range(*WINDOWS[0]), made["linear"])
        surgeon.replace(range(*WINDOWS[1]), made["swiglu"])
        surgeon.insert(6, made["mlp"])
        surgeon.commit()
    save(model, folder / "spliced")
    for name in (CODE, CHECKSUMS):  # a copy of this library's code, and what names it
        (folder / "spliced" / name).unlink()
    with torch.no_grad():
        expected["logits"] = model(input_ids()).logits[:, -1].tolist()
    module = encoder()
    with LayerSurgeon(module) as surgeon:
        surgeon.replace(range(1, 3), filled(LinearReplacement(16)))
        surgeon.commit()
    save(module, folder / "module")
    with torch.no_grad():
        expected["states"] = module(encoder_states()).tolist()
    torch.save(replacements(), folder / "replacements.pt")
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    write(EARLIER / sys.argv[1])
