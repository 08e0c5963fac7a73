"""The magnitude of weights, to which learning rates are proportional; see `DistillationConfig.scale_parameter`."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import StreamlineError, weights_in_memory
from streamline_hooks.surgery import AFTER, BEFORE, spliced

_REFERENCE_RMS = 0.2  # of the weights of SmolLM2-135M, for which the default learning rates were chosen
_MIN_RMS = 1e-3  # of matrices that are 0; as in Adafactor


def relative_rms(weight: Tensor) -> float:
    """Return the root mean square of a weight, at least 0.001, divided by 0.2."""
    square = weight.detach().float().square().mean()  # float64 is slow or missing on some devices
    square = getattr(square, "full_tensor", lambda: square)()  # of a weight sharded by FSDP2
    return max(float(square.sqrt()), _MIN_RMS) / _REFERENCE_RMS


def relative_rms_of_block(block: nn.Module) -> float:
    """Return the median of `relative_rms` over the own matrices of a block, which may be quantized or offloaded.

    Raises
    ------
    StreamlineError
        If the block has no matrix whose values can be read.
    """
    with weights_in_memory(block):
        added = {id(part) for module in _added_modules(block) for part in module.modules()}
        layers = [layer for layer in block.modules() if id(layer) not in added]
        magnitudes = [relative_rms(matrix) for layer in layers for matrix in _matrices_of(layer)]
        if not magnitudes:
            raise StreamlineError(
                f"{type(block).__name__} has no matrix of floating-point, 8-bit or 4-bit numbers, to whose "
                "magnitude the learning rates of new modules could be proportional. Expected such weights. Set "
                "scale_parameter=False, and choose learning_rate for the model."
            )
        return median(magnitudes)


def _added_modules(block: nn.Module) -> list[nn.Module]:
    """Return the adapters in a block, and the modules that earlier surgery inserted next to it."""
    adapters = [
        getattr(layer, name)
        for layer in block.modules()
        for name in getattr(layer, "adapter_layer_names", ())  # of PEFT
    ]
    return [*(a for a in adapters if isinstance(a, nn.Module)), *spliced(block, BEFORE), *spliced(block, AFTER)]


def _matrices_of(layer: nn.Module) -> Iterator[Tensor]:
    """Yield the own matrices of a layer, dequantized one at a time."""
    for parameter in layer.parameters(recurse=False):
        weight: Any = parameter
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            from bitsandbytes import functional

            if type(weight).__name__ == "Params4bit":
                yield functional.dequantize_4bit(weight.data, weight.quant_state)
            else:
                state: Any = layer.state  # takes the scales of the weight in the first forward pass
                scale = state.SCB if weight.SCB is None else weight.SCB
                yield functional.int8_vectorwise_dequant(weight.data, scale)
        elif weight.ndim > 1 and weight.is_floating_point():
            is_quantized = type(weight).__module__.startswith("torchao")
            yield weight.dequantize() if is_quantized else weight
