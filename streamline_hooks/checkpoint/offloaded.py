"""Open a checkpoint as a model whose blocks stay on disk, and store hidden states."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from streamline_hooks.checkpoint.load import load
from streamline_hooks.checkpoint.safety import check_folder
from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    offload_hooks,
    read_json,
    write_file,
    write_json,
)
from streamline_hooks.modeling import BlockStack, find_stack, inference, saved_weights
from streamline_hooks.recording import HiddenStateRecorder
from streamline_hooks.statistics import model_identity
from streamline_hooks.surgery import MODEL_TYPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_checkpoint(
    folder: str | Path, *, dtype: torch.dtype | None = None, offload_folder: str | Path | None = None
) -> PreTrainedModel:
    """Open a causal language model without reading its blocks.

    The weights outside the blocks, such as embeddings and norms, are in memory. The blocks, and an LM head that shares
    no weight with the embeddings, are on the meta device. Accelerate reads them from the safetensors files when they
    run, and `weights_in_memory` keeps a block in memory for several forwards.

    Parameters
    ----------
    folder : str or Path
        A Transformers checkpoint in safetensors, in one or several files.
    dtype : torch.dtype, optional
        Data type of the weights. By default that of the checkpoint.
    offload_folder : str or Path, optional
        Folder in which Transformers writes weights whose layout in the checkpoint differs from that in the model, as in
        most mixtures of experts. It must exist as long as the model does, and takes as much disk space as these
        weights.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode, on the CPU.

    Raises
    ------
    StreamlineError
        If the folder does not contain a complete checkpoint of a causal language model. The text names the file and the
        key.
    UnsupportedSurgery
        If the checkpoint cannot be run block by block.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks.testing import tiny_model
    >>> folder = tempfile.mkdtemp()
    >>> tiny_model("llama").save_pretrained(folder)
    >>> model = open_checkpoint(folder)
    >>> model.model.embed_tokens.weight.device.type, model.model.layers[3].mlp.up_proj.weight.device.type
    ('cpu', 'meta')
    """
    where = Path(folder)
    stack = _meta_stack(where)
    precision = "auto" if dtype is None else dtype
    try:
        model = load(where, device_map=_device_map(stack), dtype=precision, offload_folder=offload_folder)
    except ValueError as error:
        if offload_folder is not None or "offload_folder" not in str(error):
            raise
        raise UnsupportedSurgery(
            f"{where} contains weights in another layout than a {type(stack.model).__name__} has, so that they cannot "
            "be read directly from its files. Pass a folder with enough free space for them: offload_folder=."
        ) from error
    if type(model) is not type(stack.model):
        raise UnsupportedSurgery(
            f"{where} contains a {type(model).__name__}. Expected a {type(stack.model).__name__}, the causal language "
            "model of its configuration, to run it block by block. Load it into memory."
        )
    if on_meta := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise UnsupportedSurgery(
            f"The buffer {on_meta[0]} of {type(model).__name__} is not in memory after loading, and would not be "
            "loaded with its block. Load the model into memory."
        )
    return model


def _meta_stack(folder: Path) -> BlockStack:
    """Return the stack of the model that a checkpoint's configuration describes, without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if check_folder(folder).get("model_type") == MODEL_TYPE:
        raise UnsupportedSurgery(
            f"{folder} contains a model with spliced modules, which cannot be run block by block. Open the checkpoint "
            "of its original, or load it into memory with streamline_hooks.load."
        )
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedSurgery(
            f"{folder} contains a {config.model_type}, whose decoder blocks need the output of its encoder. Expected a "
            "model with a decoder only, to run it block by block. Load it into memory."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedSurgery(
            f"{folder} contains quantized weights, which cannot be read block by block. Open a checkpoint in float32, "
            "float16 or bfloat16."
        )
    try:
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise StreamlineError(
            f"{folder} contains a {config.model_type}, for which Transformers has no causal language model. Open the "
            "checkpoint of a causal language model."
        ) from error
    model.tie_weights()
    return find_stack(model)


def _device_map(stack: BlockStack) -> dict[str, str]:
    """Map every block and an untied LM head to the disk, everything else to the CPU."""
    head, placed = _untied_head(stack.model), {}
    names = ["", *accumulate(stack.path.split(".")[:-1], "{}.{}".format)]
    for name, module in zip(names, stack.ancestors, strict=True):
        prefix = f"{name}." if name else ""
        for child, inside in module.named_children():
            path = prefix + child
            if inside is head:
                placed[path] = "disk"
            elif path not in names and path != stack.path:
                placed[path] = "cpu"
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        placed |= {prefix + tensor: "cpu" for tensor, _ in own}
    return placed | {f"{stack.path}.{name}": "disk" for name in sorted(dict(stack.container.named_children()))}


def _untied_head(model: Any) -> nn.Module | None:
    """Return the LM head if it shares no weight with another module."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return None
    parameter_ids = {id(parameter) for parameter in head.parameters()}
    uses = sum(id(parameter) in parameter_ids for _, parameter in model.named_parameters(remove_duplicate=False))
    return head if uses == len(parameter_ids) else None


def stored_bytes(block: nn.Module) -> int:
    """Return the stored bytes of a block's weights that are on disk; 0 if they are in memory."""
    return sum(
        parameter.numel() * _itemsize(hook.weights_map, name, parameter)
        for module, hook in offload_hooks(block)
        for name, parameter in module.named_parameters(recurse=hook.place_submodules)
    )


def offloaded_identity(stack: BlockStack) -> dict[str, Any]:
    """Return the `model_identity` of a model with blocks on disk; it equals that of the model in memory.

    Up to 16 values of each parameter are read from the memory-mapped file. All values of a parameter are read if its
    dtype is converted or a surgery has changed it.
    """
    return model_identity(stack, offloaded_weights(stack))


def offloaded_weights(stack: BlockStack) -> Iterator[tuple[str, Any]]:
    """Yield the parameters and saved buffers of a model by name; values on disk are memory-mapped."""
    hooks = {id(module): hook for module, hook in offload_hooks(stack.model)}
    for name, tensor in saved_weights(stack.model):
        path, _, own = name.rpartition(".")
        hook = hooks.get(id(stack.model.get_submodule(path)))
        yield name, tensor if hook is None or not tensor.is_meta else hook.weights_map[own]


def _itemsize(weights: Any, name: str, parameter: Tensor) -> int:
    """Return the bytes of a number in the file, which may be fewer than in memory."""
    index = getattr(getattr(weights, "dataset", None), "index", {})
    where = index.get(f"{getattr(weights, 'prefix', '')}{name}", {})
    if where.get("safetensors_file") is None:
        return parameter.element_size()
    with safe_open(where["safetensors_file"], framework="pt") as opened:
        stored = opened.get_slice(where["weight_name"]).get_dtype()
    bits = int("".join(c for c in stored.split("_")[0] if c.isdigit()) or 8)  # F32, BF16, F8_E4M3, BOOL
    return max(1, bits // 8)


PASS_FILE = "pass.json"
_FORMAT = 1
_PASS_FILES = ("place_*", "sums_*.safetensors", "reference.safetensors")


class StateStore:
    """Keep the hidden states of each batch at each boundary until they are dropped.

    Up to `memory` bytes stay in memory, and the rest is written to a temporary folder. With a `folder` all states are
    written to it, so that another process can continue. A file has the states of one batch at one boundary.
    """

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        self._memory, self._folder = memory, folder
        self._states: dict[tuple[int, int], Tensor] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Drop all states that are not in the folder."""
        self._states.clear()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def keep(self, boundary: int, batch: int, state: Tensor) -> None:
        """Keep a hidden state, of shape (batch, tokens, features)."""
        if self._folder is None and state.nbytes + self.in_memory <= self._memory:
            self._states[boundary, batch] = state.detach().to("cpu", copy=True)
            return
        content, about = {"states": state.detach().cpu()}, {"place": boundary, "batch": batch}
        write_file(self._file(boundary, batch), content, about, sync=self._folder is not None)

    def read(self, boundary: int, batch: int) -> Tensor:
        """Return a hidden state. Do not change it. Raise if its file is missing or damaged."""
        if (boundary, batch) in self._states:
            return self._states[boundary, batch]
        file = self._file(boundary, batch)
        try:
            with safe_open(file, framework="pt") as opened:
                states: Tensor = opened.get_tensor("states")
                return states
        except Exception as error:  # SafetensorError or OSError
            raise StreamlineError(
                f"{file} cannot be read: {error}. Delete {file.parent.parent} and start the run again."
            ) from error

    def drop(self, boundary: int) -> None:
        """Drop the hidden states at a boundary."""
        for key in [key for key in self._states if key[0] == boundary]:
            del self._states[key]
        if self._folder is not None or self._temporary is not None:
            shutil.rmtree(self._file(boundary, 0).parent, ignore_errors=True)

    @property
    def in_memory(self) -> int:
        """The bytes of the hidden states in memory."""
        return sum(state.nbytes for state in self._states.values())

    def _file(self, boundary: int, batch: int) -> Path:
        folder = self._folder
        if folder is None:
            self._temporary = self._temporary or tempfile.TemporaryDirectory(suffix=".states")
            folder = Path(self._temporary.name)
        return folder / f"place_{boundary:04d}" / f"batch_{batch:06d}.safetensors"


class PassJournal:
    """Record in a file which boundary all batches of a pass have reached.

    `run` has the JSON values that identify the pass, and `boundary` is None before the first boundary. Raise if the
    folder belongs to another pass, or contains other files.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._file = folder / PASS_FILE
        self._run: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, **run}))
        self.boundary: int | None = None
        if self._file.is_file():
            self._continue()
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StreamlineError(
                f"{folder} is not empty and contains no {PASS_FILE}, so it was not created by an interrupted run. "
                "Choose an empty folder."
            )
        else:
            write_json(self._file, {"run": self._run, "place": None})

    def advance(self, boundary: int) -> None:
        """Record that all hidden states at a boundary are kept."""
        write_json(self._file, {"run": self._run, "place": boundary})
        self.boundary = boundary

    def clear(self) -> None:
        """Delete the files of the pass, and the folder if it is empty afterwards."""
        for pattern in _PASS_FILES:
            for path in self._file.parent.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        self._file.unlink(missing_ok=True)
        if not any(self._file.parent.iterdir()):
            self._file.parent.rmdir()

    def _continue(self) -> None:
        content = read_json(self._file)
        before, boundary = content.get("run"), content.get("place")
        if not isinstance(before, dict) or not (boundary is None or isinstance(boundary, int)):
            raise StreamlineError(f"{self._file} is damaged. Delete {self._file.parent} and start the run again.")
        differ = [
            f"{name} was {before.get(name, 'absent')} and is {self._run.get(name, 'absent')}"
            for name in {**before, **self._run}
            if before.get(name) != self._run.get(name)
        ]
        if differ:
            raise StreamlineError(
                f"{self._file.parent} contains the states of another pass: {'; '.join(differ)}. Choose another folder, "
                "or delete it."
            )
        self.boundary = boundary


def state_bytes(stack: BlockStack, batches: Sequence[Batch | Tensor]) -> list[int]:
    """Return the bytes of the hidden states of each batch at one boundary."""
    record = HiddenStateRecorder(stack.model, [0], sites=["block.input"], stop=True, stack=stack.path)
    first = batches[0]
    with inference(stack.model), record:
        record(**({"input_ids": first} if isinstance(first, Tensor) else first))
    tensors = (b if isinstance(b, Tensor) else next(v for v in b.values() if isinstance(v, Tensor)) for b in batches)
    tokens = [tensor.shape[:2].numel() for tensor in tensors]  # padding included
    return [record.inputs[0][0].nbytes // tokens[0] * count for count in tokens]


def group_batches(sizes: Sequence[int], disk: int | None) -> list[list[int]]:
    """Return groups of indices of consecutive batches whose hidden states fit in `disk` bytes together."""
    parts: list[list[int]] = [[]]
    for k, size in enumerate(sizes):
        if parts[-1] and disk is not None and sum(sizes[j] for j in parts[-1]) + size > disk:
            parts.append([])
        parts[-1].append(k)
    if disk is not None and max(sizes) > disk:
        raise StreamlineError(
            f"disk={disk:,} bytes are too few: the states of the largest batch at all boundaries take {max(sizes):,}. "
            "Allow at least as many bytes, or make smaller batches."
        )
    return parts


def row_slices(sequences: int, size: int, memory: int) -> Iterator[slice]:
    """Yield slices of as many sequences as fit in `memory` bytes at all boundaries, at least one."""
    at_once = max(1, memory * sequences // size)
    for start in range(0, sequences, at_once):
        yield slice(start, start + at_once)


def require_disk_space(size: int, memory: int, folder: Path | None) -> None:
    """Raise if hidden states of `size` bytes do not fit on the disk."""
    if folder is None and size <= memory:
        return
    where = Path(tempfile.gettempdir()) if folder is None else folder.resolve()
    existing = next(path for path in (where, *where.parents) if path.exists())
    wanted, free = size - (memory if folder is None else 0), shutil.disk_usage(existing).free
    if wanted > free:
        raise StreamlineError(
            f"The states take {size:,} bytes, of which {wanted:,} are written to {where}, where {free:,} are free. "
            "Pass fewer sequences, choose a folder with more free space, or divide a profile into groups with disk=."
        )
