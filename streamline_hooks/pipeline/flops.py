"""Count the FLOPs and bytes of passes from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.repair.stand_in import features_of
from streamline_hooks.stack import BlockStack

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk")


@dataclass(frozen=True)
class BlockWork:
    """Work of a block: its `parameters`, those `active` for a token, and the features of a query over all heads."""

    parameters: int
    active: int
    query: int

    def flops(self, sequence_length: int) -> float:
        """Return the FLOPs per token of a causal forward pass."""
        return 2 * self.active + 4 * self.query * (sequence_length + 1) / 2


def block_work(stack: BlockStack) -> list[BlockWork]:
    """Return the work of every block; of a mixture's experts, those that a token is routed to are active.

    Raises
    ------
    StreamlineError
        If a block holds experts and the config does not say how many a token is routed to.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> first = block_work(find_stack(tiny_model("llama")))[0]
    >>> first.flops(1) == 2 * first.active + 4 * 32
    True
    """
    count, chosen = _from_config(stack.config, _EXPERTS), _from_config(stack.config, _CHOSEN)
    works = []
    for block in stack.blocks:
        experts = {id(p): p for p in _expert_matrices(block, count)}
        if experts and not chosen:
            raise StreamlineError(
                f"The blocks of {type(stack.model).__name__} hold {count} experts, and its config does not say how "
                f"many a token is routed to. Expected one of {', '.join(_CHOSEN)}. Set it."
            )
        dense = sum(p.numel() for p in block.parameters() if p.ndim > 1 and id(p) not in experts)
        routed = sum(p.numel() for p in experts.values()) * min(1.0, (chosen or 0) / (count or 1))
        query = _query_features(stack.config) if _attends(block) else 0
        works.append(BlockWork(sum(p.numel() for p in block.parameters()), dense + round(routed), query))
    return works


@dataclass(frozen=True)
class Rates:
    """Rates of a device, and the number of processes, which share the disk.

    `products` are FLOP/s in the weights' precision; `float64` and `eigen` (eigendecompositions, 10·d³) in float64;
    `read` and `write` are bytes/s.
    """

    products: float
    float64: float
    eigen: float
    read: float
    write: float
    processes: int = 1


@dataclass(frozen=True)
class StageWork:
    """Work of a stage: bytes `read` and `written`, bytes of hidden `states` kept, and FLOPs as in `Rates`."""

    name: str
    read: float = 0.0
    written: float = 0.0
    states: float = 0.0
    products: float = 0.0
    float64: float = 0.0
    eigen: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Return the time at given rates: reading, writing and computing in turn; processes share the products."""
        shared = self.products / rates.products + self.float64 / rates.float64
        return self.read / rates.read + self.written / rates.write + self.eigen / rates.eigen + shared / rates.processes


def blockwise_work(
    stack: BlockStack,
    config: CompressionConfig,
    window: int,
    *,
    memory: int = 0,
    checks: int = 1,
    itemsize: float = 0.0,
) -> tuple[list[StageWork], int]:
    """Return the stages of `compress_checkpoint`, and the bytes in memory at its peak.

    Parameters
    ----------
    stack : BlockStack
        Of a model on any device, also the meta device.
    config : CompressionConfig
        Its numbers of tokens and its shortlist count.
    window : int
        Blocks removed, assumed to lie in the middle.
    memory : int
        Bytes of hidden states in memory; those beyond it are in files.
    checks : int
        Times that the blocks are run on a few tokens for a check.
    itemsize : float
        Bytes per weight in the checkpoint; by default those of the parameters.

    Notes
    -----
    A profile compares the L + 1 states of a token in float64: 2·(L + 1)²·d FLOPs. Moments are two d×d products per
    window and token. A solution is two eigendecompositions and seven d×d products.
    """
    data, model, work, width = config.data, stack.model, block_work(stack), features_of(stack)
    calibration, validation, test, n = data.calibration_tokens, data.validation_tokens, data.test_tokens, len(stack)
    candidates = config.search.shortlist
    parameters: list[Tensor] = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    itemsize = itemsize or sum(p.numel() * p.element_size() for p in parameters) / total
    sizes, flops = [one.parameters * itemsize for one in work], [one.flops(data.sequence_length) for one in work]
    blocks, head = sum(sizes), _untied_head(model) * itemsize
    logits = 2.0 * width * getattr(model.config.get_text_config(), "vocab_size", 0)  # type: ignore[union-attr, operator]
    end = (n + window) // 2
    each, behind, state = sum(flops), sum(flops[end:]), width * max(2.0, itemsize)
    ranked, measured = (n + 1) * calibration * state, 6 * test * state
    fitted = ((2 + min(candidates, window)) * (calibration + validation) + candidates * validation) * state
    verified = calibration * sum(flops[:end]) + validation * (each + candidates * behind + (1 + candidates) * logits)
    solved = 4.0 * calibration * candidates * width**2 + 14.0 * candidates * width**3
    spilled = [max(0.0, states - memory) for states in (ranked, fitted, measured)]
    saved = total * itemsize - blocks * window / n
    compared = 2.0 * calibration * (n + 1) ** 2 * width
    scored = test * (each + 2 * behind + 3 * logits)
    stages = [
        StageWork("check", checks * blocks, products=checks * 32 * each),
        StageWork("rank", blocks + spilled[0], spilled[0], ranked, calibration * each, compared),
        StageWork("verify", blocks + head, spilled[1], fitted, verified, solved, 20.0 * candidates * width**3),
        StageWork("choose", 10 * blocks, products=160 * each),
        StageWork("measure", blocks + head, spilled[2], measured, scored),
        StageWork("save", saved, saved),
    ]
    held = min(memory, max(ranked, fitted, measured))
    return stages, round(total * itemsize - blocks - head + max(sizes) + held + 80 * width**2)


def compression_bytes(
    stack: BlockStack, *, batch: int, text: int, windows: int = 1, trained: int = 0, state_memory: int = 2**31
) -> dict[str, int]:
    """Return the peak bytes above the model of each stage of `compress`.

    `batch` and `text` are the tokens of the largest batch and of the training and validation text, `windows` those
    fitted in one pass, `trained` the trainable parameters; `state_memory` as in `HardwareConfig`.
    """
    itemsize = next(p.element_size() for p in stack.model.parameters() if p.is_floating_point())
    width, n, head = features_of(stack), len(stack), stack.model.get_output_embeddings()  # type: ignore[operator]
    vocabulary = 0 if head is None else head.weight.shape[0]
    state, logits, reference = batch * width * itemsize, batch * vocabulary * itemsize, 4 * batch * vocabulary
    return {
        "rank": (n + 1) * state + 16 * batch * (n + 1) ** 2,
        "fit": 4 * windows * (state + 16 * width**2),
        "verify": windows * state + 3 * logits + reference,
        "train": min(2 * text * width * itemsize, state_memory) + 16 * trained + 8 * n * state + 3 * logits + reference,
        "evaluate": windows * state + 2 * logits,
    }


def _expert_matrices(block: nn.Module, count: int | None) -> Iterator[Tensor]:
    for module in block.modules():
        if isinstance(module, nn.ModuleList) and 1 < len(module) == count:
            yield from (p for p in module.parameters() if p.ndim > 1)
        yield from (p for p in module.parameters(recurse=False) if p.ndim > 2 and p.shape[0] == count)


def _from_config(config: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(place, name, None) for place in (config, getattr(config, "ffn_config", None)) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _attends(block: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() or "attn" in name for name, module in block.named_modules())


def _query_features(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", 0)
    heads = max(heads) if isinstance(heads, (list, tuple)) else heads
    return heads * (getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0))


def _untied_head(model: Any) -> int:
    """Return the parameters of an LM head that is not tied to the embeddings; it is read only when needed."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = {id(p) for p in embeddings.parameters()}
    own = [p for p in head.parameters()] if head is not None else []
    return sum(p.numel() for p in own) if any(id(p) not in tied for p in own) else 0
