"""Join the process group of a launcher such as torchrun."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from streamline_hooks.core.errors import StreamlineError

_TIMEOUT = timedelta(hours=1)  # a rank may wait while another rank saves
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def process_group() -> Iterator[bool]:
    """Join the process group that torchrun's environment variables describe.

    Does nothing with one process, or if the process group is already initialized.

    Yields
    ------
    bool
        Whether this process is rank 0, which reports.

    Raises
    ------
    StreamlineError
        If an environment variable is missing, or the other processes cannot be reached.

    Examples
    --------
    >>> with process_group() as is_first:
    ...     print(is_first)
    True
    """
    import torch.distributed as distributed

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not distributed.is_available():
        yield True
        return
    if distributed.is_initialized():
        yield distributed.get_rank() == 0
        return
    missing = [name for name in _REQUIRED if name not in os.environ]
    if missing:
        raise StreamlineError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} announces several processes, but {' and '.join(missing)} "
            "is not set. Start the processes with torchrun --nproc-per-node=2 --no-python streamline-hooks compress "
            "..., or unset WORLD_SIZE."
        )
    _join()
    try:
        yield distributed.get_rank() == 0
        distributed.barrier()
    finally:
        # Destroying the group before Gloo's thread has returned its last work would deadlock with this thread.
        time.sleep(0.2)
        with suppress(RuntimeError):
            distributed.destroy_process_group()


def _join() -> None:
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise StreamlineError(
            f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot connect to the others "
            f"({str(error).strip().splitlines()[0]}). Start them with torchrun, or unset WORLD_SIZE."
        ) from error
