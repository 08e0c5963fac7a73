"""Measure what prompts cost if they skip blocks, on SmolLM2-135M or another model.

    python -m benchmarks.prompt_skip_cost [--model MODEL] [--tokens 512,1024,2048] [--skipped 5,10,15] [--rounds 9]

The last blocks are skipped, and the tokens of the prompt, except the first and the last 16, get their keys and values
from linear maps, which are not fitted, because the values of the weights do not affect the time. The ideal cost counts
the FLOPs of matrix products and attention: those of the full model without the skipped blocks, and in the skipped
blocks those of the maps, of the projections of keys and values, and of the tokens that run. The time is that of
`generate` for one new token, as the ratio of medians of alternating runs. A row has both ratios, and the saved time as
a fraction of the ideal saving. The results are saved to ``benchmarks/results/prompt_skip_cost.json`` and ``.md``, those
of another model to ``prompt_skip_cost_NAME``.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS
from benchmarks.timing import interleaved, machine, ratio
from streamline_hooks import find_stack
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import LAST_TOKENS, PromptSkip

FILE = RESULTS / "prompt_skip_cost.json"
IDS = (3, 40_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="another model: a folder or a GGUF file")
    parser.add_argument("--tokens", default="512,1024,2048", help="tokens of the prompts")
    parser.add_argument("--skipped", default="5,10,15", help="numbers of skipped blocks")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model, name = load_pretrained(options.model)[0], Path(options.model).stem
    file = FILE if name == "smollm2" else FILE.with_name(f"{FILE.stem}_{name}.json")
    rows = []
    for tokens in map(int, options.tokens.split(",")):
        ids = torch.randint(*IDS, (1, tokens), generator=torch.Generator().manual_seed(0))
        for skipped in map(int, options.skipped.split(",")):
            row = {"tokens": tokens, "skipped": skipped, "rounds": options.rounds}
            rows.append(row | measure(model, ids, skipped, options.rounds))
            print(rows[-1], flush=True)
    command = (
        f"python -m benchmarks.prompt_skip_cost --tokens {options.tokens} --skipped {options.skipped} "
        f"--rounds {options.rounds}"
    )
    if name != "smollm2":
        command += " --model MODEL"
    content = {"rows": rows, "machine": machine(), "command": command, "model": name, "blocks": len(find_stack(model))}
    write(file, content)
    file.with_suffix(".md").write_text(table(content))
    print(table(content))


@torch.no_grad()
def measure(model: Any, ids: Tensor, skipped: int, rounds: int) -> dict[str, float]:
    """Return the ideal cost, the time, both relative to the original, and the saved fraction of the ideal saving."""
    stack = find_stack(model)
    window = range(len(stack) - skipped, len(stack))
    maps = [LinearReplacement(model.config.hidden_size) for _ in window[1:]]
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with PromptSkip(model, window, [*maps, None], probe=False):
        skipping, original = vars(model)["generate"], type(model).generate.__get__(model)
        ways = {"original": partial(original, ids, **options), "skipping": partial(skipping, ids, **options)}
        seconds = interleaved(ways, rounds)
    ideal, time = ideal_ratio(model, ids, skipped), ratio(seconds, "skipping", "original")
    return {"ideal": ideal, "time": time, "share": (1 - time) / (1 - ideal)}


def ideal_ratio(model: Any, ids: Tensor, skipped: int) -> float:
    """Return the FLOPs of a prompt with skipped blocks relative to those of the full model."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(ids, logits_to_keep=1)
    counts = {path: sum(by_operator.values()) for path, by_operator in counter.get_flop_counts().items()}
    stack, tokens = find_stack(model), ids.shape[1]
    block = counts[f"{type(model).__name__}.{stack.path}.0"]
    attention = f"{type(model).__name__}.{stack.path}.0.self_attn"
    keys = counts[f"{attention}.k_proj"] + counts[f"{attention}.v_proj"]
    maps = 2 * tokens * model.config.hidden_size**2 * (skipped - 1)
    run = (1 + LAST_TOKENS) / tokens * (block - keys)  # the first and the last tokens
    return (counts["Global"] - skipped * (block - keys - run) + maps) / counts["Global"]


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"{content['model']}, float32, the last of {content['blocks']} blocks skipped for prompts; cost and time "
        "relative to the original.",
        "",
        "| prompt tokens | skipped blocks | rounds | ideal cost | time | saved of the ideal saving |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = f"{row['tokens']} | {row['skipped']} | {row['rounds']} | {row['ideal']:.3f} | {row['time']:.3f}"
        lines.append(f"| {cells} | {row['share']:.2f} |")
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()
