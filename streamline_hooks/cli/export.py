"""``streamline-hooks export``: a compressed model for engines that know nothing of this library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from streamline_hooks.cli.calibration_text import parse_sources
from streamline_hooks.cli.loading import load_model
from streamline_hooks.cli.options import Calibration, Stack
from streamline_hooks.errors import StreamlineError

FORMS = ("plain", "gguf", "onnx")


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `compress` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder (plain) or file (gguf, onnx) to write.")],
    to: Annotated[str, typer.Option(help="plain, gguf (llama.cpp) or onnx.")] = "plain",
    dtype: Annotated[
        str, typer.Option(help="Of the matrices in a GGUF file: f32, f16 or bf16.", show_default="f32")
    ] = "",
    refit: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Fit the window again as folded or silenced, which leave a plain model; with --original and the text "
            "that the folder was calibrated on.",
        ),
    ] = "",
    original: Annotated[str, typer.Option(metavar="MODEL", help="What the folder was made of, for --refit.")] = "",
    calibration: Calibration = None,
    test: Annotated[
        list[str] | None, typer.Option("--test", metavar="TEXT", help="The text it was tested on, for --refit.")
    ] = None,
    stack: Stack = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a file of the same format, or a folder that compress or save wrote with no other file in it.",
        ),
    ] = False,
) -> None:
    """Write a compressed model as a plain checkpoint, as GGUF or as ONNX.

    Example: streamline-hooks export smollm2-small --to gguf --output smollm2-small.gguf
    """
    from streamline_hooks.calibration import read_documents
    from streamline_hooks.checkpoint import load
    from streamline_hooks.cli.short_forms import parse_replacement
    from streamline_hooks.export import export_gguf, export_onnx, export_plain
    from streamline_hooks.export import refit as fit_again

    for name, given in (("--calibration", calibration), ("--test", test), ("--stack", stack)):
        if given and not refit:
            raise StreamlineError(f"{name} is for --refit, which was not asked for; leave it out.")
    if dtype and to != "gguf":
        raise StreamlineError(f"--dtype is for --to gguf; --to {to} writes the weights as they are.")
    if bool(refit) != bool(original):
        raise StreamlineError("--refit and --original go together: what the window is fitted as, and from what.")
    dtype = dtype or "f32"
    _require_possible(folder, output, to, dtype, overwrite)
    model: Any
    if refit:
        sources = parse_sources(calibration)
        if sources.generated:
            raise StreamlineError("What a model wrote itself is not written again here; give it as a file.")
        if sources.shares:
            raise StreamlineError(
                "--refit deals the text of one list of sources out again, and no mixture with shares; compress the "
                "original again, with --kind folded or silenced."
            )
        loaded, _ = load_model(original)
        text, apart = read_documents(sources.names), read_documents(test) if test else None
        again = fit_again(
            folder,
            loaded,
            _tokenizer(folder),
            text,
            replacement=parse_replacement(refit),
            test_texts=apart,
            stack=stack,
            say=typer.echo,
        )
        model = again.result.model
        typer.echo(str(again))
    else:
        model = load(folder)
    tokenizer = _tokenizer(folder)
    if tokenizer is None and to != "onnx":
        typer.echo(f"{folder} holds no tokenizer, so that none is written")
    if to == "plain":
        export_plain(model, output, tokenizer=tokenizer, overwrite=overwrite)
    elif to == "onnx":
        export_onnx(model, output)
    else:
        has_file = (folder / "tokenizer.json").is_file()
        if tokenizer is not None and not has_file:
            raise StreamlineError(
                f"The tokenizer in {folder} has no tokenizer.json, from which a GGUF file is written."
            )
        typer.echo(f"architecture {export_gguf(model, output, tokenizer=folder if has_file else None, dtype=dtype)}")
    typer.echo(f"written to {output}")


def _require_possible(folder: Path, output: Path, to: str, dtype: str, overwrite: bool) -> None:
    """Raise for everything that can be known before a model is loaded."""
    from transformers import AutoConfig

    from streamline_hooks.checkpoint import require_free
    from streamline_hooks.checkpoint.safety import CONFIG, read_json
    from streamline_hooks.core import check_writable
    from streamline_hooks.export.gguf import require_gguf
    from streamline_hooks.export.onnx import require_onnx

    if to not in FORMS:
        raise StreamlineError(f"--to {to} is unknown; expected one of {', '.join(FORMS)}.")
    read_json(folder / CONFIG)
    if to == "plain":
        require_free(output, overwrite)
    elif os.path.exists(output) and not overwrite:
        raise StreamlineError(f"{output} is there already. Choose another file, or pass --overwrite.")
    elif os.path.isfile(output) and not _is_of_form(output, to):
        raise StreamlineError(f"{output} is no {to} file, and only such a file is replaced. Choose another file.")
    elif not output.absolute().parent.is_dir():
        raise StreamlineError(f"There is no folder {output.parent} to write {output.name} to; make it first.")
    else:
        check_writable(output)
    if to == "gguf":
        require_gguf(_loaded(AutoConfig, folder), dtype)
    if to == "onnx":
        require_onnx()


def _is_of_form(file: Path, to: str) -> bool:
    """Whether a file is one that an earlier export may have written."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF" if to == "gguf" else file.suffix == ".onnx"


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; None where there is none."""
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")) and not any((folder / n).exists() for n in ("vocab.json", "vocab.txt")):
        return None
    return _loaded(AutoTokenizer, folder)


def _loaded(automatic: Any, folder: Path) -> Any:
    """A tokenizer or configuration of a folder.

    Raises
    ------
    StreamlineError
        If a file of it is damaged.
    """
    from streamline_hooks.pretrained import reason_of

    try:
        return automatic.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file leads to
        raise StreamlineError(
            f"{automatic.__name__} cannot load {folder}: {reason_of(error)} Expected what `save` wrote. Copy it again."
        ) from error
