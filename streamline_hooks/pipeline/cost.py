"""Estimate the FLOPs, bytes and time of a compression block by block, and run it within a memory limit."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from safetensors import safe_open
from torch import Tensor, nn

from streamline_hooks.checkpoint import open_checkpoint, stored_bytes
from streamline_hooks.core import (
    HardwareConfig,
    Processes,
    StreamlineError,
    current_processes,
    distributed_step,
    get_logger,
    table,
    weights_in_memory,
)
from streamline_hooks.modeling import BlockStack, Task, find_stack
from streamline_hooks.pipeline.compress_checkpoint import BlockwiseOptions, compress_checkpoint
from streamline_hooks.pipeline.config import CompressionConfig, RunOptions
from streamline_hooks.repair import FoldedConfig, ScaleConfig, hidden_size_of
from streamline_hooks.selection import target_windows
from streamline_hooks.surgery import WHOLE_LOGIT_BYTES, tokens_within_memory

if TYPE_CHECKING:
    from streamline_hooks.pipeline.result import CompressionResult

logger = get_logger(__name__)


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk")


class BlockWork(NamedTuple):
    """Size of a block: its `parameters`, those `active` for a token, and the query features of all heads."""

    parameters: int
    active: int
    query: int

    def flops(self, sequence_length: int) -> float:
        """Return the FLOPs per token of a causal forward pass."""
        return 2 * self.active + 4 * self.query * (sequence_length + 1) / 2


def block_work(stack: BlockStack) -> list[BlockWork]:
    """Return the size of every block; in a mixture of experts, the experts of one token are active.

    Raises
    ------
    StreamlineError
        If a block has experts and the config lacks the number of experts per token.
    """
    count, chosen = _from_config(stack.config, _EXPERTS), _from_config(stack.config, _EXPERTS_PER_TOKEN)
    query, works = _query_features(stack.config), []
    for block in stack.blocks:
        experts = {id(p): p for p in _expert_matrices(block, count)}
        if experts and not chosen:
            raise StreamlineError(
                f"The blocks of {type(stack.model).__name__} have {count} experts, but its config lacks the number of "
                f"experts per token. Expected one of {', '.join(_EXPERTS_PER_TOKEN)}. Set it in the config."
            )
        dense = sum(p.numel() for p in block.parameters() if p.ndim > 1 and id(p) not in experts)
        routed = sum(p.numel() for p in experts.values()) * min(1.0, (chosen or 0) / (count or 1))
        total = sum(p.numel() for p in block.parameters())
        works.append(BlockWork(total, dense + round(routed), query if _attends(block) else 0))
    return works


class Rates(NamedTuple):
    """Rates of a device.

    Attributes
    ----------
    products : float
        FLOP/s of matrix products in the precision of the weights.
    float64 : float
        FLOP/s of matrix products in float64.
    eigen : float
        FLOP/s of eigendecompositions in float64, counted as 10·d³ FLOPs each.
    read, write : float
        Bytes/s of the disk.
    processes : int
        Number of processes, which divide the products and share the disk.
    """

    products: float
    float64: float
    eigen: float
    read: float
    write: float
    processes: int = 1


class StageWork(NamedTuple):
    """Work of a stage: bytes `read` and `written`, bytes of stored hidden `states`, and FLOPs as in `Rates`."""

    name: str
    read: float = 0.0
    written: float = 0.0
    states: float = 0.0
    products: float = 0.0
    float64: float = 0.0
    eigen: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Return the time at given rates, if reading, writing and computing follow each other."""
        shared = self.products / rates.products + self.float64 / rates.float64
        return self.read / rates.read + self.written / rates.write + self.eigen / rates.eigen + shared / rates.processes


def blockwise_work(
    stack: BlockStack, config: CompressionConfig, window: int, *, memory: int = 0, itemsize: float = 0.0
) -> tuple[list[StageWork], int]:
    """Return the work of each stage of `compress_checkpoint`, and its peak memory in bytes.

    A profile compares the L + 1 states of a token in float64: 2·(L + 1)²·d FLOPs. Moments take two d×d products per
    window and token. A solution takes two eigendecompositions and seven d×d products.

    Searches that run the model, and selections that are verified in the whole model, take further passes over all
    blocks.

    Parameters
    ----------
    stack : BlockStack
        The blocks, which may be on the meta device.
    config : CompressionConfig
    window : int
        Number of blocks to remove, from the middle of the stack.
    memory : int
        Bytes of hidden states that are kept in memory instead of files.
    itemsize : float
        Bytes per weight in the checkpoint. By default those of the parameters.
    """
    data, n, d, candidates = config.data, len(stack), hidden_size_of(stack), config.search.shortlist
    calibration = data.fitting_tokens or data.calibration_tokens
    validation, test = data.validation_tokens, data.test_tokens
    model: Any = stack.model
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    itemsize = itemsize or sum(p.numel() * p.element_size() for p in parameters) / total
    work = block_work(stack)
    sizes, flops = (
        [block.parameters * itemsize for block in work],
        [block.flops(data.sequence_length) for block in work],
    )
    blocks, model_flops, head = sum(sizes), sum(flops), _untied_head(model) * itemsize
    logits = 2.0 * d * getattr(model.config.get_text_config(), "vocab_size", 0)
    end, state = (n + window) // 2, d * max(2.0, itemsize)
    after = sum(flops[end:])
    ranked, measured = (n + 1) * calibration * state, 6 * test * state
    fitted = ((2 + min(candidates, window)) * (calibration + validation) + candidates * validation) * state
    spilled = [max(0.0, states - memory) for states in (ranked, fitted, measured)]
    verified = calibration * sum(flops[:end]) + validation * (
        model_flops + candidates * after + (1 + candidates) * logits
    )
    solved = 4.0 * calibration * candidates * d**2 + 14.0 * candidates * d**3
    compared, eigen = 2.0 * calibration * (n + 1) ** 2 * d, 20.0 * candidates * d**3
    saved, scored = total * itemsize - blocks * window / n, test * (model_flops + 2 * after + 3 * logits)
    searches, passes, probes = _further_passes(config, window)
    rank, verify, measure = 1 + searches, 1 + passes * (1 + probes), 1 + min(passes, 2) * (1 + probes)
    verified_again, measured_again = validation * passes * model_flops, test * min(passes, 2) * model_flops
    stages = [
        StageWork("check", blocks, products=32 * model_flops),
        StageWork("rank", rank * blocks + spilled[0], spilled[0], ranked, rank * calibration * model_flops, compared),
        StageWork(
            "verify",
            sum(sizes[:end]) + verify * blocks + head,
            spilled[1],
            fitted,
            verified + verified_again,
            solved,
            eigen,
        ),
        StageWork("choose", (10 + probes) * blocks, products=160 * model_flops),
        StageWork("measure", measure * blocks + head, spilled[2], measured, scored + measured_again),
        StageWork("save", saved + probes * blocks, saved),
    ]
    states_in_memory = min(memory, max(ranked, fitted, measured))
    maps = candidates if isinstance(config.repair, FoldedConfig) else 0  # in float64 until one is chosen
    if config.search.zeroes_branches and config.repair.replaces_branches:
        maps = candidates + window
    return stages, round(total * itemsize - blocks - head + max(sizes) + states_in_memory + (80 + 8 * maps) * d**2)


def _further_passes(config: CompressionConfig, window: int) -> tuple[int, int, int]:
    """Return the passes of a search, those of the verification, and the readings in which a surgery is checked."""
    search, kind = config.search, config.repair
    searches = window if search.kind == "greedy" else 2 if search.zeroes_branches else 0
    probes = 2 if isinstance(kind, FoldedConfig) else 4 if isinstance(kind, ScaleConfig) else 0
    several = search.shortlist if search.number_of_windows is not None else search.max_windows(window)
    runs_after_window = search.number_of_windows == 1 and not kind.slots and not probes
    return searches, 0 if runs_after_window else search.shortlist if probes or kind.slots else several, probes


def compression_bytes(
    stack: BlockStack,
    *,
    batch: int,
    text: int,
    windows: int = 1,
    trained: int = 0,
    hardware: HardwareConfig = HardwareConfig(),
) -> dict[str, int]:
    """Return the peak memory of each stage of `compress` in bytes, in addition to the model.

    Temporary results of single operations are left out. Logits of a batch that are larger than `WHOLE_LOGIT_BYTES` are
    computed for a few tokens at a time. The comparison with the original ("evaluate"), and models whose logits depend
    on other tokens, run as many sequences at a time as have logits of this size, at least one.

    `batch` and `text` are the tokens (patches of a vision model) of the largest batch and of the training and
    validation data. `windows` is the number of windows fitted in one pass, and `trained` the number of trainable
    parameters. `hardware` determines the memory and the data type of cached states.
    """
    itemsize = next(p.element_size() for p in stack.model.parameters() if p.is_floating_point())
    width, n = hidden_size_of(stack), len(stack)
    head = getattr(stack.model, "get_output_embeddings", lambda: None)()
    vocabulary = 0 if head is None else head.weight.shape[0]  # classes and embeddings are small
    cached = 2 * text * width * (hardware.kept_dtype.itemsize if hardware.kept_dtype else itemsize)
    state, compared = batch * width * itemsize, min(batch, max(1, WHOLE_LOGIT_BYTES // (4 * max(1, vocabulary))))
    is_split = 4 * batch * vocabulary > WHOLE_LOGIT_BYTES and Task.of(stack.model).is_causal_lm
    device = next(stack.model.parameters()).device
    at_once = min(batch, tokens_within_memory(stack.model, device)) if is_split else batch
    logits, reference = at_once * vocabulary * itemsize, 4 * at_once * vocabulary
    return {
        "rank": (n + 1) * state + 16 * batch * (n + 1) ** 2,
        "fit": 4 * windows * (state + 16 * width**2),
        "verify": windows * state + 3 * logits + reference,
        "train": min(cached, hardware.state_memory) + 16 * trained + 8 * n * state + 3 * logits + reference,
        "evaluate": windows * state + 2 * compared * vocabulary * itemsize,
    }


def _expert_matrices(block: nn.Module, count: int | None) -> Iterator[Tensor]:
    for module in block.modules():
        if isinstance(module, nn.ModuleList) and 1 < len(module) == count:
            yield from (p for p in module.parameters() if p.ndim > 1)
        yield from (p for p in module.parameters(recurse=False) if p.ndim > 2 and p.shape[0] == count)


def _from_config(config: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(source, name, None) for source in (config, getattr(config, "ffn_config", None)) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _attends(block: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() or "attn" in name for name, module in block.named_modules())


def _query_features(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", 0)
    heads = max(heads) if isinstance(heads, (list, tuple)) else heads
    return heads * (getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0))


def _untied_head(model: Any) -> int:
    """Return the parameters of the LM head, or 0 if it is tied to the embeddings."""
    tied = {id(p) for p in model.get_input_embeddings().parameters()}
    own = list((model.get_output_embeddings() or nn.Module()).parameters())
    return sum(p.numel() for p in own) if any(id(p) not in tied for p in own) else 0


def measure_rates(stack: BlockStack, config: CompressionConfig, folder: Path) -> Rates:
    """Measure the rates of this machine with the first block of a model from `open_checkpoint`.

    Parameters
    ----------
    stack : BlockStack
        The blocks of the model.
    config : CompressionConfig
        Its batch size and sequence length are used.
    folder : Path
        The folder to write hidden states to.
    """
    tokens, width = config.hardware.batch_size * config.data.sequence_length, hidden_size_of(stack)

    def seconds(action: Callable[[], Any], warm_up: bool = True) -> float:
        if warm_up:
            action()
        began = time.perf_counter()
        action()
        return max(1e-9, time.perf_counter() - began)

    def read() -> None:
        with weights_in_memory(stack.blocks[0]):
            pass

    def products(dtype: torch.dtype) -> float:
        states, weight = torch.ones(tokens, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        return 2 * tokens * width**2 / seconds(lambda: states @ weight)

    square = torch.randn(min(width, 1024), min(width, 1024), dtype=torch.float64)
    return Rates(
        products(next(p.dtype for p in stack.blocks[0].parameters())),
        products(torch.float64),
        10 * len(square) ** 3 / seconds(lambda: torch.linalg.eigh(square @ square.T)),
        stored_bytes(stack.blocks[0]) / seconds(read, warm_up=False),
        write_rate(folder),
    )


def blockwise_table(stages: Sequence[StageWork], rates: Rates) -> str:
    """Return the stages and their times as a table for a terminal."""
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        flops = f"{stage.products + stage.float64 + stage.eigen:.1e}"
        rows.append(
            (
                stage.name,
                *map(format_bytes, (stage.read, stage.written, stage.states)),
                flops,
                format_duration(stage.seconds(rates)),
            )
        )
    rows.append(("total", *[""] * 4, format_duration(sum(stage.seconds(rates) for stage in stages))))
    return table(rows, ("stage", "reads", "writes", "states", "FLOPs", "time"))


@dataclass(frozen=True)
class BlockwiseEstimate:
    """Estimated work, time and memory of a compression block by block.

    Attributes
    ----------
    stages : tuple of StageWork
        Work of each stage.
    rates : Rates
        Rates of the machine.
    weights : int
        Bytes of the checkpoint.
    memory : int
        Peak memory in bytes, without the hidden states.
    """

    stages: tuple[StageWork, ...]
    rates: Rates
    weights: int
    memory: int

    @property
    def seconds(self) -> float:
        """Total time in seconds."""
        return sum(stage.seconds(self.rates) for stage in self.stages)

    def table(self) -> str:
        """Return the estimate as a table for a terminal."""
        return blockwise_table(self.stages, self.rates)

    def report(self) -> dict[str, Any]:
        """Return the estimate as JSON values, with times in seconds and memory in bytes."""
        stages = [{**stage._asdict(), "seconds": stage.seconds(self.rates)} for stage in self.stages]
        return {"seconds": self.seconds, "weights": self.weights, "memory": self.memory, "stages": stages}


def estimate_in_blocks(
    model: str, config: CompressionConfig, output: Path, memory: int, dtype: torch.dtype | None = None
) -> BlockwiseEstimate:
    """Estimate the cost of compressing the model of a folder block by block, in `memory` bytes per process.

    Rank 0 measures the rates. `dtype` is that of the weights, by default that of the checkpoint.
    """
    with distributed_step("estimate_in_blocks") as work:
        measure = partial(_measured_estimate, model, config, output, memory, dtype, work.processes.count)
        return work.broadcast_object(measure)


def _measured_estimate(
    model: str, config: CompressionConfig, output: Path, memory: int, dtype: torch.dtype | None, processes: int
) -> BlockwiseEstimate:
    opened = open_checkpoint(model, dtype=dtype)
    stack = find_stack(opened, config.stack)
    window = len(target_windows(opened, config.target, stack=stack.path, protected=frozenset()).windows[0])
    stages, resident = blockwise_work(stack, config, window)  # states are kept in the work folder
    per_process = f" for each of {processes} processes" if processes > 1 else ""
    logger.info(
        f"The weights take {checkpoint_bytes(model) / 1e9:.2f} GB, and {memory / 1e9:.2f} GB of memory are "
        f"allowed{per_process}: the model is compressed block by block, with {resident / 1e9:.2f} GB in addition to "
        "the hidden states."
    )
    rates = measure_rates(stack, config, output.parent)._replace(processes=processes)
    return BlockwiseEstimate(tuple(stages), rates, checkpoint_bytes(model), resident)


def compress_in_blocks(
    model: str,
    text: Callable[[Any], tuple[Any, list[str] | None]],
    output: Path,
    memory: int,
    config: CompressionConfig,
    *,
    overwrite: bool,
    dtype: torch.dtype | None = None,
) -> CompressionResult:
    """Log the estimated cost of compressing the model of a folder block by block, and compress it.

    `text` takes the tokenizer and returns the calibration data, and documents to test on or None. `memory` is the limit
    of each process in bytes, and `dtype` that of the weights, by default that of the checkpoint.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model)
    estimate = estimate_in_blocks(model, config, output, memory, dtype)
    folder = output.with_name(f".{output.name}.blocks")
    if current_processes().rank == 0:
        logger.info(estimate.table())
        logger.info(f"Intermediate results are kept in {folder} until the end. The same command resumes from them.")
    with distributed_step("compress_in_blocks") as work:
        texts, test_texts = text(tokenizer)
        budget = min(work.all_gather_object(state_memory_left(estimate.memory, memory)))
    return compress_checkpoint(
        model,
        texts,
        config.updated({"hardware.state_memory": budget}),
        tokenizer=tokenizer,
        output=output,
        options=RunOptions(overwrite=overwrite, test_texts=test_texts),
        blockwise=BlockwiseOptions(dtype=dtype, work_folder=folder),
    )


def blockwise_memory(
    model: str, memory: int | None, reasons: Sequence[str], dtype: torch.dtype | None = None, processes: int = 1
) -> int | None:
    """Return each process's memory limit in bytes for a compression block by block, or None to load the whole model.

    `memory` is the limit for all `processes` of this machine, by default the free memory. `reasons` are the settings
    that need the whole model in memory. `dtype` is that of the weights, by default that of the checkpoint. Raise if
    there are reasons and the model does not fit into the limit.
    """
    folder = Path(model)
    if not (folder.is_dir() and checkpoint_bytes(folder)):
        if memory is not None:
            raise StreamlineError(
                f"--memory was given, but {model!r} is not a folder with safetensors files. Expected such a folder, "
                "whose blocks are read one by one. Save the model to a folder, or leave --memory out."
            )
        return None
    allowed = (int(psutil.virtual_memory().available) if memory is None else memory) // processes
    if fits_in_memory(folder, round(allowed / dtype_growth(folder, dtype))):
        return None
    if not reasons:
        return allowed
    problem = f"these settings need the whole model in memory: {'; '.join(reasons)}"
    if memory is not None:
        raise StreamlineError(
            f"The model does not fit into --memory, and {problem}. Leave them out, or increase --memory."
        )
    logger.info(f"memory     the model may not fit into the free memory, but is loaded, because {problem}")
    return None


def checkpoint_bytes(folder: str | Path) -> int:
    """Return the total bytes of the safetensors files of a folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def dtype_growth(folder: str | Path, dtype: torch.dtype | None) -> float:
    """Return the ratio of a model's bytes in a dtype to the bytes of its stored weights."""
    if dtype is None:
        return 1.0
    stored, numbers = 0, 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                weight = opened.get_slice(name)
                count = math.prod(weight.get_shape())
                stored += count * int("".join(filter(str.isdigit, weight.get_dtype().split("_")[0])) or 8) // 8
                numbers += count
    return numbers * dtype.itemsize / stored if stored else 1.0


def processes_here(processes: Processes) -> int:
    """Return the number of processes of a distributed run on this machine, which share its memory."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(local) if local.isdigit() and processes.count > 1 else processes.count


def fits_in_memory(folder: str | Path, memory: int) -> bool:
    """Whether a folder's model and a quarter of its size for everything else fit into `memory` bytes."""
    return 1.25 * checkpoint_bytes(folder) <= memory


def state_memory_left(resident: int, memory: int) -> int:
    """Return the bytes left for hidden states under a memory limit.

    Parameters
    ----------
    resident : int
        Bytes that the process will need in addition to its present size.
    memory : int
        The limit of the process in bytes.

    Raises
    ------
    StreamlineError
        If less than 32 MB are left.
    """
    taken = int(psutil.Process().memory_info().rss) + resident
    if taken + 2**25 > memory:
        raise StreamlineError(
            f"--memory {memory / 1e9:.2f}GB is too small: the largest block, all weights outside the blocks, a "
            f"least-squares solution and Python take {taken / 1e9:.2f} GB. Expected at least "
            f"{(taken + 2**25) / 1e9:.2f}GB. Increase --memory."
        )
    return memory - taken


def write_rate(folder: str | Path, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the write rate of a folder, or of its nearest existing parent, in bytes/s."""
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.is_dir())
    content, count = os.urandom(2**20), 64
    began = clock()
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.writelines([content] * count)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StreamlineError(
            f"Cannot write to {existing}: {error.strerror}. Expected {count * 2**20:,} free bytes. Choose another "
            "folder."
        ) from error
    return count * 2**20 / max(1e-9, clock() - began)


def format_duration(seconds: float) -> str:
    """Format a time.

    Examples
    --------
    >>> format_duration(4.2), format_duration(42.0), format_duration(630.0), format_duration(9000.0)
    ('4.2 s', '42 s', '10.5 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """Format a number of bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
