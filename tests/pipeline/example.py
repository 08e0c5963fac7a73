"""A report as a run would give it, of made-up numbers: 30 blocks, or 4."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from streamline_hooks import CompressionConfig
from streamline_hooks.pipeline.sweep import Sweep, SweepPoint

COMMAND = "streamline-hooks compress smollm2 --remove 0.25 --output build/smollm2 --repair swiglu --loss kl --report"
DOMAINS = ("blog_18f", "fiction_austen_doyle", "news_digitalgov", "peps", "wikitext2_raw_test")
TASKS = {
    "hellaswag": (0.25, "normalized accuracy"),
    "arc_easy": (0.25, "normalized accuracy"),
    "piqa": (0.5, "accuracy"),
    "counting_problems": (None, "exact match"),
}


def compression(length: int = 30, removed: tuple[tuple[int, int], ...] = ((2, 10),), seed: int = 0) -> dict[str, Any]:
    """What `CompressionResult.report` gives."""
    rng = np.random.default_rng(seed)
    steps = 0.04 + 0.05 * rng.random(length)
    steps[0], steps[-1] = 0.9, 0.35
    depth = np.concatenate([[0.0], np.cumsum(steps)])
    cosine = np.exp(-np.abs(depth[:, None] - depth[None, :]))
    gone = [k for start, stop in removed for k in range(start, stop)]
    zeroed: list[list[Any]] = [[length - 2, "attention"], [length - 2, "mlp"]] if length > 20 else []
    slots = [{"source": k, "module": "LlamaDecoderLayer", "silenced": []} for k in range(length) if k not in gone]
    starts = [2, 12, 13, 5, 11][: max(1, length // 6)]
    windows = [list(map(list, removed))] + [[[s, s + len(gone)]] for s in starts[1:]]
    return {
        "config": CompressionConfig().to_dict(),
        "plan": {"stack": "model.layers", "old_length": length, "slots": slots, "splices": [], "removed": gone,
                 "silenced": zeroed, "folded": []},
        "task": "causal-lm", "measure": "KL (nats per token)", "scores": {},
        "kind": "swiglu",
        "stand_in": {"parameters": 2_654_208, "flops_per_token": 5_308_416, "slots": 0},
        "criterion": "cosine",
        "search": "window",
        "candidates": [
            {
                "windows": these, "silenced": zeroed if k == 0 else [], "maps": [], "score": 0.93 - 0.01 * k,
                "distance": 0.41 + 0.17 * k, "refused": "",
                "repairs": [{"start": a, "stop": b, "removal_error": 0.31 + 0.1 * k, "repaired_error": 0.12 + 0.05 * k,
                             "ridge": 1e-4} for a, b in these],
            }
            for k, these in enumerate(windows)
        ] + [{"windows": [[0, len(gone)]], "silenced": [], "maps": [], "score": 0.61, "distance": None, "repairs": [],
              "refused": "block 0 owns the relative position bias that the other blocks use"}],
        "perplexity": {"original": 11.55, "removed": 2029.0, "repaired": 17.56, "trained": 15.21,
                       "first_removed": 49.73, "first_repaired": 22.89},
        "parameters": {"before": 134_515_008, "after": 106_523_712},
        "bytes": {"before": 538_060_032, "after": 426_094_848},
        "training": {
            "steps": 240, "tokens": 491_520, "distance_before": 0.41, "distance": 0.28 + 0.13 * math.exp(-210 / 60),
            "best_step": 210, "measure": "KL (nats per token)", "unit": "token", "seconds": 1_804.2,
            "stopped": "",
            "history": [
                {"step": s, "tokens": 2048 * s,
                 "distance": 0.28 + 0.13 * math.exp(-s / 60) + (0.004 if s == 240 else 0.0),
                 "validated": 3.1 + 0.28 + 0.13 * math.exp(-s / 60) + (0.004 if s == 240 else 0.0),
                 "loss": None if s == 0 else 0.33 + 0.2 * math.exp(-s / 50)}
                for s in range(0, 241, 30)
            ],
        },
        "samples": [{"prompt": "The for statement is used to", "text": " loop.", "reference": " iterate."}],
        "speed": None,
        "rounds": [],
        "target": {"target": {"latency": 0.8}, "original": 1.0, "predicted": 0.78, "measured": 0.76,
                   "relative_error": 0.76 / 0.78 - 1, "reached": True},
        "bounded": {"depth": 24, "statements": {}, "at_most": {"disagreement": 0.2}, "required_units": {},
                    "delta": 0.05,
                    "statement": "with probability 0.95: expected top-1 disagreement at most 0.2 (400 documents)"},
        "warnings": ["The compressed model solves 3 of 32 synthetic problems, the original 17."],
        "seconds": {"rank": 72.0, "fit": 63.1, "judge": 42.4, "train": 1_804.2, "measure": 84.0, "save": 1.4},
        "peak_memory_bytes": 2_800_000_000,
        "data": {"calibration_tokens": 40_960, "validation_tokens": 8_192, "test_tokens": 16_384,
                 "sequence_length": 512, "seed": 0, "fingerprint": "5d8c1c2a0e6f4b7a", "notes": []},
        "similarity": {"cosine": cosine.tolist(), "angular_distance": (np.arccos(cosine.clip(-1, 1)) / np.pi).tolist()},
        "versions": {"streamline_hooks": "0.1.0", "torch": "2.9.0", "transformers": "5.24.0"},
    }  # fmt: skip


def evaluation(seed: int = 0) -> dict[str, Any]:
    """What an evaluation against the original gives."""
    rng = np.random.default_rng(seed)
    before = {name: 24.0 + 12 * rng.random() for name in DOMAINS}
    factors = {name: 1.4 + 0.8 * rng.random() for name in DOMAINS}

    def perplexities(values: dict[str, float]) -> dict[str, Any]:
        return {n: {"value": v, "bits_per_byte": math.log2(v) / 4.2, "tokens": 40_960} for n, v in values.items()}

    def accuracies(lost: float) -> dict[str, Any]:
        return {
            name: {"value": (chance or 0.0) + 0.24 - lost * (1 + k), "standard_error": 0.011 + 0.004 * k,
                   "chance": chance, "items": 1_000 - 150 * k, "metric": metric}
            for k, (name, (chance, metric)) in enumerate(TASKS.items())
        }  # fmt: skip

    def timing(seconds: float) -> dict[str, Any]:
        prefill, decode = ((seconds * s * (1 + 0.02 * rng.random(7))).tolist() for s in (1.0, 0.08))
        return {"prefill": prefill, "decode": decode, "parameters": 1, "dtype": "float32", "device": "cpu",
                "peak_memory": None}  # fmt: skip

    story = "Once upon a time there was a little girl who liked to look at the stars."
    long = (
        "She asked her mother why they did not fall down, and her mother said that they were too far away to fall. " * 3
    )
    return {
        "model": "build/smollm2",
        "reference": "smollm2",
        "perplexity": perplexities({name: before[name] * factors[name] for name in DOMAINS}),
        "accuracy": accuracies(0.03),
        "writing": {"repetition": 0.183, "length": 96.0, "ended": 0.25},
        "samples": [
            {"prompt": story, "text": long, "reference": long.replace("mother", "father")},
            {"prompt": "def area(radius):\n", "text": "    return 3.14 * radius ** 2\n\n\ndef volume(r):\n    return",
             "reference": "    \"\"\"The area of a circle.\"\"\"\n    return math.pi * radius ** 2"},
        ],
        "agreement": {"kl": 0.3127, "top1": 0.7411, "quantiles": {"0.5": 0.11, "0.9": 0.82, "0.99": 2.9},
                      "kl_by_domain": {name: 0.2 + 0.05 * k for k, name in enumerate(DOMAINS)}, "tokens": 8_192,
                      "match_length": 11.3},
        "stability": {"piqa": {"value": 0.934, "share": 0.871}},
        "packages": {},
        "tasks": {"copa": {"metrics": {"acc": {"value": 0.71, "standard_error": 0.0456}}, "items": 100, "few_shot": 0,
                           "version": "1.0"}},
        "retained": {
            "classification": {"ratio": {"value": 0.89, "low": 0.86, "high": 0.92},
                               "above_chance": {"value": 0.73, "low": 0.65, "high": 0.81}},
            "generation": {"ratio": {"value": 0.62, "low": 0.5, "high": 0.74},
                           "above_chance": {"value": 0.62, "low": 0.5, "high": 0.74}},
        },
        "speed": {
            "timings": {"smollm2": timing(0.41), "build/smollm2": timing(0.31)}, "batch": 1, "tokens": 256,
            "new_tokens": 32, "threads": 2, "machine": "x86_64, torch 2.9.0",
            "ratios": {
                "smollm2": {p: {"median": 1.0, "low": 1.0, "high": 1.0} for p in ("prefill", "decode")},
                "build/smollm2": {"prefill": {"median": 0.752, "low": 0.741, "high": 0.768},
                                  "decode": {"median": 0.781, "low": 0.77, "high": 0.80}},
            },
        },
        "parameters": 106_523_712,
        "bytes": 426_094_848,
        "seconds": {"perplexity": 61.0, "accuracy": 240.5, "samples": 20.1, "speed": 31.0},
        "original": {
            "perplexity": perplexities(before),
            "accuracy": accuracies(0.0),
            "tasks": {"copa": {"metrics": {"acc": {"value": 0.75, "standard_error": None}}}},
            "writing": {"repetition": 0.094, "length": 88.0, "ended": 0.5},
            "parameters": 134_515_008,
            "bytes": 538_060_032,
        },
    }  # fmt: skip


def sweep() -> dict[str, Any]:
    """What `Sweep.report` gives: three kinds at five sizes; the largest were not timed, and one cannot be had."""
    points = [
        SweepPoint(
            str(removed), kind, f"3-{2 + removed}", removed, 1 + (0.012 + 0.008 * k) * removed**1.5,
            1 - 0.026 * removed + (0.005 if kind == "swiglu" else 0.0),
            1 - (0.03 - 0.001 * k) * removed if removed < 12 else None,
            1 - (0.028 - 0.002 * k) * removed if removed < 12 else None,
        )
        for k, kind in enumerate(("swiglu", "linear", "none"))
        for removed in (2, 4, 6, 8, 12)
    ]  # fmt: skip
    refused = SweepPoint("29", "linear", refused="one block must stay")
    return json.loads(json.dumps(Sweep((*points, refused)).report()))
