"""Whole recipes by name: what stands in the window's place, how it is trained, and how the rest is healed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.healing import Healing
from streamline_hooks.repair.objective import Objective
from streamline_hooks.repair.settings import Training


@dataclass(frozen=True)
class Preset:
    """A recipe.

    Attributes
    ----------
    name : str
    kind : str
        What stands in the window's place, as `parse_replacement` reads it.
    source : str
        The paper or the repository that it is taken from, and what is different here.
    training : Training or None
        None where nothing is trained. How many sequences are run at a time, and so how many steps are made, is up to
        whoever trains.
    healing : Healing or None
        What is trained of the blocks that stay.
    rounds : int
        In how many rounds the blocks go, each of which is repaired and trained (`compress_iteratively`).
    search, criterion : str
        How the blocks that go are found, as in `compress`; an empty criterion for what is usual there.
    repeated : float
        The share of the text for the choice of blocks that says a passage twice, as in `compress`.
    """

    name: str
    kind: str
    source: str
    training: Training | None = None
    healing: Healing | None = None
    rounds: int = 1
    search: str = "window"
    criterion: str = ""
    repeated: float = 0.0

    @property
    def arguments(self) -> dict[str, Any]:
        """What `compress` is to be given for it, or `compress_iteratively` with the rounds besides.

        Batches and packed text have no passages to be repeated: give ``{**arguments, "repeated": 0.0}`` with them.

        Examples
        --------
        >>> preset_named("ghosted").arguments["kind"]
        'ghosted'
        """
        return {
            "kind": self.kind,
            "training": self.training,
            "healing": self.healing,
            "search": self.search,
            "criterion": self.criterion or None,
            "repeated": self.repeated,
        }


_MLP_LAYERS = (
    "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "w1", "w2", "mlp.c_fc", "mlp.c_proj",
    "dense_h_to_4h", "dense_4h_to_h",
)  # fmt: skip

_BEST = Preset(
    "best",
    "swiglu",
    "This library's own, the best repair of benchmarks/results/quality.md: a SwiGLU beside the least-squares map, and "
    "a fifth of the rate for the blocks behind it, at the same time: with the tokens halved between the two, one after "
    "the other, it ends further from the original (on validation text KL 0.53 and 0.54 for 0.51, 8 of 30 blocks gone). "
    "What is learned is what the original says, and the text itself, by which alone it ends further too (0.63 for "
    "0.52 on held-out text). The blocks are chosen on text that says each passage twice, since those that prose needs "
    "least are those that copy (benchmarks/results/quality_generation.md). Where the text is unlike what the model is "
    "for, train the network alone by KL (kind swiglu, objective kl), which does not adapt the model to it.",
    Training(objective=Objective(kl=1.0, lm=1.0), learning_rate=1e-3, weight_decay=0.01, warmup=0.05, floor=0.05),
    Healing("partial", "after", rate=0.2),
    repeated=1.0,
)

_TWO_WINDOWS = Preset(
    "two-windows",
    "linear",
    "This library's own, for what is taken from the context (benchmarks/results/quality_generation.md): two windows "
    "with blocks between them, of which a model copies more than of one that is as long as both; the least-squares map "
    "in the place of each, beside which a network learned nothing more, and the training and the healing of `best`.",
    _BEST.training,
    _BEST.healing,
    search="disjoint",
    criterion="cosine_and_magnitude",
    repeated=_BEST.repeated,
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _BEST,
        _TWO_WINDOWS,
        Preset(
            "iterative",
            _BEST.kind,
            "IteRABRe, arXiv 2503.06291: remove a little, train, rank again on the repaired model; here in two rounds "
            "of `best`, which share its text, with the original as the teacher of both.",
            _BEST.training,
            _BEST.healing,
            rounds=2,
            repeated=_BEST.repeated,
        ),
        Preset("none", "none", "Plain removal."),
        Preset(
            "llm-streamline-ffn",
            "feed_forward",
            "LLM-Streamline, arXiv 2403.19135; RUCKBReasoning/LLM-Streamline, examples/"
            "mlp_mseloss_train_without_memory_issue: d to 4d to d with ReLU and biases, without a residual path, from "
            "random weights, by the MSE of the states; its batches hold 128 sequences of 2,048 tokens and more. Its "
            "weight decay is for biases too.",
            Training(
                objective=Objective(kl=0.0, mse=1.0),
                learning_rate=2e-4,
                weight_decay=1e-3,
                betas=(0.9, 0.95),
                warmup=0.03,
                floor=0.025,
                clip=1.0,
            ),
        ),
        Preset(
            "llm-streamline-layer",
            "block:solve=false",
            "LLM-Streamline, arXiv 2403.19135; RUCKBReasoning/LLM-Streamline, LLM_Streamline/"
            "train_lightweightnetwork.py: a copy of the window's first block as it is, by the MSE of the states; its "
            "batches hold 128 sequences of 2,048 tokens. Its script runs the block without a causal mask while it "
            "trains, which is not done here.",
            Training(
                objective=Objective(kl=0.0, mse=1.0),
                learning_rate=2e-4,
                weight_decay=1e-3,
                betas=(0.9, 0.999),
                warmup=0.01,
                floor=0.25,
                clip=5.0,
            ),
        ),
        Preset(
            "replaceme",
            "replaceme",
            "ReplaceMe, arXiv 2505.02819, eq. 1 to 6; mts-ai/ReplaceMe, lstsq.py. Its code sums over padding too.",
        ),
        Preset(
            "linearpatch",
            "linearpatch",
            "LinearPatch, arXiv 2505.24680; chenxinrui-tsinghua/LinearPatch, layer_select.py and block_scaling.py, "
            "without its fine-tuning. For orders that have several Hadamard matrices ours may be another one.",
        ),
        Preset(
            "ghosted",
            "ghosted",
            "Ghosted Layers, arXiv 2605.15491; daniel-eai/ghosted_layers_official_repository, lib/recovery.py.",
        ),
        Preset(
            "prune-and-comp",
            "scale",
            "Prune&Comp, arXiv 2507.18212; chenxinrui-tsinghua/PruneAndComp, magcomp.py, for one window. Folded into "
            "the blocks behind the window instead of the embedding and the blocks before it, which is the same.",
        ),
        Preset(
            "uidl",
            "none",
            "Gromov et al., arXiv 2403.17887, A.1 and B.3: plain removal, then adapters on the MLPs of all blocks by "
            "the LM loss; its batches hold 16 sequences, of 5,000 steps 100 warm up, and the blocks are in 4 bits, "
            "which they are not here.",
            Training(
                objective=Objective(kl=0.0, lm=1.0),
                learning_rate=3e-4,
                weight_decay=0.0,
                betas=(0.9, 0.999),
                warmup=0.02,
                floor=0.0,
                clip=1.0,
            ),
            Healing("lora", "all", rank=64, alpha=64.0, dropout=0.05, targets=_MLP_LAYERS),
        ),
    )
}


@checked()
def preset_named(name: str) -> Preset:
    """The preset of a name.

    Raises
    ------
    StreamlineError
        If there is none; the text lists the known ones.

    Examples
    --------
    >>> preset_named("uidl").kind
    'none'
    """
    if name not in PRESETS:
        raise StreamlineError(f"The preset {name!r} is unknown. Known: {', '.join(PRESETS)}.")
    return PRESETS[name]
