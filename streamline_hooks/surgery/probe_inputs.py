"""What a model is called with to see whether a surgery is right, where nobody gives a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from streamline_hooks.batch import device_of

ROWS, TOKENS = 2, 8
_FRAMES = 64  # of sound, where the configuration does not say how many
_SAMPLES = 4000


def probe_inputs(model: Any, takes: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Ways to call a model, from what its forward takes and its configuration says.

    Tokens come first, for an encoder and a decoder tokens of both, then images, images beside tokens and among them,
    and sounds. Images are whole, or come as patches, all in one row, with the grid that each image's lie in.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    takes : collection of str
        What its forward takes, by name.

    Yields
    ------
    dict of str to torch.Tensor
        Keyword arguments, the same at every call.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> (given,) = probe_inputs(tiny_model("llama"), {"input_ids", "attention_mask"})
    >>> {name: tuple(value.shape) for name, value in given.items()}
    {'input_ids': (2, 8)}
    """
    decoded = {"decoder_input_ids": _ids(model, 5)} if "decoder_input_ids" in takes else {}
    pictures = (_patches(model, takes) or _pictures(model)) if "pixel_values" in takes else {}
    sounds = _sounds(model, takes)
    if "input_ids" in takes or not (pictures or sounds):
        if decoded:
            yield {"input_ids": _ids(model), **decoded}
        yield {"input_ids": _ids(model)}
    if pictures:
        if decoded:
            yield {**pictures, **decoded}
        yield pictures
        if "input_ids" in takes:
            yield {"input_ids": _ids(model), **pictures}
            yield from _pictures_in_text(model, pictures, takes)
    if sounds:
        yield {**sounds, **decoded}


def _ids(model: Any, first: int = 3) -> Tensor:
    vocabulary = int(getattr(model.config.get_text_config(decoder=True), "vocab_size", 32) or 32)
    numbers = torch.arange(ROWS * TOKENS) * 7 + first
    return (numbers % max(vocabulary - 4, 1) + min(3, vocabulary - 1)).view(ROWS, TOKENS).to(device_of(model))


def _pictures(model: Any) -> dict[str, Tensor]:
    configs = (model.config, *(getattr(model.config, name, None) for name in ("vision_config", "encoder")))
    described = next((c for c in configs if getattr(c, "image_size", None)), None)
    if described is None:
        return {}
    size = described.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = int(getattr(described, "num_channels", 3))
    return {"pixel_values": _waves(model, ROWS, channels, int(height), int(width))}


def _patches(model: Any, takes: Collection[str]) -> dict[str, Tensor]:
    """Images as patches, and how many of them lie beside and above each other; more than one window of a tower wide."""
    described = getattr(model.config, "vision_config", model.config)
    patch = _one_number(described, "patch_size")
    if "image_grid_thw" not in takes or patch is None:
        return {}
    frames, merged = (_one_number(described, name) or 1 for name in ("temporal_patch_size", "spatial_merge_size"))
    channels = _one_number(described, "in_channels") or _one_number(described, "in_chans") or 3
    cells = (_one_number(described, "window_size") or 0) // (patch * merged)
    grid = torch.tensor([[1, merged * 2, merged * (cells + 2)]] * ROWS, device=device_of(model))
    pixels = _waves(model, int(grid.prod(dim=1).sum()), channels * frames * patch * patch)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _one_number(config: Any, name: str) -> int | None:
    """A size in a configuration that holds one number or the same one for each axis."""
    value = getattr(config, name, None)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) and value > 0 else None


def _pictures_in_text(model: Any, pictures: dict[str, Tensor], takes: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """A text with as many places for each image as the model makes vectors of it, and which tokens those are."""
    stated = (getattr(model.config, name, None) for name in ("image_token_id", "image_token_index"))
    place = next((value for value in stated if isinstance(value, int)), None)
    describe = getattr(model, "get_image_features", None)
    if place is None or describe is None:
        return
    try:
        made = describe(**pictures)
    except Exception:  # whatever a model makes of images that it does not expect
        return
    made = getattr(made, "pooler_output", made)
    vectors = made[0] if isinstance(made, (list, tuple, Tensor)) and len(made) == ROWS else None
    if isinstance(vectors, Tensor) and vectors.ndim == 2:
        ids = _ids(model)
        ids = torch.cat([ids[:, :2], ids.new_full((ROWS, len(vectors)), place), ids[:, 2:]], dim=1)
        kinds = {"mm_token_type_ids": (ids == place).long()} if "mm_token_type_ids" in takes else {}
        yield {"input_ids": ids, **pictures, **kinds}


def _sounds(model: Any, takes: Collection[str]) -> dict[str, Tensor]:
    if "input_features" in takes:
        bins = getattr(model.config, "num_mel_bins", None)
        frames = 2 * getattr(model.config, "max_source_positions", _FRAMES // 2)
        return {"input_features": _waves(model, ROWS, int(bins), int(frames))} if isinstance(bins, int) else {}
    return {"input_values": _waves(model, ROWS, _SAMPLES)} if "input_values" in takes else {}


def _waves(model: Any, *shape: int) -> Tensor:
    """Numbers between -1 and 1 that do not repeat."""
    values = torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) ** 1.1)
    return values.view(shape).to(device_of(model), getattr(model, "dtype", torch.float32))
