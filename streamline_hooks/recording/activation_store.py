"""Write hidden states to safetensors shards while batches run, and read them in order, by index or shuffled."""

from __future__ import annotations

import bisect
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    autocast_dtype,
    batches_digest,
    current_processes,
    get_logger,
    model_digest,
    structure_digest,
    suggest,
    texts_digest,
    validate_arguments,
    weights_digest,
    weights_in_memory,
    write_file,
    write_json,
)
from streamline_hooks.modeling import BlockStack, all_finite
from streamline_hooks.recording.recorder import HiddenStateRecorder, RecordedBatch, RecordingConfig
from streamline_hooks.recording.shard_files import (
    FORMAT,
    INDEX,
    damaged_shard_error,
    file_size,
    header_of,
    read_index,
    read_shard,
    require_header,
    require_own_shard,
    rows_of_shards,
)
from streamline_hooks.recording.sites import BLOCK_SITES, BlockSite
from streamline_hooks.recording.token_columns import TOKEN_COLUMNS, token_columns_of

logger = get_logger(__name__)

# Of stored and repeated states, relative to the norm, as the median over tokens: rounding in bfloat16 can change the
# experts of a few tokens, and thereby these tokens by much more.
MAX_DIFFERENCE = 0.05


class ActivationStore:
    """Store the hidden states of many tokens in a folder of safetensors shards with an index.

    Each row is a token that is not padding. The columns are ``tokens`` (token ids), ``positions`` (in the sequence,
    from 0), ``document_ids``, and for each site and block the states, named ``"<site>.<block>"``, for example
    ``"block.output.7"``, of shape (tokens, features). Rows are in the order of the batches and their sequences.

    `record` runs a model and stores its states; `append`, inside ``with store:``, stores states that were computed
    elsewhere. A shard is written when it is full. A process that is interrupted or killed loses only the shard that it
    has not written: the same call of `record` continues after the last complete shard, and ``store.batches`` is the
    number of batches that need not be appended again. The folder belongs to one run. Another model, other data or other
    settings are refused, and files that this library did not write are never replaced or deleted.

    A store is read as an iterable of shards, by index (``store[5]``, ``store[10:20]``), or with `dataset`.

    Parameters
    ----------
    folder : str or Path
        The folder of the shards. It is created by the first write.
    shard_bytes : int
        Size of a shard in bytes, and of the rows that are buffered in memory. A larger batch is one shard. 256 MiB by
        default.
    metadata : mapping, optional
        JSON values that identify the run, in addition to what `record` stores: the layers of an intervention, the
        version of the data. Writing into an existing folder requires equal metadata.
    partial : bool
        Read the complete shards of a store whose run is not finished. By default such a store is refused.

    Attributes
    ----------
    complete : bool
        Whether the run is finished.
    batches : int
        Number of batches in the shards.
    columns : dict
        For each column of states, a dict with ``dtype`` (name in torch) and ``features``.

    Raises
    ------
    StreamlineError
        If the folder contains other files, the index of another version, or if a shard is missing or damaged.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks.testing import tiny_model
    >>> ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    >>> store = ActivationStore(f"{tempfile.mkdtemp()}/states")
    >>> _ = store.record(tiny_model("llama"), [{"input_ids": ids, "attention_mask": mask}], blocks=[3, -1])
    >>> len(store), store.columns["block.output.3"]
    (6, {'dtype': 'float32', 'features': 32})
    >>> rows = store[:3]
    >>> rows["tokens"].tolist(), rows["positions"].tolist(), rows["document_ids"].tolist()
    ([5, 6, 7], [0, 1, 0], [0, 0, 1])
    """

    @validate_arguments(shard_bytes=1)
    def __init__(
        self,
        folder: str | Path,
        *,
        shard_bytes: int = 2**28,
        metadata: Mapping[str, Any] | None = None,
        partial: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._shard_bytes, self._partial = shard_bytes, partial
        self._metadata = _json_values(metadata or {})
        self._index = read_index(self.folder)
        self._is_open = False
        self._replaceable = ""  # name of a half-written shard, which may be replaced
        self._rows: dict[str, list[Tensor]] = {}
        self._buffered_bytes = self._buffered_batches = 0

    @property
    def complete(self) -> bool:
        """Whether the run is finished."""
        return bool(self._index.get("complete"))

    @property
    def batches(self) -> int:
        """Number of batches in the shards."""
        return sum(shard["batches"] for shard in self._shards)

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """Dtype and number of features of each column of states."""
        columns: dict[str, dict[str, Any]] = self._index.get("columns", {})
        return {name: dict(column) for name, column in columns.items()}

    @property
    def _shards(self) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = self._index.get("shards", [])
        return shards

    def __len__(self) -> int:
        """Return the number of tokens in the shards."""
        return sum(shard["tokens"] for shard in self._shards)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        return f"ActivationStore({str(self.folder)!r}: {len(self):,} tokens, {len(self._shards)} shards, {state})"

    # Writing

    @validate_arguments()
    def record(
        self,
        model: nn.Module,
        batches: Iterable[Batch | Tensor],
        *,
        blocks: Iterable[int] | None = None,
        sites: Sequence[str] = ("block.output",),
        dtype: torch.dtype | None = None,
        document_ids: Sequence[Tensor] | None = None,
        stack: str | None = None,
    ) -> Self:
        """Run batches in evaluation mode and store the states of their real tokens.

        The forward pass ends after the last recorded block. The output of the last block is stored before the final
        norm. If the folder contains an interrupted run with the same model, batches and settings, the batches in its
        complete shards are skipped. The first batch runs again, and its states are compared with the stored ones, so
        that states that a hook changes are not mixed with others.

        Parameters
        ----------
        model : torch.nn.Module
        batches : iterable of mapping or torch.Tensor
            Inputs of the model's forward with ``input_ids`` of shape (batch, tokens). They are kept in memory.
        blocks : iterable of int, optional
            Blocks to record; negative indices count from the end. Default: all.
        sites : sequence of str
            Sites of the blocks, see `HiddenStateRecorder`. The heads of "attention.heads" are concatenated along the
            features. Default: "block.output".
        dtype : torch.dtype, optional
            Dtype of the stored states. Default: unchanged.
        document_ids : sequence of torch.Tensor, optional
            For each batch, integers of shape (batch,) or (batch, tokens). By default the sequences are numbered in the
            order of the batches, and each restart of ``position_ids`` in a packed row is a new document.
        stack : str, optional
            Path of the block stack, see `find_stack`.

        Returns
        -------
        ActivationStore
            This store.

        Raises
        ------
        StreamlineError
            If the folder belongs to another run, the disk is too small, a state of a real token is not finite, or the
            stored states of the first batch differ from those of the model by more than 5 % of their norm (median of
            the tokens).

        Examples
        --------
        >>> import tempfile
        >>> from streamline_hooks.testing import tiny_model
        >>> store = ActivationStore(f"{tempfile.mkdtemp()}/states", shard_bytes=4096)
        >>> batches = [torch.arange(3, 33).view(3, 10), torch.arange(3, 23).view(2, 10)]
        >>> store.record(tiny_model("llama"), batches, blocks=[2], dtype=torch.bfloat16).complete
        True
        >>> [shard["block.output.2"].shape for shard in store]
        [torch.Size([30, 32]), torch.Size([20, 32])]
        """
        batches = list(batches)
        block_sites = _checked_sites(sites)
        recorder = HiddenStateRecorder(
            model,
            blocks,
            sites=block_sites,
            stop=True,
            stack=stack,
            config=RecordingConfig(device="cpu", dtype=dtype),
        )
        token_columns = token_columns_of(recorder.stack, batches, document_ids)
        run = {
            "model": type(model).__name__,
            "weights": _weights_fingerprint(recorder.stack),
            "autocast": autocast_dtype(model),
            "stack": recorder.stack.path,
            "blocks": list(recorder.blocks),
            "sites": block_sites,
            "dtype": _dtype_name(dtype),
            "data": batches_digest([batches, document_ids]),
        }
        self._begin(run)
        try:
            if self.batches:
                self._require_same_states(recorder, block_sites, batches[0], token_columns[0])
            if self.complete:
                logger.info(f"{self.folder} already contains all {len(batches)} batches.")
            else:
                self._record(recorder, block_sites, batches, token_columns)
        except BaseException:
            self._end(complete=False)
            raise
        self._end(complete=True)
        return self

    def _record(
        self,
        recorder: HiddenStateRecorder,
        sites: Sequence[BlockSite],
        batches: list[Batch | Tensor],
        token_columns: list[dict[str, Tensor]],
    ) -> None:
        done = self.batches
        if done:
            logger.info(f"Continuing in {self.folder} after {done} of {len(batches)} batches.")
        remaining_tokens = sum(int(columns["mask"].sum()) for columns in token_columns[done:])
        is_checked = False
        with recorder.over(batches[done:], f"recording {len(recorder.blocks)} blocks") as recorded:
            for batch, columns in zip(recorded, token_columns[done:], strict=True):
                rows = _rows(batch, columns, sites)
                self._require_columns(rows)
                if not is_checked:
                    self._require_space(remaining_tokens, rows)
                    is_checked = True
                self._buffer(rows)

    def _require_same_states(
        self,
        recorder: HiddenStateRecorder,
        sites: Sequence[BlockSite],
        batch: Batch | Tensor,
        columns: dict[str, Tensor],
    ) -> None:
        """Raise unless the model computes the stored states of the first batch, up to rounding."""
        with recorder.over([batch], "comparing the first batch") as recorded:
            (rows,) = (_rows(computed, columns, sites) for computed in recorded)
        count = int(columns["mask"].sum())
        if not count:  # the batch is padding
            return
        stored = self._read_rows(0, count)
        for name, value in rows.items():
            if name in TOKEN_COLUMNS:
                continue
            norm = stored[name].float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            difference = ((value.float() - stored[name].float()).norm(dim=-1) / norm).median()
            if not bool(difference <= MAX_DIFFERENCE):
                raise StreamlineError(
                    f"{self.folder} contains other states of the first batch: those of {name} differ by "
                    f"{float(difference):.0%} of their norm (median of the tokens). Expected at most "
                    f"{MAX_DIFFERENCE:.0%}, which rounding does not reach. Use the same hooks and interventions as "
                    "when the folder was written, or choose another folder."
                )

    @validate_arguments()
    def append(
        self,
        states: Mapping[str, Tensor],
        tokens: Tensor,
        positions: Tensor,
        document_ids: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Append a batch of states, inside ``with store:``.

        Parameters
        ----------
        states : mapping of str to torch.Tensor
            For each column, named "<site>.<block>", states of shape (batch, tokens, features) or (tokens, features).
            All batches have the same columns, dtypes and features.
        tokens, positions : torch.Tensor
            Token ids and positions, integers of shape (batch, tokens) or (tokens,).
        document_ids : torch.Tensor
            Integers of the same shape, or (batch,).
        mask : torch.Tensor, optional
            Boolean mask of the same shape, False for padding, which is not stored. Default: no padding.

        Raises
        ------
        StreamlineError
            If the store is not open, shapes do not match, a state is not finite, or the columns differ from those of
            the first batch.

        Examples
        --------
        >>> import tempfile
        >>> batches = [torch.arange(10).view(2, 5), torch.arange(10, 20).view(2, 5)]
        >>> with ActivationStore(f"{tempfile.mkdtemp()}/states", metadata={"run": 1}) as store:
        ...     for ids in batches[store.batches :]:
        ...         states = {"attention.output.3": torch.zeros(2, 5, 8)}
        ...         store.append(states, ids, torch.arange(5).expand(2, 5), document_ids=ids[:, 0])
        >>> store[-1]["document_ids"].item(), len(store)
        (15, 20)
        """
        if not self._is_open:
            raise StreamlineError(
                "append() was called on a store that is not open, so that buffered states would be lost. Expected a "
                "call inside 'with store:'. Open the store."
            )
        shape = tokens.shape
        if document_ids.shape == shape[:1] and len(shape) == 2:
            document_ids = document_ids[:, None].expand(shape)
        integers = {"tokens": tokens, "positions": positions, "document_ids": document_ids}
        for name, value in integers.items():
            if value.shape != shape or len(shape) not in (1, 2) or value.is_floating_point() or value.is_complex():
                raise StreamlineError(
                    f"append: {name} is a {value.dtype} tensor of shape {tuple(value.shape)}. Expected integers of "
                    f"shape (batch, tokens) or (tokens,), the same for all, here {tuple(shape)}. Pass such a tensor."
                )
        for name, state in states.items():
            if name in TOKEN_COLUMNS or not state.is_floating_point() or state.shape[:-1] != shape:
                raise StreamlineError(
                    f"append: states[{name!r}] is a {state.dtype} tensor of shape {tuple(state.shape)}. Expected a "
                    f"floating-point tensor of shape {(*shape, 'features')} under a name other than "
                    f"{', '.join(TOKEN_COLUMNS)}. Pass one state per token."
                )
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise StreamlineError(
                f"append: mask is a {mask.dtype} tensor of shape {tuple(mask.shape)}. Expected a boolean tensor of "
                f"shape {tuple(shape)}, False for padding. Pass attention_mask.bool()."
            )
        mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu()
        columns = {**states, **{name: value.long() for name, value in integers.items()}}
        rows = {name: value.detach().to("cpu", copy=True)[mask] for name, value in columns.items()}
        for name in states:
            if not all_finite([rows[name]]):
                raise StreamlineError(
                    f"append: states[{name!r}] contains NaN or infinite values. Expected finite states of real tokens. "
                    "Check the model's weights and inputs, or exclude the tokens by mask."
                )
        self._require_columns(rows)
        self._buffer(rows)

    def __enter__(self) -> Self:
        self._begin({})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(complete=kind is None)

    def _begin(self, run: dict[str, Any]) -> None:
        """Open the store for writing; raise unless the folder is empty or belongs to the same run."""
        if self._is_open:
            raise StreamlineError(
                "This ActivationStore is already open. Close it, or create another with a new folder."
            )
        if current_processes().count > 1:
            raise StreamlineError(
                f"{self.folder} would be written by {current_processes().count} ranks. Expected one process per "
                "folder. Give each rank its own folder and batches, inside streamline_hooks.core.single_process()."
            )
        run = {**run, "metadata": self._metadata}
        self._index = read_index(self.folder)
        if not self._index:
            self._index = {
                "format": FORMAT,
                "fingerprint": texts_digest([json.dumps(run, sort_keys=True)]),
                "run": run,
                "columns": {},
                "complete": False,
                "shards": [],
            }
            write_json(self.folder / INDEX, self._index)
        stored = self._index["run"]
        if stored != run:
            differing = sorted(name for name in {*stored, *run} if stored.get(name) != run.get(name))
            listed = "; ".join(f"{name} is {stored.get(name)!r} there and {run.get(name)!r} here" for name in differing)
            raise StreamlineError(
                f"{self.folder} belongs to another run: {listed}. Expected an empty folder or the folder of the same "
                "run. Choose another folder."
            )
        self._drop_incomplete_shard()
        self._is_open = True

    def _drop_incomplete_shard(self) -> None:
        """Remove the last shard from the index if its file is missing or half-written; raise for any other shard."""
        for number, shard in enumerate(self._shards):
            if file_size(self.folder / shard["file"]) == shard["bytes"]:
                continue
            if number + 1 < len(self._shards):
                raise damaged_shard_error(self.folder / shard["file"])
            logger.warning("%s is missing or incomplete and will be written again.", self.folder / shard["file"])
            self._index = {**self._index, "complete": False, "shards": self._shards[:-1]}
            self._replaceable = shard["file"]

    def _end(self, *, complete: bool) -> None:
        """Close the store. Without `complete`, the buffered rows are dropped, to be computed again."""
        try:
            if complete and self._buffered_batches:
                self._write_shard()
            if complete and not self.complete:
                self._write_index({**self._index, "complete": True})
        finally:
            self._rows, self._buffered_bytes, self._buffered_batches = {}, 0, 0
            self._is_open = False

    def _require_columns(self, rows: Mapping[str, Tensor]) -> None:
        """Raise unless a batch has the columns of the first batch."""
        columns = {
            name: {"dtype": _dtype_name(value.dtype), "features": value.shape[-1]}
            for name, value in sorted(rows.items())
            if name not in TOKEN_COLUMNS
        }
        if not columns:
            raise StreamlineError("states={} is empty. Expected at least one column of states. Pass a tensor.")
        expected = self._index["columns"] or columns
        if columns != expected:
            raise StreamlineError(
                f"A batch has the columns {columns}. Expected those of the first batch, {expected}. Write other states "
                "to another folder."
            )
        self._index = {**self._index, "columns": columns}

    def _require_space(self, tokens: int, rows: Mapping[str, Tensor]) -> None:
        """Raise if the disk has no space for this number of tokens."""
        needed = tokens * sum(value.shape[1:].numel() * value.element_size() for value in rows.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise StreamlineError(
                f"The states of {tokens:,} tokens need {needed:,} bytes, but the disk of {self.folder} has {free:,} "
                "free. Expected enough space. Free disk space, record fewer blocks or tokens, or pass "
                "dtype=torch.bfloat16."
            )

    def _buffer(self, rows: Mapping[str, Tensor]) -> None:
        """Add the rows of a batch to the buffer, after writing a shard if they would exceed its size."""
        size = sum(value.numel() * value.element_size() for value in rows.values())
        if self._buffered_batches and self._buffered_bytes + size > self._shard_bytes:
            self._write_shard()
        for name, value in rows.items():
            self._rows.setdefault(name, []).append(value)
        self._buffered_bytes += size
        self._buffered_batches += 1

    def _write_shard(self) -> None:
        number = len(self._shards)
        path = self.folder / f"shard-{number:05d}.safetensors"
        self._require_sole_writer()
        values = {"fingerprint": self._index["fingerprint"], "shard": number}
        if path.exists() and path.name != self._replaceable:
            require_own_shard(path, values)
        # One column at a time leaves the buffer, so that at most one is in memory twice.
        tensors = {name: torch.cat(self._rows.pop(name)) for name in sorted(self._rows)}
        write_file(path, tensors, values)
        shard = {
            "file": path.name,
            "tokens": len(tensors["tokens"]),
            "batches": self._buffered_batches,
            "bytes": path.stat().st_size,
        }
        self._write_index({**self._index, "complete": False, "shards": [*self._shards, shard]})
        self._rows, self._buffered_bytes, self._buffered_batches = {}, 0, 0

    def _write_index(self, index: dict[str, Any]) -> None:
        write_json(self.folder / INDEX, index)
        self._index, self._replaceable = index, ""

    def _require_sole_writer(self) -> None:
        """Raise if the index lists shards that this store has not written."""
        files = [shard["file"] for shard in read_index(self.folder).get("shards", [])]
        if [name for name in files if name != self._replaceable] != [shard["file"] for shard in self._shards]:
            raise StreamlineError(
                f"Another process has written to {self.folder}. Expected one writer. Stop the other process, and "
                "repeat the call to continue."
            )

    # Reading

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the columns of each shard, in the order of writing."""
        for path, number in self._readable_shards():
            yield read_shard(path, number, self._index["fingerprint"])

    def __getitem__(self, rows: int | slice) -> dict[str, Tensor]:
        """Return the columns of one token (without the first axis) or of a slice of tokens."""
        self._require_readable()
        length = len(self)
        if isinstance(rows, int):
            if not -length <= rows < length:
                raise IndexError(f"Token {rows} is out of range. Expected {-length} to {length - 1}.")
            row = rows % length
            return {name: value[0] for name, value in self[row : row + 1].items()}
        start, stop, step = rows.indices(length)
        if step != 1:
            raise StreamlineError(f"The slice {rows} has step {step}. Expected 1. Select from the result.")
        return self._read_rows(start, stop)

    def _read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return the columns of a half-open range of tokens."""
        shards = self._undamaged_shards()
        ends = list(itertools.accumulate(shard["tokens"] for shard in self._shards))
        parts: dict[str, list[Tensor]] = {}
        for k in range(bisect.bisect_right(ends, start), len(shards)):
            first = ends[k] - self._shards[k]["tokens"]
            if first >= stop and parts:
                break
            path, number = shards[k]
            with safe_open(path, framework="pt") as file:
                require_header(header_of(file), path, number, self._index["fingerprint"])
                for name in (*TOKEN_COLUMNS, *self.columns):
                    part = file.get_slice(name)[max(start - first, 0) : max(stop - first, 0)]
                    parts.setdefault(name, []).append(part)
        if not parts:  # an empty slice at the end
            return {name: value[:0] for name, value in read_shard(*shards[-1], self._index["fingerprint"]).items()}
        return {name: torch.cat(values) for name, values in parts.items()}

    @validate_arguments()
    def dataset(self, *, shuffle_seed: int | None = None, columns: Sequence[str] | None = None) -> Any:
        """Return the rows as a `datasets.IterableDataset`, one example per token.

        The values are tensors: scalars for ``tokens``, ``positions`` and ``document_ids``, and states of shape
        (features,) in their stored dtype. The workers of a ``DataLoader`` read different shards, so that each row is
        read once. Needs the extra ``datasets``: ``pip install "streamline_hooks[datasets]"``.

        Parameters
        ----------
        shuffle_seed : int, optional
            Shuffle the shards and the rows of each shard. The order depends only on the seed and the store. To mix rows
            of several shards as well, apply ``.shuffle(seed, buffer_size)`` to the result. Default: stored order.
        columns : sequence of str, optional
            Columns to read. Default: all.

        Returns
        -------
        datasets.IterableDataset

        Raises
        ------
        StreamlineError
            If `datasets` is not installed, a column is unknown, or the store is incomplete.

        Examples
        --------
        >>> import tempfile
        >>> from streamline_hooks.testing import tiny_model
        >>> store = ActivationStore(f"{tempfile.mkdtemp()}/states")
        >>> _ = store.record(tiny_model("llama"), [torch.arange(3, 13).view(1, 10)], blocks=[2])
        >>> rows = list(store.dataset(shuffle_seed=0))
        >>> sorted(int(row["tokens"]) for row in rows) == list(range(3, 13)), rows[0]["block.output.2"].shape
        (True, torch.Size([32]))
        """
        shards = self._readable_shards()
        known = (*TOKEN_COLUMNS, *self.columns)
        for name in columns or ():
            if name not in known:
                raise StreamlineError(
                    f"columns: {name!r} is unknown. Expected names of {', '.join(known)}. "
                    f"{suggest(name, known, 'Choose stored columns.')}"
                )
        try:
            import datasets
        except ImportError as error:
            raise StreamlineError(
                "ActivationStore.dataset() needs the package `datasets`, which is not installed. Install it (pip "
                'install "streamline_hooks[datasets]"), or iterate over the store, which yields its shards.'
            ) from error
        if shuffle_seed is not None:
            generator = torch.Generator().manual_seed(shuffle_seed)
            shards = [shards[k] for k in torch.randperm(len(shards), generator=generator).tolist()]
        options = {
            "shards": shards,  # `datasets` splits lists, and only lists, among workers
            "columns": known if columns is None else tuple(columns),
            "fingerprint": self._index["fingerprint"],
            "shuffle_seed": shuffle_seed,
        }
        return datasets.IterableDataset.from_generator(rows_of_shards, gen_kwargs=options)

    def _readable_shards(self) -> list[tuple[Path, int]]:
        """Return the path and number of each shard; raise if the store is empty, incomplete or damaged."""
        self._require_readable()
        return self._undamaged_shards()

    def _require_readable(self) -> None:
        """Raise if the store is empty or incomplete."""
        if not self._shards:
            raise StreamlineError(
                f"{self.folder} contains no shard of an ActivationStore. Expected a recorded store. Call record() "
                "first, or choose another folder."
            )
        if not (self.complete or self._partial):
            raise StreamlineError(
                f"{self.folder} is incomplete: its run was interrupted after {self.batches} batches ({len(self):,} "
                "tokens). Expected a finished run. Repeat the call that wrote it, or read its complete shards with "
                "ActivationStore(folder, partial=True)."
            )

    def _undamaged_shards(self) -> list[tuple[Path, int]]:
        for shard in self._shards:
            if file_size(self.folder / shard["file"]) != shard["bytes"]:
                raise damaged_shard_error(self.folder / shard["file"])
        return [(self.folder / shard["file"], number) for number, shard in enumerate(self._shards)]


def _rows(batch: RecordedBatch, columns: Mapping[str, Tensor], sites: Sequence[BlockSite]) -> dict[str, Tensor]:
    """Return the columns of the real tokens of a batch; raise if the model read another mask than the batch's."""
    mask = columns["mask"]
    if not torch.equal(batch.real.cpu(), mask):
        raise StreamlineError(
            f"The model read a mask of real tokens of shape {tuple(batch.real.shape)} that differs from the batch's, "
            f"of shape {tuple(mask.shape)}. Expected attention_mask with one entry per token. Compute the states "
            "yourself and use append()."
        )
    values = {**_states(batch, sites), **columns}
    return {name: _select(value, mask) for name, value in values.items() if name != "mask"}


def _states(batch: RecordedBatch, sites: Sequence[BlockSite]) -> dict[str, Tensor]:
    """Return the recorded states of a batch by column, (batch, tokens, features)."""
    read = {"block.input": batch.entering, "block.output": batch.leaving}
    return {
        f"{site}.{k}": read[site](k) if site in read else batch.record[site][k][0].flatten(2)
        for site in sites
        for k in batch.record.blocks
    }


def _checked_sites(sites: Sequence[str]) -> list[BlockSite]:
    """Return the sites in alphabetical order; raise if one is unknown."""
    for site in sites:
        if site not in BLOCK_SITES:
            raise StreamlineError(
                f"sites: {site!r} is unknown. Expected one of {', '.join(BLOCK_SITES)}. "
                f"{suggest(site, BLOCK_SITES, 'Store other states with append().')}"
            )
    if not sites:
        raise StreamlineError(f"sites is empty. Expected at least one of {', '.join(BLOCK_SITES)}. Name a site.")
    return sorted({site for site in BLOCK_SITES if site in sites})


def _select(values: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of real tokens."""
    return values.flatten(0, 1) if bool(mask.all()) else values[mask]


def _weights_fingerprint(stack: BlockStack) -> str:
    """Return a digest of the model; of offloaded models, of the blocks and the structure."""
    if not any(parameter.is_meta for parameter in stack.model.parameters()):
        return model_digest(stack.model, attributes=False)
    digests = [structure_digest(stack.model)]
    for block in stack.blocks:
        with weights_in_memory(block):
            digests.append(weights_digest(block))
    return texts_digest(digests)


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _json_values(metadata: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StreamlineError(
            f"metadata cannot be written as JSON: {error}. Expected numbers, text, None, lists and dicts. Convert the "
            "other values."
        ) from error
