"""Config of the machine-dependent settings: batch size, precision and memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from streamline_hooks.core.config import Config
from streamline_hooks.core.validation import Bound

Precision = Literal["bfloat16", "float16"]
StateDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class HardwareConfig(Config):
    """Configure batch size, precision and memory.

    Attributes
    ----------
    batch_size : int
        Sequences per forward pass and per training step. The default of 4 suits a CPU. A larger value uses a GPU
        better, needs more memory, and takes fewer steps on the same text. Batches passed by the caller keep their size.
    autocast : {"bfloat16", "float16"}, optional
        Data type of matrix products in training and in the teacher's forward pass, set by `torch.autocast`. Weights
        keep their data type. With None (default), the data type of the weights is used. float16 is refused for
        training, because small gradients become 0.
    state_memory : int
        Memory in bytes for cached hidden states: the teacher's states on the calibration text, as much again for the
        validation text, and the states of a model that is run block by block. States beyond it are written to temporary
        files. Default: 2 GiB.
    state_dtype : {"float32", "bfloat16", "float16"}, optional
        Data type of the cached hidden states. With None (default), they keep their data type; a narrower type rounds
        them.

    Raises
    ------
    StreamlineError
        If a value is invalid.

    Examples
    --------
    >>> HardwareConfig(autocast="bfloat16").autocast_dtype
    torch.bfloat16
    """

    bounds: ClassVar[Mapping[str, Bound]] = {"batch_size": 1, "state_memory": 0}

    batch_size: int = 4
    autocast: Precision | None = None
    state_memory: int = 2**31
    state_dtype: StateDtype | None = None

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """`autocast` as a torch.dtype."""
        return None if self.autocast is None else getattr(torch, self.autocast)

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """`state_dtype` as a torch.dtype."""
        return None if self.state_dtype is None else getattr(torch, self.state_dtype)

    def autocast_on(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the `torch.autocast` context of a device, or a null context if autocast is off."""
        return nullcontext() if self.autocast_dtype is None else torch.autocast(device.type, self.autocast_dtype)
