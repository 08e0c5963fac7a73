"""Several processes that a launcher such as torchrun has started with one command line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from streamline_hooks.errors import StreamlineError

_LONGEST = timedelta(hours=1)  # that one waits for another, which may be saving
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def launched() -> Iterator[bool]:
    """Let the processes that a launcher has started work together, if there are several.

    Yields
    ------
    bool
        Whether this is the one that speaks.

    Raises
    ------
    StreamlineError
        If the environment says that there are several, and not how they find one another.
    """
    import torch.distributed as distributed

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not distributed.is_available():
        yield True
        return
    if distributed.is_initialized():
        yield distributed.get_rank() == 0
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise StreamlineError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that several processes were started, but "
            f"{' and '.join(missing)} not how they find one another. Start them by torchrun --nproc-per-node=2 "
            "--no-python streamline-hooks compress ..., or unset WORLD_SIZE."
        )
    _join()
    try:
        yield distributed.get_rank() == 0
        distributed.barrier()
    finally:
        # Gloo's last work is given back by a thread of its own. Destroyed before that, it would wait for this one,
        # which waits for it.
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
        torch.distributed.init_process_group(backend, timeout=_LONGEST)
    except (RuntimeError, ValueError) as error:
        raise StreamlineError(
            f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} does not find the others "
            f"({str(error).strip().splitlines()[0]}). Start them by torchrun, or unset WORLD_SIZE."
        ) from error
