"""Count the FLOPs and bytes of passes from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.repair.stand_in import features_of
from streamline_hooks.stack import BlockStack

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk")


class BlockWork(NamedTuple):
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
    """
    count, chosen = _from_config(stack.config, _EXPERTS), _from_config(stack.config, _CHOSEN)
    query, works = _query_features(stack.config), []
    for block in stack.blocks:
        experts = {id(p): p for p in _expert_matrices(block, count)}
        if experts and not chosen:
            raise StreamlineError(
                f"The blocks of {type(stack.model).__name__} hold {count} experts, and its config does not say how "
                f"many a token is routed to. Expected one of {', '.join(_CHOSEN)}. Set it."
            )
        dense = sum(p.numel() for p in block.parameters() if p.ndim > 1 and id(p) not in experts)
        routed = sum(p.numel() for p in experts.values()) * min(1.0, (chosen or 0) / (count or 1))
        every = sum(p.numel() for p in block.parameters())
        works.append(BlockWork(every, dense + round(routed), query if _attends(block) else 0))
    return works


class Rates(NamedTuple):
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


class StageWork(NamedTuple):
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
    stack: BlockStack, config: CompressionConfig, window: int, *, memory: int = 0, itemsize: float = 0.0
) -> tuple[list[StageWork], int]:
    """Return the stages of `compress_checkpoint`, and the bytes in memory at its peak.

    The model may be on the meta device. `window` blocks are removed in the middle, `memory` bytes of hidden states are
    not in files, and `itemsize` is the bytes per weight in the checkpoint, by default those of the parameters.

    A profile compares the L + 1 states of a token in float64: 2·(L + 1)²·d FLOPs. Moments are two d×d products per
    window and token. A solution is two eigendecompositions and seven d×d products.
    """
    data, n, d, candidates = config.data, len(stack), features_of(stack), config.search.shortlist
    calibration, validation, test = data.calibration_tokens, data.validation_tokens, data.test_tokens
    model: Any = stack.model
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    itemsize = itemsize or sum(p.numel() * p.element_size() for p in parameters) / total
    work = block_work(stack)
    sizes, flops = [one.parameters * itemsize for one in work], [one.flops(data.sequence_length) for one in work]
    blocks, each, head = sum(sizes), sum(flops), _untied_head(model) * itemsize
    logits = 2.0 * d * getattr(model.config.get_text_config(), "vocab_size", 0)
    end, state = (n + window) // 2, d * max(2.0, itemsize)
    after = sum(flops[end:])
    ranked, measured = (n + 1) * calibration * state, 6 * test * state
    fitted = ((2 + min(candidates, window)) * (calibration + validation) + candidates * validation) * state
    spilled = [max(0.0, states - memory) for states in (ranked, fitted, measured)]
    verified = calibration * sum(flops[:end]) + validation * (each + candidates * after + (1 + candidates) * logits)
    solved = 4.0 * calibration * candidates * d**2 + 14.0 * candidates * d**3
    compared = 2.0 * calibration * (n + 1) ** 2 * d
    saved, scored = total * itemsize - blocks * window / n, test * (each + 2 * after + 3 * logits)
    stages = [
        StageWork("check", blocks, products=32 * each),
        StageWork("rank", blocks + spilled[0], spilled[0], ranked, calibration * each, compared),
        StageWork("verify", blocks + head, spilled[1], fitted, verified, solved, 20.0 * candidates * d**3),
        StageWork("choose", 10 * blocks, products=160 * each),
        StageWork("measure", blocks + head, spilled[2], measured, scored),
        StageWork("save", saved, saved),
    ]
    held = min(memory, max(ranked, fitted, measured))
    return stages, round(total * itemsize - blocks - head + max(sizes) + held + 80 * d**2)


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
    tied = {id(p) for p in model.get_input_embeddings().parameters()}
    own = list((model.get_output_embeddings() or nn.Module()).parameters())
    return sum(p.numel() for p in own) if any(id(p) not in tied for p in own) else 0
