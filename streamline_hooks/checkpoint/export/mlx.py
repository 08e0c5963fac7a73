"""Check that mlx-lm, which loads plain checkpoints, runs a model as Transformers does."""

from __future__ import annotations

from typing import Any

from streamline_hooks.core import StreamlineError

# mlx-lm does not read `layer_types` of these model types: by default every n-th block attends to all tokens.
_PERIODS = {"gemma3": 6, "gemma3_text": 6, "cohere2": 4, "llama4": 4}


def check_mlx(config: Any) -> None:
    """Raise if mlx-lm would give blocks of a model another kind of attention than the config says."""
    if (period := _PERIODS.get(config.model_type)) is None:
        return
    text = config.get_text_config()
    period = text.to_dict().get("sliding_window_pattern") or period
    full = [k for k, kind in enumerate(text.layer_types) if kind == "full_attention"]
    if full == list(range(period - 1, len(text.layer_types), period)):
        return
    raise StreamlineError(
        f"mlx-lm lets every {period}th block of a {config.model_type} model attend to all tokens, but in this model "
        f"{_blocks(full)}. Its text would be wrong as soon as it "
        f"is longer than the sliding window. Expected every {period}th, as in the original: remove or replace "
        f"consecutive blocks in multiples of {period}, with a kind that adds no block (none, scale, folded, merged). "
        "Or serve this model in Transformers, vLLM or ONNX Runtime."
    )


def _blocks(full: list[int]) -> str:
    return f"these are {', '.join(map(str, full))}" if full else "there is none"
