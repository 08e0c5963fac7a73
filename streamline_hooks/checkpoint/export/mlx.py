"""Export plain checkpoints for mlx-lm, which reads some settings by other names or derives them from block numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.checkpoint.export.plain import write_plain
from streamline_hooks.checkpoint.safety import CONFIG
from streamline_hooks.core import StreamlineError, get_logger, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# mlx-lm does not read `layer_types` of these model types: every n-th block attends to all tokens. The number is in the
# setting with the given name, or has the given default.
_PERIODS: dict[str, tuple[str, int]] = {
    "cohere2": ("sliding_window_pattern", 4),
    "exaone4": ("sliding_window_pattern", 4),
    "gemma3": ("sliding_window_pattern", 6),
    "gemma3_text": ("sliding_window_pattern", 6),
    "llama4": ("", 4),
    "qwen3_5": ("full_attention_interval", 4),
    "qwen3_5_moe": ("full_attention_interval", 4),
    "qwen3_next": ("full_attention_interval", 4),
}
_WITHOUT_WINDOWS = ("gemma2", "mixtral", "phi3", "qwen2")
"""Model types of mlx-lm whose blocks all attend to all tokens."""
logger = get_logger(__name__)


def export_mlx(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a plain checkpoint with the settings that mlx-lm reads.

    Transformers 5 writes the settings of rotary positions as ``rope_parameters``. Most model types of mlx-lm read
    ``rope_theta`` and ``rope_scaling`` instead, and compute with a default if these are missing.

    mlx-lm ignores the sliding window of Gemma 2, Mixtral, Phi 3 and Qwen 2, also in the original model. A warning is
    logged if it is shorter than the longest sequence.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model without splices. It is not changed.
    folder : str or Path
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    overwrite : bool
        Replace a folder that `save` wrote; default False.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    StreamlineError
        If the model has splices, mlx-lm would take the attention of its blocks for another kind, or the folder may not
        be replaced.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> folder = export_mlx(model, tempfile.mkdtemp())
    >>> json.loads((folder / "config.json").read_text())["rope_theta"] == model.config.rope_parameters["rope_theta"]
    True
    """
    check_mlx(model.config)
    _warn_about_windows(model.config)
    return write_plain(model, folder, tokenizer, overwrite, adapt=_write_settings)


def check_mlx(config: Any) -> None:
    """Raise if mlx-lm would give blocks of a model another kind of attention than the config says."""
    if config.model_type not in _PERIODS:
        return
    text = config.get_text_config()
    name, default = _PERIODS[config.model_type]
    number = text.to_dict().get(name) or default
    period = len(number) if isinstance(number, str) else int(number)
    full = [k for k, kind in enumerate(text.layer_types) if kind == "full_attention"]
    if full and full == list(range(period - 1, len(text.layer_types), period)):
        return
    raise StreamlineError(
        f"mlx-lm takes the attention of each block of a {config.model_type} model from its number: blocks "
        f"{period - 1}, {2 * period - 1}, ... attend to all tokens. In this model {_blocks(full)}, so the logits would "
        f"be wrong. Expected every removed window to have a multiple of {period} blocks, with a kind that adds none "
        "(none, scale, folded, merged). Remove other windows, or serve the model in Transformers, vLLM or ONNX Runtime."
    )


def _warn_about_windows(config: Any) -> None:
    """Warn if mlx-lm ignores a sliding window that long sequences exceed."""
    text = config.get_text_config()
    window, longest = getattr(text, "sliding_window", None), getattr(text, "max_position_embeddings", None)
    if config.model_type in _WITHOUT_WINDOWS and window and longest and window < longest:
        logger.warning(
            f"mlx-lm ignores the sliding window of {config.model_type} models: sequences of more than {window:,} "
            "tokens have other logits than in Transformers, as with the original model."
        )


def _write_settings(folder: Path) -> None:
    """Add settings to ``config.json`` under the names that mlx-lm reads."""
    content = read_json(folder / CONFIG)
    for settings in (content, content.get("text_config") or {}):
        for name, value in _rope_settings(settings.get("rope_parameters") or {}).items():
            settings.setdefault(name, value)
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rope_settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` under the earlier names of Transformers."""
    if "sliding_attention" in parameters and "full_attention" in parameters:
        local = parameters["sliding_attention"].get("rope_theta")
        settings = _rope_settings(parameters["full_attention"])
        return settings if local is None else settings | {"rope_local_base_freq": local}
    if "rope_theta" not in parameters:
        return {}
    scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    is_default = scaling.get("rope_type", "default") == "default"
    settings = {"rope_theta": parameters["rope_theta"], "rope_scaling": None if is_default else scaling}
    factor = parameters.get("partial_rotary_factor")
    return settings if factor is None else settings | {"partial_rotary_factor": factor}


def _blocks(full: list[int]) -> str:
    return f"only {', '.join(map(str, full))} {'do' if len(full) > 1 else 'does'}" if full else "no block does"
