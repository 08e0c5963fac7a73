"""Estimate the time and memory of a compression from the shape of a model and the rates of a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from streamline_hooks.core import Bound, Config, StreamlineError
from streamline_hooks.modeling import BlockStack, Task, find_stack
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.cost import (
    Rates,
    StageWork,
    block_work,
    blockwise_table,
    blockwise_work,
    compression_bytes,
    format_bytes,
)
from streamline_hooks.selection import protected_blocks, target_windows

_FLOAT64 = 15  # slowdown of float64 on data-center GPUs (H100: 989 and 67 TFLOP/s)
_BACKWARD = 2  # FLOPs of a backward pass, relative to a forward pass


@dataclass(frozen=True)
class ModelShape(Config):
    """Shape of a decoder with gated MLPs, such as Llama, or that of a Transformers config.

    Attributes
    ----------
    hidden_size : int
        Features of the hidden state. 4,096 by default, as in Llama-3-8B.
    layers : int
        Number of blocks. 32 by default.
    intermediate_size : int, optional
        Intermediate features of the MLP. By default 3.5 times the hidden size.
    heads : int, optional
        Number of attention heads. By default one per 128 features.
    kv_heads : int, optional
        Number of key and value heads. By default the number of attention heads.
    vocab_size : int
        Size of the vocabulary. 128,256 by default.
    weight_dtype : {"float32", "bfloat16", "float16", "4bit"}
        Data type of the weights. bfloat16 by default. With ``"4bit"`` the matrices of the blocks are quantized by
        bitsandbytes, and all other weights and the hidden states are in bfloat16.
    architecture : str, optional
        Folder with a ``config.json``, or name on the hub, of a causal language model. Its blocks are built without
        weights, and the other fields except `weight_dtype` keep their defaults.

    Examples
    --------
    >>> shape = ModelShape(hidden_size=64, layers=4, vocab_size=100)
    >>> len(shape.stack()), shape.stack().blocks[0].mlp.up_proj.weight.device
    (4, device(type='meta'))
    """

    bounds: ClassVar[Mapping[str, Bound]] = {
        "hidden_size": 8, "layers": 2, "intermediate_size": 1, "heads": 1, "kv_heads": 1, "vocab_size": 1,
    }  # fmt: skip

    hidden_size: int = 4096
    layers: int = 32
    intermediate_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocab_size: int = 128_256
    weight_dtype: Literal["float32", "bfloat16", "float16", "4bit"] = "bfloat16"
    architecture: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = [name for name in self.bounds if getattr(self, name) != getattr(type(self), name)]
        if self.architecture is not None and unused:
            raise StreamlineError(
                f"ModelShape: {' and '.join(unused)} was given with architecture={self.architecture!r}, whose config "
                "determines the shape. Expected one of them. Leave the other out."
            )

    @property
    def state_dtype(self) -> str:
        """Data type of the hidden states."""
        return "bfloat16" if self.weight_dtype == "4bit" else self.weight_dtype

    def weight_bytes(self, stack: BlockStack) -> int:
        """Return the bytes of the weights; those of 4 bit have a scale in float32 for each 64."""
        total = sum(p.numel() * p.element_size() for p in stack.model.parameters())
        if self.weight_dtype != "4bit":
            return total
        matrices = [p for block in stack.blocks for p in block.parameters() if p.ndim > 1]
        return total - sum(p.numel() * p.element_size() - p.numel() // 2 - p.numel() // 16 for p in matrices)

    def stack(self) -> BlockStack:
        """Build the blocks on the meta device, where weights take no memory.

        Raises
        ------
        StreamlineError
            If `heads` does not divide the hidden size, `kv_heads` does not divide `heads`, or `architecture` has no
            config of a causal language model.
        """
        from transformers import AutoModelForCausalLM, LlamaConfig

        if self.architecture is not None:
            return find_stack(_without_weights(self.architecture, getattr(torch, self.state_dtype)))
        heads = self.heads or max(1, self.hidden_size // 128)
        kv_heads = self.kv_heads or heads
        if self.hidden_size % heads or heads % kv_heads:
            raise StreamlineError(
                f"ModelShape: hidden_size={self.hidden_size}, heads={heads} and kv_heads={kv_heads} do not match. "
                "Expected heads to divide hidden_size, and kv_heads to divide heads. Change one of them."
            )
        config = LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or round(3.5 * self.hidden_size),
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=self.vocab_size,
        )
        with torch.device("meta"):
            return find_stack(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.state_dtype)))


def _without_weights(name: str, dtype: torch.dtype) -> nn.Module:
    """Build the model of a Transformers config on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(name).expanduser()
    folder = folder.parent if folder.name == "config.json" else folder
    try:
        config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name)
        with torch.device("meta"):
            return cast("nn.Module", AutoModelForCausalLM.from_config(config, dtype=dtype))
    except (OSError, ValueError) as error:
        raise StreamlineError(
            f"ModelShape: architecture={name!r} cannot be built: {' '.join(str(error).split())[:200]} Expected a "
            "folder with config.json, or a name on the hub, of a causal language model. Correct it, or pass "
            "hidden_size and layers."
        ) from error


@dataclass(frozen=True)
class DeviceRates(Config):
    """Rates at which a device computes, reads and writes.

    Attributes
    ----------
    flops : float
        Floating-point operations per second in the data type of the weights. 1e14 by default, a third of the peak of an
        A100.
    bandwidth : float
        Bytes per second for reading and writing weights and hidden states. 2e12 by default, the memory bandwidth of an
        A100. Use the rate of the disk for a model that is read block by block.
    flops_float64 : float, optional
        Floating-point operations per second in float64, the precision of statistics. By default a 15th of `flops`.

    Examples
    --------
    >>> DeviceRates(flops=1.5e13).rates().float64
    1000000000000.0
    """

    bounds: ClassVar[Mapping[str, Bound]] = {
        "flops": "(0, inf)", "bandwidth": "(0, inf)", "flops_float64": "(0, inf)",
    }  # fmt: skip

    flops: float = 1e14
    bandwidth: float = 2e12
    flops_float64: float | None = None

    def rates(self) -> Rates:
        """Return the rates of all kinds of work; eigendecompositions run at a hundredth of the float64 rate."""
        float64 = self.flops_float64 or self.flops / _FLOAT64
        return Rates(self.flops, float64, float64 / 100, self.bandwidth, self.bandwidth)


@dataclass(frozen=True)
class ShapeEstimate:
    """Estimated work, time and memory of a compression of a model of a given shape.

    Attributes
    ----------
    stages : tuple of StageWork
        Work of each stage.
    rates : Rates
        Rates of the device.
    weights : int
        Bytes of the model's weights.
    peak : int
        Peak memory in bytes in addition to the weights.
    shape : str
        Description of the model.

    Examples
    --------
    >>> from streamline_hooks.pipeline import ModelShape, estimate_from_shape
    >>> estimate = estimate_from_shape(ModelShape(hidden_size=64, layers=4, vocab_size=100))
    >>> [stage.name for stage in estimate.stages]
    ['check', 'rank', 'verify', 'choose', 'measure', 'save']
    """

    stages: tuple[StageWork, ...]
    rates: Rates
    weights: int
    peak: int
    shape: str

    @property
    def seconds(self) -> float:
        """Total time in seconds."""
        return sum(stage.seconds(self.rates) for stage in self.stages)

    def table(self) -> str:
        """Return the estimate as a table for a terminal."""
        memory = f"memory: {format_bytes(self.weights)} for the weights and {format_bytes(self.peak)} in addition"
        device = f"{self.rates.products:.3g} FLOP/s and {format_bytes(int(self.rates.read))} per second"
        return f"model: {self.shape}\ndevice: {device}\n{blockwise_table(self.stages, self.rates)}\n{memory}"

    def report(self) -> dict[str, Any]:
        """Return the estimate as JSON values, with times in seconds and memory in bytes."""
        stages = [{**stage._asdict(), "seconds": stage.seconds(self.rates)} for stage in self.stages]
        return {
            "seconds": self.seconds,
            "weights": self.weights,
            "peak": self.peak,
            "shape": self.shape,
            "stages": stages,
        }


def estimate_from_shape(
    shape: ModelShape, rates: DeviceRates | None = None, config: CompressionConfig | None = None
) -> ShapeEstimate:
    """Estimate the cost of compressing a model in memory from its shape and the rates of a device.

    The estimate does not include the generation and the measurement of speed of `EvaluationConfig`, and the bounds of
    ``at_most``.

    Parameters
    ----------
    shape : ModelShape
        The shape of the model.
    rates : DeviceRates, optional
        The rates of the device. By default ``DeviceRates()``.
    config : CompressionConfig, optional
        By default ``CompressionConfig()``. If it has a distillation, the estimate includes training.

    Returns
    -------
    ShapeEstimate

    Raises
    ------
    StreamlineError
        If the shape is invalid, or the target or another field of the config needs a model or measured times.

    Examples
    --------
    >>> small, large = (estimate_from_shape(ModelShape(64, layers, vocab_size=100)) for layers in (4, 8))
    >>> large.seconds > small.seconds and large.weights > small.weights
    True
    """
    config = config or CompressionConfig()
    _require_no_model(config, shape)
    stack, search = shape.stack(), config.search
    protected = protected_blocks(search.protect, len(stack))
    windows = target_windows(
        stack.model,
        config.target,
        stack=stack.path,
        protected=protected,
        replacement_module=partial(config.repair.make, stack),
        slots=search.slots(config.repair),
    ).windows
    window = windows[len(windows) // 2]
    unlimited = 2**62
    parameters = sum(p.numel() for p in stack.model.parameters())
    itemsize = shape.weight_bytes(stack) / parameters
    stages, _ = blockwise_work(stack, config, len(window), memory=unlimited, itemsize=itemsize)
    trained = 0
    if config.distillation is not None:
        stages.insert(-2, _training(stack, config, len(window)))
        trained = _trained_parameters(stack, config, window)
    data, hardware = config.data, config.hardware
    peaks = compression_bytes(
        stack,
        batch=hardware.batch_size * data.sequence_length,
        text=data.calibration_tokens + data.validation_tokens,
        windows=search.shortlist,
        trained=trained,
        hardware=hardware,
    )
    if config.distillation is None:
        del peaks["train"]
    rated = (rates or DeviceRates()).rates()
    described = f"{type(stack.model).__name__} with {len(stack)} blocks, {parameters / 1e9:.3g} B parameters"
    model: Any = stack.model
    described += f", {model.config.get_text_config().hidden_size:,} features"
    described += f" and a vocabulary of {model.get_input_embeddings().num_embeddings:,}"
    return ShapeEstimate(
        tuple(stages), rated, shape.weight_bytes(stack), max(peaks.values()), f"{described}, in {shape.weight_dtype}"
    )


def _require_no_model(config: CompressionConfig, shape: ModelShape) -> None:
    """Raise if a field of the config needs a model, or times that are measured on one."""
    if not (config.target.counts_blocks or config.target.unit == "parameters"):
        raise StreamlineError(
            f"estimate_from_shape: the target {config.target} must be measured on a model. Expected a number or a "
            "fraction of the blocks or parameters. Change remove, or estimate with a model (estimate_cost)."
        )
    training, autocast = config.distillation, config.hardware.autocast
    needs_model = {
        f"stack={config.stack!r}": config.stack is not None,
        f"task={config.task}": config.task not in (None, Task("causal-lm")),
        f"rounds={config.rounds}": config.rounds > 1,
        f"train_until={config.train_until}": config.train_until is not None,
        "distillation.max_minutes": training is not None and training.max_minutes is not None,
        f"hardware.autocast={autocast!r}": autocast not in (None, shape.state_dtype),
    }
    if refused := [name for name, is_set in needs_model.items() if is_set]:
        raise StreamlineError(
            f"estimate_from_shape: {' and '.join(refused)} cannot be estimated from a shape and the rates of a device. "
            "Expected the defaults. Leave it out, or estimate with a model (estimate_cost)."
        )


def _trained_parameters(stack: BlockStack, config: CompressionConfig, window: range) -> int:
    """Return the number of parameters of the replacement and of the healed blocks and LM head."""
    count, healing = config.repair.size(stack, window).parameters, config.healing
    if healing is None:
        return count
    for k in healing.blocks(len(stack), [window]):
        matrices = [p for p in stack.blocks[k].parameters() if p.ndim > 1]
        if healing.method == "lora":
            count += sum(healing.rank * sum(matrix.shape) for matrix in matrices)
        else:
            count += sum(p.numel() for p in stack.blocks[k].parameters())
    head = stack.model.get_output_embeddings()  # type: ignore[operator]
    return count + (head.weight.numel() if healing.head else 0)


def _training(stack: BlockStack, config: CompressionConfig, window: int) -> StageWork:
    """Return the work of training: a teacher pass, and forward and backward passes from the first changed block on."""
    assert config.distillation is not None
    flops = [work.flops(config.data.sequence_length) for work in block_work(stack)]
    end = (len(flops) + window) // 2
    removed = range(end - window, end)
    healed = config.healing.blocks(len(flops), [removed]) if config.healing is not None else []
    start = min([end, *healed])
    after = sum(flop for k, flop in enumerate(flops) if k >= start and k not in removed)
    head = stack.model.get_output_embeddings()  # type: ignore[operator]
    logits = 2.0 * head.weight.numel()
    tokens, epochs = config.data.calibration_tokens, config.distillation.epochs
    teacher = tokens * (sum(flops) + logits)
    student = tokens * epochs * (1 + _BACKWARD) * (after + logits)
    validated = config.distillation.validations * config.data.validation_tokens * (after + logits)
    return StageWork("train", products=teacher + student + validated)
