"""Export the model of a checkpoint folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from streamline_hooks.checkpoint.export.gguf import GGUFDtype, check_gguf, export_gguf
from streamline_hooks.checkpoint.export.mlx import export_mlx
from streamline_hooks.checkpoint.export.onnx import check_onnx, export_onnx
from streamline_hooks.checkpoint.export.plain import export_plain
from streamline_hooks.checkpoint.load import load
from streamline_hooks.checkpoint.pretrained import error_summary
from streamline_hooks.checkpoint.safety import CONFIG
from streamline_hooks.checkpoint.save import check_output_folder
from streamline_hooks.core import StreamlineError, check_writable, get_logger, read_json, validate_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)

Format = Literal["plain", "mlx", "gguf", "onnx"]


@validate_arguments()
def check_export(
    folder: str | Path,
    output: str | Path,
    to: Format = "plain",
    *,
    dtype: GGUFDtype = "f32",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Raise if `export_folder` would fail, as far as this is known without loading the model."""
    from transformers import AutoConfig

    source, target = Path(folder), Path(output)
    read_json(source / CONFIG)
    if to in ("plain", "mlx"):
        check_output_folder(target, overwrite)
    elif os.path.exists(target) and not overwrite:
        raise StreamlineError(
            f"{target} exists. Expected a new file. Choose another file, or pass --overwrite (overwrite=True)."
        )
    elif os.path.isfile(target) and not _has_format(target, to):
        raise StreamlineError(f"{target} is not a {to} file. Only {to} files are replaced. Choose another file.")
    elif not target.absolute().parent.is_dir():
        raise StreamlineError(f"The folder {target.parent} for {target.name} does not exist. Create it first.")
    else:
        check_writable(target)
    if to == "gguf":
        check_gguf(_from_pretrained(AutoConfig, source, trust_remote_code), dtype)
    if to == "onnx":
        check_onnx()


@validate_arguments()
def export_folder(
    folder: str | Path,
    output: str | Path,
    to: Format = "plain",
    *,
    model: PreTrainedModel | None = None,
    dtype: GGUFDtype = "f32",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write a compressed model as a plain checkpoint, for MLX, as GGUF or as ONNX.

    Parameters
    ----------
    folder : str or Path
        Checkpoint of `compress` or `save`. Its tokenizer is exported too, except with ONNX.
    output : str or Path
        Folder (plain, mlx) or file (gguf, onnx) to write.
    to : {"plain", "mlx", "gguf", "onnx"}
        Format; default ``"plain"``. ``"mlx"`` is a plain checkpoint with the settings that mlx-lm reads, and refused if
        mlx-lm would take the attention of its blocks for another kind.
    model : transformers.PreTrainedModel, optional
        Model to export; by default that in `folder`.
    dtype : {"f32", "f16", "bf16", "q8_0", "q4_0"}
        Type of the matrices in a GGUF file, see `export_gguf`; default ``"f32"``.
    overwrite : bool
        Replace a file of the same format, or a folder of `compress` or `save`; default False.
    trust_remote_code : bool
        Run code in the folder; default False.

    Raises
    ------
    StreamlineError
        If the model cannot be exported to this format, or the output may not be replaced.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from streamline_hooks import LayerSurgeon, save
    >>> from streamline_hooks.testing import tiny_model
    >>> model, folder = tiny_model("llama"), Path(tempfile.mkdtemp())
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove([2, 3])
    ...     _ = surgeon.commit()
    >>> _ = save(model, folder / "small")
    >>> export_folder(folder / "small", folder / "plain")
    >>> (folder / "plain" / "model.safetensors").is_file()
    True
    """
    check_export(folder, output, to, dtype=dtype, overwrite=overwrite, trust_remote_code=trust_remote_code)
    source = Path(folder)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    exported_model = load(folder, **options) if model is None else model
    tokenizer = load_tokenizer(source, trust_remote_code)
    if tokenizer is None and to != "onnx":
        logger.info(f"{folder} has no tokenizer, so none is exported")
    if to == "plain":
        export_plain(exported_model, output, tokenizer=tokenizer, overwrite=overwrite)
    elif to == "mlx":
        export_mlx(exported_model, output, tokenizer=tokenizer, overwrite=overwrite)
    elif to == "onnx":
        export_onnx(exported_model, output)
    else:
        has_file = (source / "tokenizer.json").is_file()
        if tokenizer is not None and not has_file:
            raise StreamlineError(
                f"The tokenizer in {folder} has no tokenizer.json, which is required for GGUF. Save a fast tokenizer "
                "there."
            )
        logger.info(
            f"architecture {export_gguf(exported_model, output, tokenizer=source if has_file else None, dtype=dtype)}"
        )


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in a folder, or return None if there is none; code runs only if trusted."""
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")) and not any((folder / n).exists() for n in ("vocab.json", "vocab.txt")):
        return None
    return _from_pretrained(AutoTokenizer, folder, trust_remote_code)


def _has_format(file: Path, to: Format) -> bool:
    """Whether a file has the format of an earlier export."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF" if to == "gguf" else file.suffix == ".onnx"


def _from_pretrained(auto_class: Any, folder: Path, trust_remote_code: bool) -> Any:
    try:
        return auto_class.from_pretrained(folder, **({"trust_remote_code": True} if trust_remote_code else {}))
    except Exception as error:  # damaged files lead to many types of exceptions
        raise StreamlineError(
            f"{auto_class.__name__} cannot load {folder}: {error_summary(error)} Expected files that `save` "
            "wrote. Copy the folder again."
        ) from error
