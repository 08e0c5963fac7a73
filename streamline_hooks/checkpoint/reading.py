"""Read a compressed model back, and only what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.checkpoint.safety import CONFIG, INDEX, WEIGHTS, check_folder, read_json
from streamline_hooks.errors import StreamlineError
from streamline_hooks.surgery import SurgeryPlan
from streamline_hooks.surgery.spliced_model import MODEL_TYPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(folder: str | Path, *, as_original: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Read a compressed model.

    Parameters
    ----------
    folder : str or Path
        As `save`, ``model.save_pretrained`` or a ``Trainer`` wrote it.
    as_original : bool
        Only as a model of the original's own class, which has nothing of this library; a model with spliced modules,
        which would lose its repair that way, is refused.
    **kwargs
        For ``from_pretrained``. Code in the folder is run only with ``trust_remote_code=True``.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode, of the class that was saved. `read_plans` says what was done to it.

    Raises
    ------
    StreamlineError
        If there is no model in the folder; if a file is missing, damaged, of another model, or of a format that can
        run code; if weights are not those that `save` wrote; if something in the folder names what is outside; or if
        the model has splices and was asked for `as_original`. The text names the file and, where there is one, the key.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks import LayerSurgeon, save
    >>> from streamline_hooks.testing import tiny_model
    >>> model, folder = tiny_model("llama"), tempfile.mkdtemp()
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove([2, 3])
    ...     _ = surgeon.commit()
    >>> loaded = load(save(model, folder), as_original=True)
    >>> type(loaded).__name__, len(loaded.model.layers), read_plans(loaded)[0].removed
    ('LlamaForCausalLM', 6, (2, 3))
    """
    where = Path(folder)
    elsewhere = [name for name in ("variant", "subfolder", "gguf_file", "adapter_kwargs") if kwargs.get(name)]
    if elsewhere:
        raise StreamlineError(f"{elsewhere[0]} would load other files than those that are looked at; leave it out.")
    config = check_folder(where, code=bool(kwargs.get("trust_remote_code")))
    if as_original and config.get("model_type") == MODEL_TYPE:
        raise StreamlineError(
            f"{where} holds a {config.get('base_model_type')} with spliced modules, which its own class cannot hold: "
            "as the original it would lose its repair. Load it without as_original, or compress the original again "
            "with a kind that leaves a plain model (none, block, silenced, folded, scale)."
        )
    try:
        model, info = _from_pretrained(where, **kwargs)
    except (RuntimeError, ValueError) as error:
        key = _mismatched(where, kwargs)
        if key is None:
            raise
        raise StreamlineError(
            f"{where / _file_of(where, key)}, {key}: its shape is not the one that {CONFIG} asks for. The two are of "
            "different models; save the model again."
        ) from error
    for what in ("missing_keys", "unexpected_keys"):
        if info.get(what):
            key = sorted(info[what])[0]
            said = "is missing" if what == "missing_keys" else f"has no place in the model that {CONFIG} asks for"
            raise StreamlineError(
                f"{where / _file_of(where, key)}, {key}: the weight {said}. The two are of different models; save the "
                "model again."
            )
    return model.eval()  # type: ignore[no-any-return]


def read_plans(model: Any) -> list[SurgeryPlan]:
    """What was done to a model, surgery by surgery, each in the numbering that the one before left.

    Parameters
    ----------
    model : transformers.PreTrainedModel, str or Path
        A model in memory, or the folder of one, of which only the configuration is read.

    Raises
    ------
    StreamlineError
        If no surgery was committed to it.
    """
    if isinstance(model, (str, Path)):
        said, name = read_json(Path(model) / CONFIG).get("streamline_hooks"), str(model)
    else:
        said, name = getattr(model.config, "streamline_hooks", None), type(model).__name__
    history = (said or {}).get("history") or []
    if not history:
        raise StreamlineError(f"{name} says of no surgery; only what LayerSurgeon.commit changed has a plan.")
    return [SurgeryPlan.from_dict(entry) for entry in history]


def _from_pretrained(folder: Path, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The model, from safetensors in this folder alone, and which weights it lacks or has too many."""
    found: Any = _auto_class(folder, bool(kwargs.get("trust_remote_code"))).from_pretrained(
        folder, output_loading_info=True, use_safetensors=True, local_files_only=True, **kwargs
    )
    model, info = found
    return model, info


def _auto_class(folder: Path, code: bool) -> Any:
    """The Auto class that gives the class that was saved."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    usual = modeling_auto.AutoModelForCausalLM
    saved = (read_json(folder / CONFIG).get("architectures") or [""])[0]
    config = type(AutoConfig.from_pretrained(folder, trust_remote_code=code, local_files_only=True))
    for auto in (usual, *vars(modeling_auto).values()):
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is not None and config in mapping and getattr(mapping[config], "__name__", "") == saved:
            return auto
    return usual


def _mismatched(folder: Path, kwargs: dict[str, Any]) -> str | None:
    """A weight whose shape is not the model's, if that is what keeps it from being loaded."""
    try:
        _, info = _from_pretrained(folder, ignore_mismatched_sizes=True, **kwargs)
    except (RuntimeError, ValueError):
        return None
    found = sorted(entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys") or ())
    return str(found[0]) if found else None


def _file_of(folder: Path, key: str) -> str:
    """The file that a weight is in, or would be."""
    if not (folder / INDEX).is_file():
        return WEIGHTS
    return str(read_json(folder / INDEX)["weight_map"].get(key, INDEX))
