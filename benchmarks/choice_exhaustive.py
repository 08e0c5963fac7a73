"""Every window of every size: removed, repaired, and judged, the ground that choices are measured on.

    python -m benchmarks.choice_exhaustive [--data FOLDER] [--sizes 8,4,12,6,10] [--threads N]

For each window of SmolLM2-135M the closed form is fitted on training text, KL to the original is taken on validation
text, and perplexity on held-out text, removed and repaired. Rows go to ``benchmarks/results/choice_exhaustive.json``,
one size after the other; a size that is there already is not run again. `benchmarks.choice` makes the table.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from benchmarks.real_text import BATCH, RESULTS, arguments, scored_text, split_of
from streamline_hooks.batch import batches_of
from streamline_hooks.evaluation import distances_of_candidates
from streamline_hooks.evaluation.candidates import Candidate
from streamline_hooks.evaluation.perplexity import perplexity_of_candidates
from streamline_hooks.preparation import held_out_apart
from streamline_hooks.pretrained import load_pretrained
from streamline_hooks.repair import ClosedForm, solve
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.selection import windows
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
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"sizes": {}}
    found["command"] = "python -m benchmarks.choice_exhaustive"
    found["fingerprint"] = split.fingerprint
    sizes = [size for size in map(int, options.sizes.split(",")) if str(size) not in found["sizes"]]
    every = {size: windows(model.config.num_hidden_layers, size) for size in sizes}
    fitted, held_out = (
        measure_moments(model, batches_of(part, BATCH), [w for size in sizes for w in every[size]])
        for part in held_out_apart(split.calibration)
    )
    moments = iter(zip(fitted, held_out, strict=True))
    for size in sizes:
        started = time.time()
        solutions = [solve(*next(moments)) for _ in every[size]]
        found["original"], found["sizes"][str(size)] = rows_of(model, split, test, every[size], solutions)
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{size} blocks: {time.time() - started:.0f} s", flush=True)


def rows_of(
    model: Any, split: Any, test: Any, every: list[range], solutions: list[ClosedForm]
) -> tuple[float, list[dict[str, Any]]]:
    """What becomes of each window of a size."""
    repaired = [Candidate(w, LinearReplacement.from_map(s.map)) for w, s in zip(every, solutions, strict=True)]
    plain = [Candidate(w) for w in every]
    kls = distances_of_candidates(model, batches_of(split.validation, BATCH), repaired)
    original, scores = perplexity_of_candidates(model, test, [*plain, *repaired])
    rows = zip(every, scores[: len(every)], scores[len(every) :], kls, solutions, strict=True)
    return original.value, [
        {
            "start": window.start,
            "removed": removed.value,
            "repaired": mended.value,
            "kl": kl,
            "removal_error": solution.removal_error,
            "repaired_error": solution.held_out_error,
        }
        for window, removed, mended, kl, solution in rows
    ]


if __name__ == "__main__":
    main()
