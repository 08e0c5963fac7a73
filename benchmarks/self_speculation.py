"""Measure self-speculation: a smaller depth of SmolLM2-135M drafts tokens, and the full model verifies them.

    python -m benchmarks.self_speculation [--data FOLDER] [--depths 28,26,22] [--drafts 2,4] [--prompts 6] [--tokens 48]

The depths share weights and one cache of keys and values: while drafting, blocks that are left out neither run nor
store keys, and the verification fills the cache again from the last accepted token. The result is the greedy text of
the full model, so only the speed differs. A row has the fraction of accepted drafts and the time per token relative to
greedy decoding of the full model, as medians of alternating runs. The results are saved to
``benchmarks/results/self_speculation.json`` and ``.md``.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.heldout_pieces import beginnings
from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, arguments, split_of
from benchmarks.timing import machine
from streamline_hooks import fit_depths
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import HardwareConfig
from streamline_hooks.modeling import find_stack, inference, read_input
from streamline_hooks.surgery import DepthCut, depth_cuts_of

FILE = RESULTS / "self_speculation.json"
TOKENS = {"calibration_tokens": 32_768, "validation_tokens": 4_096, "test_tokens": 4_096}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--depths", default="28,26,22")
    parser.add_argument("--drafts", default="2,4", help="drafted tokens before each verification")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per prompt")
    options = parser.parse_args()
    depths = [int(depth) for depth in options.depths.split(",")]
    drafts = [int(count) for count in options.drafts.split(",")]
    model, tokenizer = load_pretrained("smollm2")
    split = split_of(options.data, tokenizer, **TOKENS)
    fit_depths(model, split, depths, tokenizer=tokenizer, hardware=HardwareConfig(batch_size=4))
    texts = beginnings(options.data, tokenizer, options.prompts, seed=0)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    rows = measure(model, prompts, drafts, options.tokens)
    command = (
        f"python -m benchmarks.self_speculation --depths {options.depths} --drafts {options.drafts} --prompts "
        f"{options.prompts} --tokens {options.tokens}"
    )
    write(FILE, {"rows": rows, "machine": machine(), "command": command})
    FILE.with_suffix(".md").write_text(table(rows, command))
    print(table(rows, command))


def measure(model: Any, prompts: Sequence[Tensor], drafts: Sequence[int], new_tokens: int) -> list[dict[str, Any]]:
    """Return acceptance and time per token for each depth and number of drafts."""
    cuts = depth_cuts_of(model).by_depth
    ways = [(depth, count) for depth in sorted(cuts, reverse=True) for count in drafts]
    seconds: dict[Any, list[float]] = {way: [] for way in [*ways, None]}
    accepted: dict[Any, list[int]] = {way: [0, 0] for way in ways}
    with inference(model):
        for ids in [prompts[0], *prompts]:  # the first run is a warm-up
            started = time.perf_counter()
            expected = greedy(model, ids, new_tokens)
            seconds[None].append(time.perf_counter() - started)
            for way in ways:
                started = time.perf_counter()
                found, right, drafted = speculate(model, cuts[way[0]], ids, new_tokens, way[1])
                seconds[way].append(time.perf_counter() - started)
                if not torch.equal(found, expected):
                    raise SystemExit(f"Depth {way[0]} with {way[1]} drafts gives another text than greedy decoding.")
                accepted[way][0] += right
                accepted[way][1] += drafted
    ratios = {way: [a / b for a, b in zip(seconds[way][1:], seconds[None][1:], strict=True)] for way in ways}
    return [
        {
            "depth": way[0],
            "drafts": way[1],
            "accepted": accepted[way][0] / accepted[way][1],
            "time": statistics.median(ratios[way]),
        }
        for way in ways
    ]


def greedy(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """Decode greedily with a cache."""
    name = cache_name(model)
    output = model(ids, use_cache=True, logits_to_keep=1)
    while True:
        ids = torch.cat([ids, output.logits[:, -1:].argmax(dim=-1)], dim=1)
        new_tokens -= 1
        if not new_tokens:
            return ids
        output = model(ids[:, -1:], **{name: output[name]}, use_cache=True)


def speculate(model: Any, cut: DepthCut, ids: Tensor, new_tokens: int, drafts: int) -> tuple[Tensor, int, int]:
    """Decode greedily with drafts of a smaller depth; return the tokens, and how many drafts were accepted and made."""
    name = cache_name(model)
    stop, right, drafted = ids.shape[1] + new_tokens, 0, 0
    output = model(ids, use_cache=True, logits_to_keep=1)
    cache = output[name]
    ids = torch.cat([ids, output.logits[:, -1:].argmax(dim=-1)], dim=1)
    while ids.shape[1] < stop:
        count, draft = min(drafts, stop - ids.shape[1] - 1), ids
        with left_out(model, cut):
            for _ in range(count):
                logits = model(draft[:, -1:], **{name: cache}, use_cache=True).logits
                draft = torch.cat([draft, logits[:, -1:].argmax(dim=-1)], dim=1)
        keep_tokens(cache, ids.shape[1] - 1)  # the keys of the drafts are those of the smaller depth
        logits = model(draft[:, ids.shape[1] - 1 :], **{name: cache}, use_cache=True).logits
        best = logits.argmax(dim=-1)
        same = (best[0, :-1] == draft[0, ids.shape[1] :]).int().cumprod(dim=0).sum()
        kept = int(same)
        ids = torch.cat([ids, best[:, : kept + 1]], dim=1)
        keep_tokens(cache, ids.shape[1] - 1)
        right, drafted = right + kept, drafted + count
    return ids, right, drafted


def keep_tokens(cache: Any, tokens: int) -> None:
    """Remove later tokens from the cache; blocks that were left out have none."""
    for layer in cache.layers:
        if (extra := layer.get_seq_length() - tokens) > 0:
            layer.crop(-extra)


def cache_name(model: Any) -> str:
    """Return the name of the cache, which Transformers changed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def left_out(model: Any, cut: DepthCut) -> Iterator[None]:
    """Run the replacements of a cut instead of its blocks, which keep their cache slots."""
    stack, changed = find_stack(model), []

    def returns(module: Any, block: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            state = read_input(args, kwargs, block)
            return state if module is None else module(state)

        return forward

    try:
        for window, module in zip(cut.windows, cut.modules, strict=True):
            for k in window:
                vars(stack[k])["forward"] = returns(module if k == window.start else None, stack[k])
                changed.append(stack[k])
        yield
    finally:
        for block in changed:
            del vars(block)["forward"]


def table(rows: Sequence[dict[str, Any]], command: str) -> str:
    """Return the rows as Markdown."""
    lines = [
        "SmolLM2-135M-Instruct, float32, one prompt at a time. The smaller depth drafts tokens, and the full model "
        "verifies them; the text is the greedy text of the full model. A time below 1 is faster than greedy decoding.",
        "",
        "| blocks of the draft | drafted tokens | accepted | time per token |",
        "|---|---|---|---|",
        *(f"| {row['depth']} | {row['drafts']} | {row['accepted']:.0%} | {row['time']:.2f} |" for row in rows),
        "",
        f"Made by `{command}`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
