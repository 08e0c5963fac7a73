"""What the command compress does with a model that does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.pipeline.config import CompressionConfig


def takes_more_than(model: str, memory: str) -> int | None:
    """Bytes of memory to run a folder's model in block by block; None where it fits, or is no folder of safetensors.

    Parameters
    ----------
    model : str
    memory : str
        What was allowed, such as ``2GB``; empty for what the machine has.

    Raises
    ------
    StreamlineError
        If the memory is no size, or was given for what is no folder.
    """
    from streamline_hooks.cli.short_forms import parse_bytes
    from streamline_hooks.pipeline.blockwise_cost import checkpoint_bytes, fits_in_memory

    folder = Path(model)
    allowed = parse_bytes(memory) if memory else None
    if not (folder.is_dir() and checkpoint_bytes(folder)):
        if allowed is not None:
            raise StreamlineError(
                f"--memory is for a folder with safetensors files, which are read block by block; {model!r} is none. "
                "Save the model to a folder, or leave --memory out."
            )
        return None
    if allowed is None:
        import psutil  # Accelerate depends on it

        allowed = int(psutil.virtual_memory().available)
    return None if fits_in_memory(folder, allowed) else allowed


def only_whole(required: bool, say: Callable[[str], None], **given: Any) -> bool:
    """Whether something was asked for that is only done with the whole model in memory.

    Parameters
    ----------
    required : bool
        Whether the memory is what was allowed, and not what is free now, which may do.
    say : callable
    **given : Any
        By the option's name, what was asked for; False, None or empty where it was not.

    Raises
    ------
    StreamlineError
        If so, and the memory is required.
    """
    asked = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if not asked:
        return False
    what = f"{' and '.join(asked)} is not done block by block"
    if required:
        raise StreamlineError(
            f"The model does not fit into the memory that is allowed, and {what}. Leave it out, or allow more --memory."
        )
    say(f"memory     the model may not fit into what is free; {what}, so that it is loaded all the same")
    return True


def compress_block_by_block(
    model: str,
    text: Callable[[Any], tuple[Any, list[str] | None]],
    output: Path,
    memory: int,
    config: CompressionConfig,
    *,
    overwrite: bool,
    dry_run: bool,
    say: Callable[[str], None],
) -> Any:
    """Say what it will cost, and do it unless that was all that was asked for; the result, or None.

    `text` gives what is calibrated on, and documents to test on or None, for a tokenizer.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from streamline_hooks.blockwise import compress_checkpoint, open_checkpoint
    from streamline_hooks.pipeline.blockwise_cost import blockwise_table, checkpoint_bytes, measure_rates, state_budget
    from streamline_hooks.pipeline.flops import blockwise_work
    from streamline_hooks.selection import windows_for
    from streamline_hooks.stack import find_stack

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model)
    opened = open_checkpoint(model)
    stack = find_stack(opened, config.stack)
    size = len(windows_for(opened, config.target, stack=stack.path, protected=frozenset())[0])
    stages, resident = blockwise_work(stack, config, size)  # states are kept in the work folder
    budget = state_budget(resident, memory)
    say(
        f"The weights take {checkpoint_bytes(model) / 1e9:.2f} GB, and {memory / 1e9:.2f} GB of memory are allowed: "
        f"block by block, with {resident / 1e9:.2f} GB beside the states."
    )
    say(blockwise_table(stages, measure_rates(stack, config, output.parent)))
    del opened, stack
    if dry_run:
        return None
    work = output.with_name(f".{output.name}.blocks")
    say(f"What is done is kept in {work} until the end; the same command goes on from there.")
    texts, test_texts = text(tokenizer)
    config = replace(config, hardware=replace(config.hardware, state_memory=budget))
    return compress_checkpoint(
        model,
        tokenizer,
        texts,
        output,
        config,
        test_texts=test_texts,
        overwrite=overwrite,
        work_folder=work,
        say=say,
    )
