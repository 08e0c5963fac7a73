"""Measure the cost of recording activations: time of a forward pass with and without it.

    python -m benchmarks.recording_cost [--data FOLDER] [--rounds 9] [--tokens 256] [--batch-size 4] [--compile]

Forward passes of SmolLM2-135M-Instruct on the same batch are timed in turn: alone, with ``output_hidden_states``, with
`HiddenStateRecorder`, and with nnsight if it is installed. Ratios are those of medians. The outputs of all blocks are
recorded as copies, and without copies (``detach=False``), which leaves out the time of copying. Recorders stay open, on
copies of the model with shared weights; one row opens a recorder anew in each pass.

``--compile`` measures the model compiled by ``torch.compile(fullgraph=True)`` instead, alone and with recorders that
stay open. The first round compiles. The results are saved to ``recording_cost_compiled.json`` and ``.md``.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, arguments, heldout
from benchmarks.timing import interleaved, machine
from streamline_hooks import HiddenStateRecorder
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.recording import RecordingConfig

FILE = RESULTS / "recording_cost.json"
SITES = ("attention.output", "mlp.output", "block.output")
BLOCKS = (7, 14, 21)
COMPILED = "compiled forward"
Ways = dict[str, Callable[[], object]]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="measure recorders of a compiled model instead")
    parser.add_argument("--dry", action="store_true", help="print the table without writing the result")
    options = parser.parse_args()
    seconds = measure(options)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    content = {
        "command": f"python -m benchmarks.recording_cost --rounds {options.rounds} --tokens {options.tokens} "
        f"--batch-size {options.batch_size}{' --compile' * options.compile}",
        "machine": machine() | {"load": os.getloadavg()[0]},
        "tokens": options.tokens * options.batch_size,
        "seconds": seconds,
        "median": median,
        "ratio": {name: value / next(iter(median.values())) for name, value in median.items()},
    }
    if not options.dry:
        file = FILE.with_stem("recording_cost_compiled") if options.compile else FILE
        write(file, content)
        file.with_suffix(".md").write_text(table(content))
    print(table(content))


@torch.no_grad()
def measure(options: Any) -> dict[str, list[float]]:
    """Time forward passes of the model in turn."""
    model, tokenizer = load_pretrained("smollm2")
    model.eval()
    text = next(iter(heldout(options.data, tokenizer, 1).values()))
    stream = torch.cat([batch["input_ids"].flatten() for batch in text])
    count = options.tokens * options.batch_size
    ids = stream.repeat(-(-count // len(stream)))[:count].view(options.batch_size, -1)
    return interleaved((compiled_ways if options.compile else ways_to_run)(model, ids), options.rounds)


def copy_with_shared_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model with modules and hooks of its own and the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in (*model.parameters(), *model.buffers())})


def ways_to_run(model: nn.Module, ids: torch.Tensor) -> Ways:
    """Return functions that run the model once, by the name of the row of the table."""

    def forward(**options: Any) -> None:
        model(input_ids=ids, use_cache=False, **options)

    def open_anew() -> None:
        with HiddenStateRecorder(model, BLOCKS, sites=SITES):
            forward()

    def recording(sites: Iterable[str], blocks: Iterable[int] | None, detach: bool = True) -> Callable[[], None]:
        shared = copy_with_shared_weights(model)
        record = HiddenStateRecorder(shared, blocks, sites=sites, config=RecordingConfig(detach=detach)).__enter__()

        def run() -> None:
            record.clear()
            shared(input_ids=ids, use_cache=False)

        return run

    ways: Ways = {
        "forward": forward,
        "output_hidden_states": lambda: forward(output_hidden_states=True),
        f"recorder: {', '.join(SITES)} of 3 blocks": recording(SITES, BLOCKS),
        "the same, opened anew": open_anew,
        "recorder: block.output of all blocks": recording(["block.output"], None),
        "recorder: block.output of all blocks, no copies": recording(["block.output"], None, detach=False),
    }
    try:
        from nnsight import NNsight
    except ImportError:
        return ways
    traced = NNsight(model)

    def trace_sites() -> None:
        saved: list[Any] = []
        with traced.trace(input_ids=ids, use_cache=False):
            for k in BLOCKS:
                saved.append(traced.model.layers[k].self_attn.output[0].save())
                saved.append(traced.model.layers[k].mlp.output.save())
                saved.append(traced.model.layers[k].output.save())

    def trace_blocks() -> None:
        saved: list[Any] = []
        with traced.trace(input_ids=ids, use_cache=False):
            for layer in traced.model.layers:
                saved.append(layer.output.save())

    return ways | {"nnsight: the same outputs of 3 blocks": trace_sites, "nnsight: outputs of all blocks": trace_blocks}


def compiled_ways(model: nn.Module, ids: torch.Tensor) -> Ways:
    """Return functions that run a compiled copy with shared weights once: alone, and with recorders that stay open."""
    recorders: dict[str, tuple[Iterable[str], Iterable[int] | None]] = {
        f"{', '.join(SITES)} of 3 blocks": (SITES, BLOCKS),
        "block.output of all blocks": (["block.output"], None),
    }

    alone = torch.compile(copy_with_shared_weights(model), fullgraph=True)
    ways: Ways = {COMPILED: lambda: alone(input_ids=ids, use_cache=False)}
    for name, (sites, blocks) in recorders.items():
        shared = copy_with_shared_weights(model)
        run = torch.compile(shared, fullgraph=True)
        record = HiddenStateRecorder(shared, blocks, sites=sites).__enter__()

        def recorded(record: HiddenStateRecorder = record, run: Callable[..., Any] = run) -> None:
            record.clear()
            run(input_ids=ids, use_cache=False)

        ways[f"{COMPILED}, recorder: {name}"] = recorded
    return ways


def table(content: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rounds = len(next(iter(content["seconds"].values())))
    lines = [
        f"SmolLM2-135M-Instruct, float32, {content['tokens']:,} tokens, median of {rounds} alternating rounds, CPU "
        f"with {content['machine']['threads']} thread(s), on a machine with other load "
        f"({content['machine']['load']:.1f}).",
        "",
        "| run | ms | ratio |",
        "|---|---|---|",
    ]
    for name, seconds in content["median"].items():
        lines.append(f"| {name} | {1000 * seconds:,.0f} | {content['ratio'][name]:.3f} |")
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()
