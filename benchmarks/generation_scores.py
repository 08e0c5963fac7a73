"""One row of what a model writes: problems solved, ends of texts, and how far it goes along with its original.

    python -m benchmarks.generation_scores [MODEL] [--data FOLDER]

Small problems of the difficulty that `benchmarks.probe_difficulty` chose, answered greedily and by sampling (pass@k);
last words of held-out text; greedy continuations against the original's. Without MODEL the original alone,
SmolLM2-135M-Instruct, is scored. What it writes is kept in ``benchmarks/results/generation_original.json``, by
everything that it depends on. Matrix products are in bfloat16 where the machine is fast in it, but for the LM head's,
of the original as of what is made from it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.heldout_pieces import beginnings, last_words
from benchmarks.instructions import INSTRUCTIONS
from benchmarks.last_words import score_last_words
from benchmarks.probe_difficulty import chosen
from benchmarks.quality_scores import digest, fingerprint, write
from benchmarks.real_text import RESULTS, arguments
from benchmarks.short_answers import fast_products, guessed, problems_of, products, room, same_answer, sets_of
from streamline_hooks.evaluation import solve, write_on
from streamline_hooks.evaluation.probes import STOP
from streamline_hooks.evaluation.writing import Matched, WritingScores, Written
from streamline_hooks.pretrained import load_pretrained

FILE = RESULTS / "generation_original.json"
SEED = 2_026  # of the problems that score; others chose their difficulty, and the recipes


@dataclass(frozen=True)
class Counts:
    """How much is asked.

    Attributes
    ----------
    probes : int
        Problems a sort, greedily.
    sampled, samples : int
        Problems a sort, the first of these, and tries at each.
    ks : tuple of int
        Of pass@k.
    last_words : int
    beginnings, instructions : int
        Texts to be written on, and questions to be answered.
    new_tokens : int
        After each of them.
    shown : int
        Of them, kept as text.
    """

    probes: int = 100
    sampled: int = 20
    samples: int = 20
    ks: tuple[int, ...] = (1, 5, 20)
    last_words: int = 200
    beginnings: int = 40
    instructions: int = len(INSTRUCTIONS)
    new_tokens: int = 64
    shown: int = 10


SAMPLING = {"temperature": 0.8, "top_p": 0.95}
AT_ONCE = {"probes": 50, "pass_at": 100, "last_words": 25, "match": 60}


class Generation:
    """The original, the problems and the texts, to score what a model made from it writes.

    Parameters
    ----------
    original : transformers.PreTrainedModel
        It is kept, and must not be changed afterwards: change a copy.
    tokenizer : PreTrainedTokenizerBase
        With a chat template, where there are instructions.
    data : Path
        With ``text/heldout``.
    counts : Counts
    difficulty : mapping of str to int, optional
        By sort; by default what `benchmarks.probe_difficulty` chose.
    seed : int
        Of problems, texts and samples.
    cache : Path
        Where the original's row is kept.
    """

    def __init__(
        self,
        original: Any,
        tokenizer: Any,
        data: Path,
        *,
        counts: Counts = Counts(),
        difficulty: Mapping[str, int] | None = None,
        seed: int = SEED,
        cache: Path = FILE,
    ) -> None:
        self.tokenizer, self.counts, self.seed = tokenizer, counts, seed
        self.difficulty = dict(chosen() if difficulty is None else difficulty)
        self.problems = problems_of(counts.probes, seed, self.difficulty)
        self.ends = last_words(data, tokenizer, counts.last_words, seed)
        self.begun = beginnings(data, tokenizer, counts.beginnings, seed)
        self.asked = INSTRUCTIONS[: counts.instructions]
        self._original, self._reference = self._cached(original, cache)

    def original_row(self) -> dict[str, Any]:
        """The original's own row, from the cache; it goes along with itself."""
        return self._original

    def row(self, model: nn.Module) -> dict[str, Any]:
        """Score a model that was made from the original, and is another module in memory.

        Returns
        -------
        dict
            JSON values. ``key`` names what was asked: only rows of one key are comparable, see
            `benchmarks.generation_numbers`.
        """
        return self.measure_row(model, self._original["key"], self._reference)[0]

    def measure_row(
        self, model: nn.Module, key: str, reference: Mapping[str, list[Written]] | None
    ) -> tuple[dict[str, Any], dict[str, list[Written]]]:
        seconds: dict[str, float] = {}
        with fast_products(model):
            with timed(seconds, "probes"):
                greedy = self._probes(model)
            with timed(seconds, "pass_at"):
                sampled = self._sampled(model)
            with timed(seconds, "last_words"):
                ends = self._last_words(model)
            with timed(seconds, "match"):
                written = self._written(model)
        row = {
            "key": key,
            "difficulty": self.difficulty,
            "sets": sets_of(self.counts.probes),
            "guessed": self._guessed(),
            "probes": greedy,
            "pass_at": sampled,
            "last_words": ends,
            "match": matched(written, written if reference is None else reference),
            "samples": self._shown(written),
            "seconds": seconds,
        }
        return row, written

    def _guessed(self) -> dict[str, Any]:
        """What knowing nothing but how often each answer is right would reach, of one sort and with k tries."""
        several = {sort: problems[: self.counts.sampled] for sort, problems in self.problems.items()}
        return {
            "probes": {sort: same_answer(problems) for sort, problems in self.problems.items()},
            "pass": {
                str(k): {sort: guessed(asked, self.problems[sort], k) for sort, asked in several.items()}
                for k in self.counts.ks
            },
        }

    def _probes(self, model: nn.Module) -> dict[str, str]:
        found = {}
        for sort, problems in self.problems.items():
            solved = solve(
                model,
                self.tokenizer,
                problems,
                new_tokens=room(self.tokenizer, problems),
                stop=STOP,
                batch_size=AT_ONCE["probes"],
                what=sort,
            )
            found[sort] = bits(solved.right)
        return found

    def _sampled(self, model: nn.Module) -> dict[str, Any]:
        right, reached = {}, {}
        for sort, problems in self.problems.items():
            several = problems[: self.counts.sampled]
            solved = solve(
                model,
                self.tokenizer,
                several,
                new_tokens=room(self.tokenizer, several),
                samples=self.counts.samples,
                stop=STOP,
                batch_size=AT_ONCE["pass_at"],
                seed=self.seed,
                what=f"{sort}, sampled",
                **SAMPLING,
            )
            right[sort] = [sum(tries) for tries in solved.solved]
            reached[sort] = {str(k): solved.pass_at(k) for k in self.counts.ks}
        return {"samples": self.counts.samples, "right": right, "pass": reached}

    def _last_words(self, model: nn.Module) -> dict[str, Any]:
        scores = score_last_words(model, self.tokenizer, self.ends, batch_size=AT_ONCE["last_words"])
        return {
            "right": bits(scores.right),
            "accuracy": scores.accuracy,
            "perplexity": scores.perplexity,
            "nats": " ".join(f"{nats:.3f}" for nats in scores.loglikelihoods),
        }

    def _written(self, model: nn.Module) -> dict[str, list[Written]]:
        found = {}
        for name, prompts in (("text", self.begun), ("instructions", self.asked)):
            if prompts:
                several = write_on(
                    model,
                    self.tokenizer,
                    prompts,
                    new_tokens=self.counts.new_tokens,
                    chat=name == "instructions",
                    batch_size=AT_ONCE["match"],
                    what=name,
                )
                found[name] = [one for (one,) in several]
        return found

    def _shown(self, written: Mapping[str, Sequence[Written]]) -> list[dict[str, str]]:
        """The same for every model, drawn by the seed from texts and instructions."""
        rows = [{"prompt": one.prompt, "text": one.text} for several in written.values() for one in several]
        chosen = Random(f"{self.seed} shown").sample(range(len(rows)), min(self.counts.shown, len(rows)))
        return [rows[k] for k in sorted(chosen)]

    def _cached(self, original: Any, cache: Path) -> tuple[dict[str, Any], dict[str, list[Written]]]:
        settings = {
            "weights": fingerprint(original.state_dict()),
            "counts": asdict(self.counts),
            "difficulty": self.difficulty,
            "problems": digest(repr(self.problems)),
            "last_words": digest(repr(self.ends)),
            "prompts": digest(repr((self.begun, self.asked))),
            "template": digest(repr(getattr(self.tokenizer, "chat_template", None))),
            "sampling": SAMPLING,
            "at_once": AT_ONCE,
            "seed": self.seed,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if (precision := products()) != "bfloat16":
            settings["products"] = precision
        known = json.loads(cache.read_text()) if cache.exists() else {}
        key = digest(json.dumps(settings))
        if key not in known:
            row, written = self.measure_row(original, key, None)
            known[key] = {
                "settings": settings,
                "row": row,
                "written": {name: [_packed(one) for one in several] for name, several in written.items()},
            }
            write(cache, known)
        kept = json.loads(json.dumps(known[key]))
        return kept["row"], {name: [_unpacked(one) for one in several] for name, several in kept["written"].items()}


def matched(written: Mapping[str, Sequence[Written]], reference: Mapping[str, Sequence[Written]]) -> dict[str, Any]:
    """Of each kind of prompt, how far the two go along, and how much each repeats itself."""
    found = {}
    for name, several in written.items():
        alike = Matched.of(several, reference[name])
        found[name] = {
            "length": alike.length,
            "share": alike.share,
            "lengths": " ".join(map(str, alike.lengths)),
            "same": bits(alike.same),
            "repetition": _repetition(several),
            "original_repetition": _repetition(reference[name]),
        }
    return found


def bits(right: Sequence[bool]) -> str:
    return "".join("01"[one] for one in right)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)


def _repetition(several: Sequence[Written]) -> float | None:
    """None where no text has a run of four tokens."""
    found = WritingScores(tuple(several)).repetition
    return None if math.isnan(found) else found


def _packed(one: Written) -> dict[str, Any]:
    return {**asdict(one), "tokens": " ".join(map(str, one.tokens))}


def _unpacked(kept: Mapping[str, Any]) -> Written:
    return replace(Written(**kept), tokens=tuple(map(int, kept["tokens"].split())))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model", nargs="?", help="a folder that a shortened SmolLM2-135M-Instruct was saved in")
    options = parser.parse_args()
    original, tokenizer = load_pretrained("smollm2")
    generation = Generation(original, tokenizer, options.data)
    row = generation.row(load_pretrained(options.model)[0]) if options.model else generation.original_row()
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
