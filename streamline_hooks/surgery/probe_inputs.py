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
    and sounds.

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
    pictures = _pictures(model) if "pixel_values" in takes else None
    sounds = _sounds(model, takes)
    if "input_ids" in takes or (pictures is None and not sounds):
        if decoded:
            yield {"input_ids": _ids(model), **decoded}
        yield {"input_ids": _ids(model)}
    if pictures is not None:
        if decoded:
            yield {"pixel_values": pictures, **decoded}
        yield {"pixel_values": pictures}
        if "input_ids" in takes:
            yield {"input_ids": _ids(model), "pixel_values": pictures}
            yield from _pictures_in_text(model, pictures)
    if sounds:
        yield {**sounds, **decoded}


def _ids(model: Any, first: int = 3) -> Tensor:
    vocabulary = int(getattr(model.config.get_text_config(decoder=True), "vocab_size", 32) or 32)
    numbers = torch.arange(ROWS * TOKENS) * 7 + first
    return (numbers % max(vocabulary - 4, 1) + min(3, vocabulary - 1)).view(ROWS, TOKENS).to(device_of(model))


def _pictures(model: Any) -> Tensor | None:
    configs = (model.config, getattr(model.config, "vision_config", None))
    described = next((c for c in configs if getattr(c, "image_size", None)), None)
    if described is None:
        return None
    size = described.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return _waves(model, ROWS, int(getattr(described, "num_channels", 3)), int(height), int(width))


def _pictures_in_text(model: Any, pictures: Tensor) -> Iterator[dict[str, Tensor]]:
    """A text with as many places for each image as the model makes vectors of it."""
    stated = (getattr(model.config, name, None) for name in ("image_token_id", "image_token_index"))
    place = next((value for value in stated if isinstance(value, int)), None)
    describe = getattr(model, "get_image_features", None)
    if place is None or describe is None:
        return
    try:
        made = describe(pixel_values=pictures)
    except Exception:  # whatever a model makes of images that it does not expect
        return
    made = getattr(made, "pooler_output", made)
    vectors = made[0] if isinstance(made, (list, tuple, Tensor)) and len(made) == ROWS else None
    if isinstance(vectors, Tensor) and vectors.ndim == 2:
        ids = _ids(model)
        yield {
            "input_ids": torch.cat([ids[:, :2], ids.new_full((ROWS, len(vectors)), place), ids[:, 2:]], dim=1),
            "pixel_values": pictures,
        }


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
