"""Compressions of the small model of stories, which one process and several are to do alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamline_hooks import StreamlineError, compress
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.distillation import DistillationConfig
from tests.configured import arguments
from tests.logs import logged

SMALL = {"sequence_length": 64, "calibration_tokens": 3200, "validation_tokens": 320, "test_tokens": 320}
TRAINING = DistillationConfig({"kl": 1.0}, learning_rate=1e-3, validations=2, gradient_accumulation_steps=2)


def plain(stories: Path, texts: list[str], **options: Any) -> dict[str, Any]:
    return told_of(shortened(stories, texts, remove=1, shortlist=3, **{**SMALL, **options}))


def shortened(stories: Path, texts: list[str], **options: Any) -> Any:
    model, tokenizer = load_pretrained(stories)
    return compress(model, texts, tokenizer=tokenizer, **arguments(**options))


def trained(stories: Path, texts: list[str], **options: Any) -> dict[str, Any]:
    options = {"repair": "swiglu:width=16", "distillation": TRAINING, "speed": False, "generation": False, **options}
    return plain(stories, texts, **options)


def one_test_sequence(stories: Path, texts: list[str]) -> dict[str, Any]:
    """Return a compression in which only one of two processes has text to measure on."""
    return plain(stories, texts, test_tokens=64, speed=False, generation=False)


def fresh(stories: Path, texts: list[str]) -> list[str]:
    """The order of what stands there with random weights, which says nothing yet."""
    options: dict[str, Any] = {"repair": "feed_forward:width=16", "speed": False, "generation": False, **SMALL}
    result = shortened(stories, texts, remove=1, shortlist=4, **options)
    return [str(one) for one in result.candidates]


def told_of(result: Any) -> dict[str, Any]:
    return {
        "weights": {name: value.clone() for name, value in result.model.state_dict().items()},
        "matrices": [result.profile.cosine, result.profile.angular],
        "chosen": [str(one) for one in result.candidates],
        "kls": [one.distance for one in result.candidates],
        "errors": [one.repairs[0].repaired_error for one in result.candidates],
        "perplexities": result.perplexities,
        "history": [] if result.training is None else result.training.history,
        "samples": [mine.text for mine, _ in result.samples],
        "timed": result.speed is not None,
        "seconds": result.seconds["rank"],
        "folder": str(result.folder),
    }


def in_several(folder: Path, stories: Path, rank: int) -> dict[str, Any]:
    """Both, and what happens where one process is not like the others."""
    texts = json.loads((folder / "texts.json").read_text())
    out = folder / "out" if rank == 0 else folder / "texts.json" / "nowhere"  # where nothing can be written
    with logged() as said:
        found = {"trained": trained(stories, texts, output=out), "said": said}
    found["plain"] = plain(stories, texts)
    found["one_test_sequence"] = one_test_sequence(stories, texts)
    found["fresh"] = fresh(stories, texts)
    found["files"] = sorted(str(path.relative_to(folder)) for path in (folder / "out").iterdir())
    found["not free"] = raised(lambda: plain(stories, texts, output=out))
    rounds: dict[str, Any] = {"rounds": 2, "remove": 2, "distillation": TRAINING, "output": out, **SMALL}
    found["rounds not free"] = raised(lambda: shortened(stories, texts, **rounds))
    found["one fails"] = raised(lambda: plain(stories, texts, protect=(9,) * rank, speed=False, generation=False))
    found["other config"] = raised(
        lambda: plain(stories, texts, criterion=("cosine", "angular")[rank], speed=False, generation=False)
    )
    found["other texts"] = raised(lambda: plain(stories, texts[5 * rank :], speed=False, generation=False))
    return found


def raised(call: Any) -> str:
    try:
        call()
    except StreamlineError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
