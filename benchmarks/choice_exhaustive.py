"""Remove, repair and score every window of every size, as the reference for `benchmarks.choice`.

    python -m benchmarks.choice_exhaustive [--data FOLDER] [--sizes 8,4,12,6,10] [--threads N]

For each window of SmolLM2-135M the closed form is fitted on training text, KL from the original is measured on
validation text, and perplexity on held-out text, removed and repaired. Each size is saved to
``benchmarks/results/choice_exhaustive.json`` when it is finished; existing sizes are not computed again.
`benchmarks.choice` writes the table.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from benchmarks.real_text import BATCH, RESULTS, arguments, scored_text, split_of
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import split_into_batches
from streamline_hooks.evaluation import distances_of_candidates, perplexity_of_candidates
from streamline_hooks.modeling import Candidate
from streamline_hooks.pipeline import split_held_out
from streamline_hooks.repair import ClosedForm, solve_least_squares
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.selection import windows_of_size
from streamline_hooks.statistics import measure_moments

FILE = RESULTS / "choice_exhaustive.json"
SEQUENCES_A_DOMAIN = 1


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", default="8,4,12,6,10")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_pretrained("smollm2")
    split = split_of(options.data, tokenizer, seed=0, calibration_tokens=20_480, validation_tokens=2_048)
    test = scored_text(options.data, tokenizer, SEQUENCES_A_DOMAIN)
    content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"sizes": {}}
    content["command"] = "python -m benchmarks.choice_exhaustive"
    content["fingerprint"] = split.fingerprint
    sizes = [size for size in map(int, options.sizes.split(",")) if str(size) not in content["sizes"]]
    windows = {size: windows_of_size(model.config.num_hidden_layers, size) for size in sizes}
    fit_moments, held_out_moments = (
        measure_moments(model, split_into_batches(part, BATCH), [w for size in sizes for w in windows[size]])
        for part in split_held_out(split.calibration)
    )
    moments = iter(zip(fit_moments, held_out_moments, strict=True))
    for size in sizes:
        started = time.time()
        solutions = [solve_least_squares(*next(moments)) for _ in windows[size]]
        content["original"], content["sizes"][str(size)] = rows_of(model, split, test, windows[size], solutions)
        FILE.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{size} blocks: {time.time() - started:.0f} s", flush=True)


def rows_of(
    model: Any, split: Any, test: Any, windows: list[range], solutions: list[ClosedForm]
) -> tuple[float, list[dict[str, Any]]]:
    """Return the perplexity of the original and the scores of each window."""
    repaired = [Candidate(w, LinearReplacement.from_map(s.map)) for w, s in zip(windows, solutions, strict=True)]
    plain = [Candidate(w) for w in windows]
    kls = distances_of_candidates(model, split_into_batches(split.validation, BATCH), repaired)
    original, scores = perplexity_of_candidates(model, test, [*plain, *repaired])
    rows = zip(windows, scores[: len(windows)], scores[len(windows) :], kls, solutions, strict=True)
    return original.value, [
        {
            "start": window.start,
            "removed": removed_score.value,
            "repaired": repaired_score.value,
            "kl": kl,
            "removal_error": solution.removal_error,
            "repaired_error": solution.held_out_error,
        }
        for window, removed_score, repaired_score, kl, solution in rows
    ]


if __name__ == "__main__":
    main()
