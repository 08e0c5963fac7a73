"""Write hidden states to safetensors shards while batches run, and read them in order, by index or shuffled."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    autocast_dtype,
    batches_digest,
    get_logger,
    model_digest,
    structure_digest,
    suggest,
    texts_digest,
    validate_arguments,
    weights_digest,
    weights_in_memory,
)
from streamline_hooks.modeling import BlockStack
from streamline_hooks.recording.recorder import HiddenStateRecorder, RecordingConfig
from streamline_hooks.recording.shard_files import ShardFolder, dtype_name, read_shard, rows_of_shards
from streamline_hooks.recording.shard_writer import ShardWriter
from streamline_hooks.recording.sites import BlockSite
from streamline_hooks.recording.stored_rows import appended_rows, recorded_rows, require_same_states, sorted_block_sites
from streamline_hooks.recording.token_columns import TOKEN_COLUMNS, token_columns_of

logger = get_logger(__name__)


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
        self._partial = partial
        self._metadata = _json_values(metadata or {})
        self._shard_folder = ShardFolder(self.folder)
        self._writer = ShardWriter(self._shard_folder, shard_bytes)

    @property
    def complete(self) -> bool:
        """Whether the run is finished."""
        return bool(self._shard_folder.index.get("complete"))

    @property
    def batches(self) -> int:
        """Number of batches in the shards."""
        return sum(shard["batches"] for shard in self._shard_folder.shards)

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """Dtype and number of features of each column of states."""
        columns: dict[str, dict[str, Any]] = self._shard_folder.index.get("columns", {})
        return {name: dict(column) for name, column in columns.items()}

    def __len__(self) -> int:
        """Return the number of tokens in the shards."""
        return sum(shard["tokens"] for shard in self._shard_folder.shards)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        shards = len(self._shard_folder.shards)
        return f"ActivationStore({str(self.folder)!r}: {len(self):,} tokens, {shards} shards, {state})"

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
        block_sites = sorted_block_sites(sites)
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
            "dtype": dtype_name(dtype),
            "data": batches_digest([batches, document_ids]),
            "metadata": self._metadata,
        }
        self._writer.begin(run)
        try:
            if self.batches:
                self._require_same_states(recorder, block_sites, batches[0], token_columns[0])
            if self.complete:
                logger.info(f"{self.folder} already contains all {len(batches)} batches.")
            else:
                self._record(recorder, block_sites, batches, token_columns)
        except BaseException:
            self._writer.end(complete=False)
            raise
        self._writer.end(complete=True)
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
                rows = recorded_rows(batch, columns, sites)
                self._writer.require_columns(rows)
                if not is_checked:
                    self._writer.require_space(remaining_tokens, rows)
                    is_checked = True
                self._writer.buffer(rows)

    def _require_same_states(
        self,
        recorder: HiddenStateRecorder,
        sites: Sequence[BlockSite],
        batch: Batch | Tensor,
        columns: dict[str, Tensor],
    ) -> None:
        """Raise unless the model computes the stored states of the first batch, up to rounding."""
        with recorder.over([batch], "comparing the first batch") as recorded:
            (rows,) = (recorded_rows(computed, columns, sites) for computed in recorded)
        count = int(columns["mask"].sum())
        if not count:  # the batch is padding
            return
        require_same_states(rows, self._shard_folder.read_rows(0, count), self.folder)

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
        if not self._writer.is_open:
            raise StreamlineError(
                "append() was called on a store that is not open, so that buffered states would be lost. Expected a "
                "call inside 'with store:'. Open the store."
            )
        rows = appended_rows(states, tokens, positions, document_ids, mask)
        self._writer.require_columns(rows)
        self._writer.buffer(rows)

    def __enter__(self) -> Self:
        self._writer.begin({"metadata": self._metadata})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.end(complete=kind is None)

    # Reading

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the columns of each shard, in the order of writing."""
        self._require_readable()
        for path, number in self._shard_folder.undamaged_shards():
            yield read_shard(path, number, self._shard_folder.index["fingerprint"])

    def __getitem__(self, rows: SupportsIndex | slice) -> dict[str, Tensor]:
        """Return the columns of one token (without the first axis) or of a slice of tokens."""
        self._require_readable()
        length = len(self)
        if not isinstance(rows, slice):
            row = operator.index(rows)
            if not -length <= row < length:
                raise IndexError(f"Token {row} is out of range. Expected {-length} to {length - 1}.")
            row %= length
            return {name: value[0] for name, value in self[row : row + 1].items()}
        start, stop, step = rows.indices(length)
        if step != 1:
            raise StreamlineError(f"The slice {rows} has step {step}. Expected 1. Select from the result.")
        return self._shard_folder.read_rows(start, stop)

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
        self._require_readable()
        shards = self._shard_folder.undamaged_shards()
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
            "fingerprint": self._shard_folder.index["fingerprint"],
            "shuffle_seed": shuffle_seed,
        }
        return datasets.IterableDataset.from_generator(rows_of_shards, gen_kwargs=options)

    def _require_readable(self) -> None:
        """Raise if the store is empty or incomplete."""
        if not self._shard_folder.shards:
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


def _weights_fingerprint(stack: BlockStack) -> str:
    """Return a digest of the model; of offloaded models, of the blocks and the structure."""
    if not any(parameter.is_meta for parameter in stack.model.parameters()):
        return model_digest(stack.model, attributes=False)
    digests = [structure_digest(stack.model)]
    for block in stack.blocks:
        with weights_in_memory(block):
            digests.append(weights_digest(block))
    return texts_digest(digests)


def _json_values(metadata: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StreamlineError(
            f"metadata cannot be written as JSON: {error}. Expected numbers, text, None, lists and dicts. Convert the "
            "other values."
        ) from error
