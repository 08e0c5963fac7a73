"""``streamline-hooks export``: a compressed model for engines that know nothing of this library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from streamline_hooks.cli.calibration_text import parse_sources
from streamline_hooks.cli.loading import load_model
from streamline_hooks.cli.options import Calibration, Stack
from streamline_hooks.errors import StreamlineError


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
    from streamline_hooks.cli.short_forms import parse_replacement
    from streamline_hooks.export import check_export, export_folder
    from streamline_hooks.export import refit as fit_again
    from streamline_hooks.export.folder import tokenizer_in

    for name, given in (("--calibration", calibration), ("--test", test), ("--stack", stack)):
        if given and not refit:
            raise StreamlineError(f"{name} is for --refit, which was not asked for; leave it out.")
    if dtype and to != "gguf":
        raise StreamlineError(f"--dtype is for --to gguf; --to {to} writes the weights as they are.")
    if bool(refit) != bool(original):
        raise StreamlineError("--refit and --original go together: what the window is fitted as, and from what.")
    settings: Any = {"to": to, "dtype": dtype or "f32", "overwrite": overwrite}
    check_export(folder, output, **settings)
    model = None
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
            tokenizer_in(folder),
            text,
            replacement=parse_replacement(refit),
            test_texts=apart,
            stack=stack,
            say=typer.echo,
        )
        model = again.result.model
        typer.echo(str(again))
    export_folder(folder, output, model=model, say=typer.echo, **settings)
    typer.echo(f"written to {output}")
