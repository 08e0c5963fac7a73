"""Config for loading a pretrained model: device, dtype, quantization and revision."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from streamline_hooks.core import Config, StreamlineError

Device = Literal["auto", "cpu", "cuda", "mps"]
WeightDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoadingConfig(Config):
    """Describe how a pretrained model is loaded.

    Attributes
    ----------
    device : {"auto", "cpu", "cuda", "mps"}
        Device that the model runs on. auto, the default, selects CUDA if available, then MPS, then the CPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Data type of the weights. auto, the default, keeps the data type of the checkpoint.
    device_map : str, optional
        Placement of the model on several devices by Accelerate, instead of `device`: auto, balanced, sequential or the
        name of a device.
    trust_remote_code : bool
        Run code in the checkpoint. By default such a checkpoint is refused.
    revision : str, optional
        Branch, tag or commit of a model on the hub. By default the main branch.
    load_in : {"4bit", "8bit"}, optional
        Quantize the weights with bitsandbytes while they are loaded. By default they are not quantized.

    Raises
    ------
    StreamlineError
        If a value is invalid, or both a device and a device map are given.

    Examples
    --------
    >>> LoadingConfig(device="cpu").torch_device()
    device(type='cpu')
    >>> LoadingConfig(dtype="bfloat16").from_pretrained_options()["dtype"]
    torch.bfloat16
    """

    device: Device = "auto"
    dtype: WeightDtype = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    load_in: Literal["4bit", "8bit"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "auto" and self.device_map is not None:
            raise StreamlineError(
                f"device={self.device!r} and device_map={self.device_map!r} were both set. Expected one of them, "
                "because a device map also places the model. Omit one (--device or --device-map)."
            )

    def torch_device(self) -> torch.device:
        """Return the device of this process.

        In a distributed run ``LOCAL_RANK`` selects the CUDA device.

        Raises
        ------
        StreamlineError
            If this machine does not have the device.
        """
        available = available_devices()
        name = (
            next(kind for kind in ("cuda", "mps", "cpu") if kind in available) if self.device == "auto" else self.device
        )
        if name not in available:
            raise StreamlineError(
                f"device={name!r} is not available: PyTorch {torch.__version__} finds no such device on this machine. "
                f"Expected one of auto, {', '.join(available)}. Choose one with --device, or install a PyTorch build "
                f"for {name}."
            )
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        return torch.device(name)

    def torch_dtype(self) -> torch.dtype | None:
        """Return `dtype` as a torch.dtype; None for the dtype of the checkpoint."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def hub_options(self) -> dict[str, Any]:
        """Return the ``from_pretrained`` arguments of configs, tokenizers and models; empty by default."""
        options = {"trust_remote_code": self.trust_remote_code or None, "revision": self.revision}
        return {name: value for name, value in options.items() if value is not None}

    def from_pretrained_options(self) -> dict[str, Any]:
        """Return the ``from_pretrained`` arguments of models.

        Raises
        ------
        StreamlineError
            If `load_in` is set and bitsandbytes is not installed.
        """
        options = {**self.hub_options(), "dtype": self.torch_dtype() or "auto"}
        if self.device_map is not None:
            options["device_map"] = self.device_map
        if self.load_in is not None:
            if find_spec("bitsandbytes") is None:
                raise StreamlineError(
                    f"load_in={self.load_in!r} needs the package bitsandbytes, which is not installed. Install it: "
                    "pip install bitsandbytes"
                )
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{self.load_in}": True})
            options.setdefault("device_map", {"": str(self.torch_device())})
        return options

    def to_device(self, model: Any) -> Any:
        """Move a model to the device, unless a device map or quantization has placed it, and return it."""
        if self.device_map is not None or self.load_in is not None:
            return model
        device = self.torch_device()
        return model if device.type == "cpu" else model.to(device)


def available_devices() -> list[str]:
    """Return the types of devices that PyTorch finds on this machine, starting with the CPU.

    Examples
    --------
    >>> "cpu" in available_devices()
    True
    """
    availability = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name, is_available in availability.items() if is_available]
