"""Score the generation of a model: problems, last words, and agreement with the original.

    python -m benchmarks.generation_scores [MODEL] [--data FOLDER]

A row has synthetic problems of the difficulty chosen by `benchmarks.probe_difficulty`, solved greedily and by sampling
(pass@k), the accuracy of last words of held-out text, and the agreement of greedy continuations with the original.
Without MODEL only the original, SmolLM2-135M-Instruct, is scored. Its row is cached in
``benchmarks/results/generation_original.json`` by a digest of all settings. Matrix products except those of the LM head
are in bfloat16 if the CPU supports it, for the original and for changed models.
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
from benchmarks.short_answers import answer_tokens, fast_products, guessed, problems_of, products, sets_of
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.evaluation import (
    ANSWER_STOP,
    GeneratedText,
    GenerationAgreement,
    GenerationStatistics,
    TextGenerationConfig,
    generate_texts,
    solve_problems,
)
from streamline_hooks.evaluation.synthetic_tasks import guessing_accuracy

FILE = RESULTS / "generation_original.json"
SEED = 2_026  # of the scored problems; difficulty and recipes were chosen with other seeds


@dataclass(frozen=True)
class Counts:
    """Numbers of scored items.

    Attributes
    ----------
    probes : int
        Problems per kind, solved greedily.
    sampled, samples : int
        Number of problems per kind that are sampled (the first ones), and samples of each.
    ks : tuple of int
        Values of k in pass@k.
    last_words : int
    beginnings, instructions : int
        Beginnings of documents to continue, and instructions to answer.
    new_tokens : int
        Generated tokens after each beginning or instruction.
    shown : int
        Number of generations that are stored as text.
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
    """The original, the problems and the texts, to score models made from the original.

    Parameters
    ----------
    original : transformers.PreTrainedModel
        The original model. It must not be changed afterwards; change a copy.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer; with a chat template if there are instructions.
    data : Path
        Folder with ``text/heldout``.
    counts : Counts
    difficulty : mapping of str to int, optional
        Difficulty by kind of problem; by default the choice of `benchmarks.probe_difficulty`.
    seed : int
        Seed of problems, texts and samples.
    cache : Path
        File in which the row of the original is cached.
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
        self.beginnings = beginnings(data, tokenizer, counts.beginnings, seed)
        self.instructions = INSTRUCTIONS[: counts.instructions]
        self._original, self._reference = self._cached(original, cache)

    def original_row(self) -> dict[str, Any]:
        """Return the row of the original from the cache."""
        return self._original

    def row(self, model: nn.Module) -> dict[str, Any]:
        """Score a model that was made from a copy of the original.

        Returns
        -------
        dict
            JSON values. Only rows with the same ``key`` are comparable; see `benchmarks.generation_numbers`.
        """
        return self.measure_row(model, self._original["key"], self._reference)[0]

    def measure_row(
        self, model: nn.Module, key: str, reference: Mapping[str, list[GeneratedText]] | None
    ) -> tuple[dict[str, Any], dict[str, list[GeneratedText]]]:
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
        """Return the accuracy of guessing by the frequency of answers, per kind and for each k."""
        subsets = {sort: problems[: self.counts.sampled] for sort, problems in self.problems.items()}
        return {
            "probes": {sort: guessing_accuracy(problems) for sort, problems in self.problems.items()},
            "pass": {
                str(k): {sort: guessed(subset, self.problems[sort], k) for sort, subset in subsets.items()}
                for k in self.counts.ks
            },
        }

    def _probes(self, model: nn.Module) -> dict[str, str]:
        solved_by_kind = {}
        for kind, problems in self.problems.items():
            solved = solve_problems(
                model,
                self.tokenizer,
                problems,
                TextGenerationConfig(
                    new_tokens=answer_tokens(self.tokenizer, problems), stop=ANSWER_STOP, batch_size=AT_ONCE["probes"]
                ),
                desc=kind,
            )
            solved_by_kind[kind] = bits(solved.correct)
        return solved_by_kind

    def _sampled(self, model: nn.Module) -> dict[str, Any]:
        right, reached = {}, {}
        for sort, problems in self.problems.items():
            several = problems[: self.counts.sampled]
            solved = solve_problems(
                model,
                self.tokenizer,
                several,
                TextGenerationConfig(
                    new_tokens=answer_tokens(self.tokenizer, several),
                    samples=self.counts.samples,
                    stop=ANSWER_STOP,
                    batch_size=AT_ONCE["pass_at"],
                    seed=self.seed,
                    **SAMPLING,
                ),
                desc=f"{sort}, sampled",
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

    def _written(self, model: nn.Module) -> dict[str, list[GeneratedText]]:
        generated = {}
        for name, prompts in (("text", self.beginnings), ("instructions", self.instructions)):
            if prompts:
                generations = generate_texts(
                    model,
                    self.tokenizer,
                    prompts,
                    TextGenerationConfig(
                        new_tokens=self.counts.new_tokens, chat=name == "instructions", batch_size=AT_ONCE["match"]
                    ),
                    desc=name,
                )
                generated[name] = [text for (text,) in generations]
        return generated

    def _shown(self, written: Mapping[str, Sequence[GeneratedText]]) -> list[dict[str, str]]:
        """Return a seeded sample of the generations, the same prompts for every model."""
        rows = [{"prompt": text.prompt, "text": text.text} for texts in written.values() for text in texts]
        chosen = Random(f"{self.seed} shown").sample(range(len(rows)), min(self.counts.shown, len(rows)))
        return [rows[k] for k in sorted(chosen)]

    def _cached(self, original: Any, cache: Path) -> tuple[dict[str, Any], dict[str, list[GeneratedText]]]:
        settings = {
            "weights": fingerprint(original.state_dict()),
            "counts": asdict(self.counts),
            "difficulty": self.difficulty,
            "problems": digest(repr(self.problems)),
            "last_words": digest(repr(self.ends)),
            "prompts": digest(repr((self.beginnings, self.instructions))),
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
                "written": {name: [_packed(text) for text in texts] for name, texts in written.items()},
            }
            write(cache, known)
        stored = json.loads(json.dumps(known[key]))
        return stored["row"], {name: [_unpacked(text) for text in texts] for name, texts in stored["written"].items()}


def matched(
    written: Mapping[str, Sequence[GeneratedText]], reference: Mapping[str, Sequence[GeneratedText]]
) -> dict[str, Any]:
    """Return, per kind of prompt, the agreement with the reference and the repetition of both."""
    agreement_by_kind = {}
    for name, texts in written.items():
        agreement = GenerationAgreement.of(texts, reference[name])
        agreement_by_kind[name] = {
            "length": agreement.length,
            "share": agreement.share,
            "lengths": " ".join(map(str, agreement.lengths)),
            "same": bits(agreement.same),
            "repetition": _repetition(texts),
            "original_repetition": _repetition(reference[name]),
        }
    return agreement_by_kind


def bits(right: Sequence[bool]) -> str:
    return "".join("01"[flag] for flag in right)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)


def _repetition(texts: Sequence[GeneratedText]) -> float | None:
    """Return the fraction of repeated 4-grams; None if no text has four tokens."""
    repetition = GenerationStatistics(tuple(texts)).repetition
    return None if math.isnan(repetition) else repetition


def _packed(text: GeneratedText) -> dict[str, Any]:
    return {**asdict(text), "tokens": " ".join(map(str, text.tokens))}


def _unpacked(stored: Mapping[str, Any]) -> GeneratedText:
    return replace(GeneratedText(**stored), tokens=tuple(map(int, stored["tokens"].split())))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model", nargs="?", help="folder of a compressed SmolLM2-135M-Instruct")
    options = parser.parse_args()
    original, tokenizer = load_pretrained("smollm2")
    generation = Generation(original, tokenizer, options.data)
    row = generation.row(load_pretrained(options.model)[0]) if options.model else generation.original_row()
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
