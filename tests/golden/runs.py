"""The table of golden runs, as plain data: what is run, and with which settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """One end-to-end run.

    Attributes
    ----------
    how : str
        Which function of the adapter makes it.
    settings : dict
        The keywords of that function.
    trained : bool
        Whether weights come from training, which differs more between CPUs than closed forms do.
    slow : bool
        Whether it takes more than a few seconds.
    """

    how: str
    settings: dict[str, Any] = field(default_factory=dict)
    trained: bool = False
    slow: bool = False

    @property
    def tolerances(self) -> dict[str, float]:
        """Relative tolerances of metrics and weights, where they are not the usual ones.

        A sum over the 49,152 float32 logits of real weights differs by 1e-5 between instruction sets.
        """
        if self.trained:
            return {"metric": 1e-3, "weight": 1e-3}
        return {"metric": 1e-4} if self.how == "real" else {}

    def named(self, setting: str) -> Iterator[str]:
        """Yield each value of a setting that names something registered, without its options."""
        for settings in (self.settings, self.settings.get("made") or {}):
            values = settings.get(setting, settings.get(f"{setting}s", ()))
            for value in [values] if isinstance(values, str) else values:
                yield str(value).partition(":")[0]


def _kind(kind: str, model: str, criterion: str, **more: Any) -> Run:
    return Run("compress", {"model": model, "kind": kind, "criterion": criterion, "remove": 2, **more})


def _search(search: str, **more: Any) -> Run:
    return Run("compress", {"search": search, "remove": 2, **more})


def _preset(preset: str, trained: bool, **more: Any) -> Run:
    return Run("compress", {"preset": preset, "data": "documents", "remove": 2, **more}, trained=trained)


def _trained(objective: str, rate: float = 1e-3, epochs: int = 1, **more: Any) -> Run:
    training = {"objective": objective, "learning_rate": rate, "epochs": epochs, "validations": 2}
    return Run("compress", {"training": training, "remove": 2, **more}, trained=True)


def _command(command: str, trained: bool = False, **more: Any) -> Run:
    return Run("command", {"command": command, **more}, trained=trained)


_COUNTS = {"calibration_examples": 24, "validation_examples": 8, "test_examples": 12}
_TOKENS = {"sequence_length": 16, "calibration_tokens": 1024, "validation_tokens": 256, "test_tokens": 256}
_MADE = {"calibration": "TEXT", "remove": 2, "shortlist": 3, **_TOKENS}

RUNS: dict[str, Run] = {
    "originals": Run(
        "originals",
        {"models": ["llama", "opt", "gpt2", "gpt_neox", "qwen3", "gemma3", "bert", "bart", "vit"]},
    ),
    # Each kind once, with each criterion in turn.
    "kind/none": _kind("none", "llama", "cosine"),
    "kind/linear": _kind("linear", "llama", "cosine_and_magnitude"),
    "kind/linear:rank": _kind("linear:rank=4", "gpt2", "angular"),
    "kind/linear:diagonal": _kind("linear:diagonal", "opt", "last_angular"),
    "kind/mlp": _kind("mlp:width=24,activation=relu", "gpt_neox", "block_influence"),
    "kind/swiglu": _kind("swiglu:width=24", "qwen3", "relative_magnitude"),
    "kind/block": _kind("block", "gemma3", "entropy"),
    "kind/block:count": _kind("block:count=2", "llama", "last_n"),
    "kind/silenced": _kind("silenced", "llama", "last_n_but_final"),
    "kind/merged": _kind("merged", "qwen3", "random"),
    "kind/merged:weight": _kind("merged:weight=0.5", "gpt2", "perplexity"),
    "kind/folded": _kind("folded", "llama", "repaired_residual", protect=[0]),
    "kind/scale": _kind("scale", "llama", "taylor"),
    "kind/feed_forward": _kind("feed_forward:width=24", "llama", "cosine"),
    "kind/ghosted": _kind("ghosted", "llama", "cosine"),
    "kind/linearpatch": _kind("linearpatch", "llama", "cosine"),
    "kind/replaceme": _kind("replaceme", "llama", "cosine"),
    # Each search.
    "search/window": _search("window", kind="linear", protect=[1]),
    "search/disjoint": _search("disjoint", kind="linear", parts=2),
    "search/one-shot": _search("one-shot", kind="linear", criterion="kl"),
    "search/mixed": _search("mixed", kind="linear", parts=2),
    "search/greedy": _search("greedy", kind="none", criterion="kl"),
    "search/attention": _search("attention", kind="linear"),
    "search/mlp": _search("mlp", kind="linear"),
    # Each preset, on documents.
    "preset/best": _preset("best", True),
    "preset/best-plain": _preset("best-plain", True),
    "preset/two-windows": _preset("two-windows", True),
    "preset/iterative": _preset("iterative", True),
    "preset/none": _preset("none", False),
    "preset/llm-streamline-ffn": _preset("llm-streamline-ffn", True),
    "preset/llm-streamline-layer": _preset("llm-streamline-layer", True),
    "preset/replaceme": _preset("replaceme", False),
    "preset/linearpatch": _preset("linearpatch", False),
    "preset/ghosted": _preset("ghosted", False),
    "preset/prune-and-comp": _preset("prune-and-comp", False),
    "preset/uidl": _preset("uidl", True),
    # Training, other data, several rounds and processes, block by block.
    "training/states": _trained("relative + 0.1*cosine", kind="mlp:width=24,linear=false"),
    "training/lora": _trained("kl", kind="none", healing="lora:rank=2", protect=[2, 3], epochs=2),
    "training/rounds": _trained("kl", kind="linear", rounds=2, healing="partial:where=after,rate=0.2"),
    "data/documents": Run("compress", {"data": "documents", "kind": "linear", "remove": 0.25, "repeated_context": 0.5}),
    "data/images": Run("compress", {"model": "vit", "data": "images", "kind": "linear", "remove": 1}),
    "data/images-trained": _trained("kl", model="vit", data="images", kind="linear", remove=1),
    "data/pairs-encoder": Run(
        "compress", {"model": "bart", "data": "pairs", "kind": "linear", "remove": 1, "stack": "model.encoder.layers"}
    ),
    "data/pairs-decoder": _trained(
        "kl", model="bart", data="pairs", kind="linear", remove=1, stack="model.decoder.layers"
    ),
    "data/embeddings": _trained(
        "embedding", rate=1e-2, model="bert", data="text batches", kind="feed_forward:width=24", remove=1
    ),
    "processes/closed-form": Run("compress", {"kind": "linear", "remove": 2, "processes": 2}),
    "processes/trained": _trained("reverse_kl + 0.5*lm", kind="swiglu:width=16", processes=2),
    "blockwise": Run("blockwise", {"kind": "linear", "remove": 2}),
    "sweep": Run("sweep", {"kinds": ["none", "linear", "scale"], "remove": [1, 2]}),
    # Each command.
    "command/compress": _command("compress", **_MADE, output="OUT", repair="linear"),
    "command/compress-trained": _command(
        "compress", True, **_MADE, output="OUT", repair="linear", loss="kl", healing="partial:where=after", epochs=2
    ),
    "command/compress-images": _command(
        "compress", model="vit", calibration="IMAGES", remove=1, output="OUT", **_COUNTS
    ),
    "command/compress-pairs": _command(
        "compress", model="bart", calibration="PAIRS", remove=1, output="OUT", stack="model.encoder.layers",
        sequence_length=16, **_COUNTS,
    ),
    "command/rank": _command("rank", calibration="TEXT", calibration_tokens=1024, sequence_length=16, top=2, json=True),
    "command/rank-search": _command(
        "rank", calibration="TEXT", calibration_tokens=1024, sequence_length=16, remove=2, search="disjoint", json=True
    ),
    "command/evaluate": _command(
        "evaluate", made={**_MADE, "repair": "linear"}, against="MODEL", text="TEXT", tasks="QUESTIONS",
        text_tokens=600, window=32, prompts=2, no_speed=True, json=True,
    ),
    "command/sweep": _command(
        "sweep", **{**_MADE, "remove": "1,2"}, repair="none,linear", no_speed=True, output="OUT"
    ),
    "command/inspect": _command("inspect", made={**_MADE, "repair": "linear"}, json=True),
    "command/diff": _command("diff", made={**_MADE, "repair": "folded", "protect": "0"}),
    "command/check": _command("check", window="1:3", json=True),
    "command/generate": _command(
        "generate", made={**_MADE, "repair": "linear"}, prompt="1 2 4 8 16", max_new_tokens=12
    ),
    "command/export": _command("export", made={**_MADE, "repair": "silenced"}, output="OUT", to="plain"),
    "command/export-refit": _command(
        "export", made={**_MADE, "repair": "linear", "protect": "0"}, output="OUT", refit="folded", original="MODEL",
        calibration="TEXT",
    ),
    # Real weights.
    "real/closed-form": Run(
        "real",
        {
            "text": "text/heldout/peps.txt", "kind": "linear", "remove": 0.25, "shortlist": 4, "sequence_length": 256,
            "calibration_tokens": 4096, "validation_tokens": 1024, "test_tokens": 1024,
        },
        slow=True,
    ),
    "real/best": Run(
        "real",
        {
            "text": "text/heldout/peps.txt", "preset": "best", "remove": 0.25, "shortlist": 2, "sequence_length": 256,
            "calibration_tokens": 4096, "fitting_tokens": 2048, "validation_tokens": 512, "test_tokens": 512,
        },
        trained=True,
        slow=True,
    ),
}  # fmt: skip
