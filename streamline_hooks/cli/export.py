"""Implement ``streamline-hooks export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from streamline_hooks.checkpoint import (
    GGUFDtype,
    LoadingConfig,
    check_export,
    export_folder,
    load_quietly,
    load_tokenizer,
    load_without_tokenizer,
    require_causal_lm,
)
from streamline_hooks.cli.config_options import OptionValues, read_loading, with_options
from streamline_hooks.cli.options import Calibration, Json, Overwrite
from streamline_hooks.cli.output import Printer, print_json, print_log
from streamline_hooks.cli.parsing import parse_plain_replacement, parse_sources
from streamline_hooks.core import StreamlineError
from streamline_hooks.data import read_documents
from streamline_hooks.pipeline import PLAIN_KINDS
from streamline_hooks.pipeline import refit as fit_again

Folder = Annotated[Path, Parameter(help="Folder with a compressed model.")]
Target = Annotated[Path, Parameter(name=["--output", "-o"], help="Folder (plain, mlx) or file (gguf, onnx) to write.")]
To = Annotated[
    Literal["plain", "mlx", "gguf", "onnx"],
    Parameter(help="Format: plain (Transformers, vLLM), mlx (plain, checked for mlx-lm), gguf (llama.cpp) or onnx."),
]
MatrixDtype = Annotated[
    GGUFDtype | None,
    Parameter(
        name="--gguf-dtype",
        help="Data type of the matrices in a GGUF file. By default f32. q8_0 and q4_0 have 8 and 4 bits per weight.",
    ),
]
Refit = Annotated[
    list[str] | None,
    Parameter(
        consume_multiple=(0, 1),
        help="Refit the windows with a replacement that gives a plain model: "
        f"{' or '.join(PLAIN_KINDS)}, by default the first that is possible. Needs --original. The text is read from "
        "the sources that the checkpoint records, or from --calibration.",
    ),
]
Original = Annotated[str, Parameter(help="The original of the compressed model, for --refit.")]
Test = Annotated[list[str] | None, Parameter(help="The test text of the compressed model, for --refit.")]


@with_options(LoadingConfig)
def export(
    folder: Folder,
    /,
    *,
    output: Target,
    to: To = "plain",
    gguf_dtype: MatrixDtype = None,
    refit: Refit = None,
    original: Original = "",
    calibration: Calibration = None,
    test: Test = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    option_values: OptionValues,
) -> None:
    """Export a compressed model as a plain checkpoint, for MLX, as GGUF or as ONNX.

    Example: streamline-hooks export smollm2-small --to gguf --output smollm2-small.gguf
    """
    print_log(to_stderr=as_json)
    for name, value in (("--calibration", calibration), ("--test", test)):
        if value and refit is None:
            raise StreamlineError(f"{name} has no effect without --refit. Expected both or neither. Leave {name} out.")
    if gguf_dtype and to != "gguf":
        raise StreamlineError(
            f"--gguf-dtype was given with --to {to}. Expected --to gguf. Leave --gguf-dtype out; --dtype changes the "
            "data type of the model."
        )
    if (refit is None) == bool(original):
        raise StreamlineError(
            "Only one of --refit and --original was given. Expected both or neither. Add the other, or leave both out."
        )
    replacement = parse_plain_replacement(refit[-1]) if refit else None
    loading = read_loading(option_values)
    code = loading.trust_remote_code
    settings: dict[str, Any] = {"to": to, "dtype": gguf_dtype or "f32", "overwrite": overwrite}
    settings["trust_remote_code"] = code
    check_export(folder, output, **settings)
    is_loaded_here = refit is None and loading != LoadingConfig()
    model = load_without_tokenizer(str(folder), loading) if is_loaded_here else None
    show, report = Printer(as_json), {"output": str(output), "format": to}
    if refit is not None:
        text = None
        if calibration:
            sources = parse_sources(calibration)
            if sources.special:
                raise StreamlineError(
                    f"{sources.special} was given with --refit. Expected files or data sets, without shares or "
                    "generated text. Leave it out to read the sources that the checkpoint records."
                )
            text = read_documents(sources.names)
        source, _ = load_quietly(original, require_causal_lm(original, loading), loading)
        test_texts = read_documents(test) if test else None
        tokenizer = load_tokenizer(folder, code)
        again = fit_again(folder, source, text, replacement=replacement, tokenizer=tokenizer, test_texts=test_texts)
        model, report["refit"] = again.result.model, str(again)
        show.line(str(again))
    export_folder(folder, output, model=model, **settings)
    if as_json:
        print_json(report)
    show.line(f"saved to {output}")
