"""``streamline-hooks export``: a compressed model for engines that know nothing of this library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from streamline_hooks.cli.loading import documents_of, load_model
from streamline_hooks.cli.options import Calibration
from streamline_hooks.errors import StreamlineError

FORMS = ("plain", "gguf", "onnx")


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `compress` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder (plain) or file (gguf, onnx) to write.")],
    to: Annotated[str, typer.Option(help="plain, gguf (llama.cpp) or onnx.")] = "plain",
    dtype: Annotated[str, typer.Option(help="Of the matrices in a GGUF file: f32, f16 or bf16.")] = "f32",
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take the place of what is there.")] = False,
) -> None:
    """Write a compressed model as a plain checkpoint, as GGUF or as ONNX.

    Example: streamline-hooks export smollm2-small --to gguf --output smollm2-small.gguf
    """
    from streamline_hooks.checkpoint import load, require_free
    from streamline_hooks.export import export_gguf, export_onnx, export_plain
    from streamline_hooks.export import refit as fit_again

    if to not in FORMS:
        raise StreamlineError(f"--to {to} is unknown; expected one of {', '.join(FORMS)}.")
    if bool(refit) != bool(original):
        raise StreamlineError("--refit and --original go together: what the window is fitted as, and from what.")
    if to == "plain":
        require_free(output, overwrite)
    elif output.exists() and not overwrite:
        raise StreamlineError(f"{output} is there already. Choose another file, or pass --overwrite.")
    tokens = folder if (folder / "tokenizer.json").is_file() else None
    model: Any
    tokenizer: Any = None
    if refit:
        loaded, tokenizer = load_model(original)
        text = documents_of(calibration or ["pydoc"])
        again = fit_again(folder, loaded, tokenizer, text, kind=refit, say=typer.echo)
        model = again.result.model
        typer.echo(str(again))
    else:
        model = load(folder)
        tokenizer = _tokenizer(folder) if tokens else None
    if to == "plain":
        export_plain(model, output, tokenizer=tokenizer, overwrite=overwrite)
    elif to == "onnx":
        export_onnx(model, output)
    else:
        typer.echo(f"architecture {export_gguf(model, output, tokenizer=tokens, dtype=dtype)}")
    typer.echo(f"written to {output}")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
