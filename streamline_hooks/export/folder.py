"""Write the model in a checkpoint folder in the format of another engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from streamline_hooks.arguments import checked
from streamline_hooks.checkpoint import load, require_free
from streamline_hooks.checkpoint.safety import CONFIG, read_json
from streamline_hooks.core import check_writable
from streamline_hooks.errors import StreamlineError
from streamline_hooks.export.gguf import export_gguf, require_gguf
from streamline_hooks.export.onnx import export_onnx, require_onnx
from streamline_hooks.export.plain import export_plain
from streamline_hooks.pretrained import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Format = Literal["plain", "gguf", "onnx"]


@checked()
def check_export(
    folder: str | Path, output: str | Path, to: Format = "plain", *, dtype: str = "f32", overwrite: bool = False
) -> None:
    """Raise if `export_folder` would fail for a reason that is known before a model is loaded; parameters as there."""
    from transformers import AutoConfig

    source, target = Path(folder), Path(output)
    read_json(source / CONFIG)
    if to == "plain":
        require_free(target, overwrite)
    elif os.path.exists(target) and not overwrite:
        raise StreamlineError(f"{target} exists. Expected a new file. Choose another file, or pass --overwrite.")
    elif os.path.isfile(target) and not _has_format(target, to):
        raise StreamlineError(f"{target} is no {to} file. Only such a file is replaced. Choose another file.")
    elif not target.absolute().parent.is_dir():
        raise StreamlineError(f"There is no folder {target.parent} to write {target.name} to. Create it first.")
    else:
        check_writable(target)
    if to == "gguf":
        require_gguf(_from_pretrained(AutoConfig, source), dtype)
    if to == "onnx":
        require_onnx()


@checked()
def export_folder(
    folder: str | Path,
    output: str | Path,
    to: Format = "plain",
    *,
    model: PreTrainedModel | None = None,
    dtype: str = "f32",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a compressed model as a plain checkpoint, as GGUF or as ONNX.

    Parameters
    ----------
    folder : str or Path
        A checkpoint that `compress` or `save` wrote; its tokenizer is written too, except with ONNX.
    output : str or Path
        A folder (plain) or a file (gguf, onnx).
    to : {"plain", "gguf", "onnx"}
    model : transformers.PreTrainedModel, optional
        The model to write, by default that in `folder`.
    dtype : {"f32", "f16", "bf16"}
        Data type of the matrices in a GGUF file.
    overwrite : bool
        Replace a file of the same format, or a folder that `compress` or `save` wrote.
    say : callable
        Receives lines about what is written.

    Raises
    ------
    StreamlineError
        If the model has no such form, or the output is not free; see `export_plain`, `export_gguf`, `export_onnx`.

    Examples
    --------
    >>> export_folder("smollm2-small", "smollm2-small.gguf", "gguf", dtype="f16")  # doctest: +SKIP
    """
    check_export(folder, output, to, dtype=dtype, overwrite=overwrite)
    source, written = Path(folder), load(folder) if model is None else model
    tokenizer = tokenizer_in(source)
    if tokenizer is None and to != "onnx":
        say(f"{folder} has no tokenizer, so none is written")
    if to == "plain":
        export_plain(written, output, tokenizer=tokenizer, overwrite=overwrite)
    elif to == "onnx":
        export_onnx(written, output)
    else:
        has_file = (source / "tokenizer.json").is_file()
        if tokenizer is not None and not has_file:
            raise StreamlineError(
                f"The tokenizer in {folder} has no tokenizer.json, from which a GGUF file is written. Save a "
                "fast tokenizer there."
            )
        say(f"architecture {export_gguf(written, output, tokenizer=source if has_file else None, dtype=dtype)}")


def tokenizer_in(folder: Path) -> Any:
    """Load the tokenizer in a folder; None if there is none."""
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")) and not any((folder / n).exists() for n in ("vocab.json", "vocab.txt")):
        return None
    return _from_pretrained(AutoTokenizer, folder)


def _has_format(file: Path, to: Format) -> bool:
    """Whether an earlier export in a format may have written a file."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF" if to == "gguf" else file.suffix == ".onnx"


def _from_pretrained(automatic: Any, folder: Path) -> Any:
    try:
        return automatic.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file leads to
        raise StreamlineError(
            f"{automatic.__name__} cannot load {folder}: {reason_of(error)} Expected what `save` wrote. Copy it again."
        ) from error
