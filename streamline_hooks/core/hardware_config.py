"""Config of what depends on the machine: batch size, precision and memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from streamline_hooks.core.config import Bound, Config

Precision = Literal["bfloat16", "float16"]
StateDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class HardwareConfig(Config):
    """Describe how the machine is used.

    Attributes
    ----------
    batch_size : int
        Sequences that are run at a time, and that a step of a training uses; default 4, which suits a CPU. A larger
        one uses a GPU better, takes more memory, and makes fewer steps on the same text. Batches that are given have
        their own size.
    autocast : {"bfloat16", "float16"}, optional
        Data type of the matrix products of a training run, under `torch.autocast`; the teacher's forward pass on the
        calibration text uses it too. Weights keep their own data type and stay in memory in both. None, the default,
        computes in the data type of the weights. Set ``"bfloat16"`` on hardware that multiplies it faster.
    state_memory : int
        Bytes of memory for hidden states that are kept: of the teacher on the calibration text, as many again on the
        validation text, and of a model that is run block by block. What exceeds it is kept in temporary files. The
        default is 2 GiB, which fits most machines.
    state_dtype : {"float32", "bfloat16", "float16"}, optional
        Data type in which those hidden states are kept. A narrower one halves their size and rounds them. None, the
        default, keeps them as they are.

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
        """Return the context in which matrix products are computed on a device."""
        return nullcontext() if self.autocast_dtype is None else torch.autocast(device.type, self.autocast_dtype)
