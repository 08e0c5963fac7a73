"""The interface through which statistics, fits and verification read the hidden states of a model.

`StateSource` has two implementations. `streamline_hooks.surgery.ModelSource` runs each batch through all blocks of a
model in memory. `streamline_hooks.checkpoint.BlockwiseSource` runs all batches through one block of a checkpoint before
it reads the next block.

The order between windows therefore depends on the source. Each window gets its batches in the order of the text from
every source, so that the sums have the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from streamline_hooks.core import Batch, Batches, UnsupportedSurgery
from streamline_hooks.modeling.block_stack import BlockStack

_T = TypeVar("_T")


@dataclass(frozen=True)
class Candidate:
    """A window of blocks and its replacement.

    Attributes
    ----------
    window : range
    module : torch.nn.Module or None
        A module that takes no slot; None for plain removal.

    Examples
    --------
    >>> Candidate(range(12, 20)).module is None
    True
    """

    window: range
    module: nn.Module | None = None


Variant = Candidate | Callable[[], AbstractContextManager[Any]]
"""A replaced window, or a function that returns a context manager inside which the model is changed."""


@dataclass(frozen=True, eq=False)
class BoundaryStates:
    """The hidden states of some sequences of a batch at every boundary.

    Attributes
    ----------
    number : int
        Index of the batch.
    rows : slice
        The sequences of the batch.
    states : list of torch.Tensor
        One for each boundary, of shape (sequences, tokens, features).
    real : torch.Tensor
        Boolean, of shape (batch, tokens), for all sequences of the batch: False for padding.
    """

    number: int
    rows: slice
    states: list[Tensor]
    real: Tensor


@dataclass(frozen=True, eq=False)
class VariantOutputs:
    """The outputs of a model and of its variants for a batch, or for a few tokens of a batch.

    Attributes
    ----------
    batch : mapping or torch.Tensor
        The batch, or the ids of the tokens.
    inputs : mapping or torch.Tensor
        The keyword arguments of the forward; `batch` if they were not completed.
    output : Any
        The return value of the model's forward, or an object with ``logits`` of shape (1, tokens, vocabulary).
    variants : sequence of callable
        One for each variant: returns its output, or raises `UnsupportedSurgery`. Call each at most once, in order.
    labels : torch.Tensor or None
        The next tokens, of shape (1, tokens), if `batch` has the ids of a few tokens; otherwise None.
    number : int
        Index of the batch.
    """

    batch: Batch | Tensor
    inputs: Batch | Tensor
    output: Any
    variants: Sequence[Callable[[], Any]]
    labels: Tensor | None = None
    number: int = 0


class WindowSums(Protocol):
    """Sums over the states before and after a window, such as `streamline_hooks.statistics.WindowMoments`."""

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        """Add a batch: two states (batch, tokens, features), and its real tokens (batch, tokens)."""

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as tensors and numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the sums to those of `state_dict`."""


class StateSource(ABC):
    """Provide the hidden states of a model's blocks, batch by batch.

    `profile`, `measure_moments`, `fit_windows`, `verify_shortlist` and `perplexity` take a model or a `StateSource`.

    Attributes
    ----------
    model : torch.nn.Module
    stack : BlockStack
    in_memory : bool
        Whether the weights of all blocks are in memory. Otherwise those of a block are in memory while it runs.
    """

    model: nn.Module
    in_memory: bool

    @property
    @abstractmethod
    def stack(self) -> BlockStack:
        """The stack of blocks."""

    @abstractmethod
    def saved_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters and the saved buffers by name, with their values."""

    @abstractmethod
    def current(self) -> StateSource:
        """Return a source of the model as it is now, inside an open surgery."""

    @abstractmethod
    def groups(self, batches: Batches, blocks: int) -> list[Sequence[int]]:
        """Return the indices of the batches that `boundary_states` is to be called with at a time."""

    @abstractmethod
    def boundary_states(
        self, batches: Batches, blocks: int, desc: str
    ) -> AbstractContextManager[Iterator[BoundaryStates]]:
        """Run the first `blocks` blocks, and yield the hidden states at all boundaries.

        The state at boundary k is the input of block k, after the modules that are spliced in before it. If all blocks
        run, the last state is the output of the last block.
        """

    @abstractmethod
    def window_sums(
        self,
        parts: Sequence[tuple[str, Batches]],
        windows: Sequence[range],
        make: Callable[[int, int], WindowSums],
        *,
        rerun: Sequence[int] | None = None,
    ) -> AbstractContextManager[Iterator[tuple[int, list[Any]]]]:
        """Sum the states before and after windows, and yield the sums of each window as soon as they are complete.

        Parameters
        ----------
        parts : sequence of (str, batches)
            Parts of the text, each with the label of its progress bar. Each part has separate sums.
        windows : sequence of range
        make : callable
            Returns the empty sums of a window, given its index and the number of features.
        rerun : sequence of int, optional
            For each window, the number of its first blocks that are called with each batch just before the sums are
            updated, for hooks that read their arguments or branches. By default none are.

        Returns
        -------
        context manager of iterator of (int, list)
            The index of a window, and one `WindowSums` for each part; None for a part without batches. The order is the
            same on every rank.
        """

    @abstractmethod
    def outputs(
        self, batches: Batches, variants: Sequence[Variant], desc: str, original: nn.Module | None = None
    ) -> AbstractContextManager[Iterator[VariantOutputs]]:
        """Run the model and its variants, and yield their outputs.

        For a `Candidate` only the blocks after its window are run. A model in memory takes variants of one type in a
        call: candidates, or functions. With `original`, the first output is that of this model.
        """

    def identify(self, run: Mapping[str, Any]) -> None:  # noqa: B027 (a source without files has nothing to compare)
        """Set the JSON values that determine the results of a run. Call it before the first step.

        Raises StreamlineError if the files of an interrupted run have other values.
        """

    def cached(
        self,
        name: str,
        make: Callable[[], _T],
        write: Callable[[_T, Path], Any],
        read: Callable[[Path], _T],
        *,
        each_rank: bool = False,
    ) -> _T:
        """Return the result of a step, from the file of an interrupted run if there is one.

        Parameters
        ----------
        name : str
            Name of the step, unique in the run.
        make, write, read : callable
            Compute the result; write it to a file; read it from the file.
        each_rank : bool
            Whether each rank reads its file on its own, because `make` does not communicate. By default the files are
            read only if every rank has its file.
        """
        return make()


def require_branches_readable(source: StateSource, blocks: Iterable[int]) -> None:
    """Raise if accelerate offloads blocks of a model in memory, whose weights are then loaded part by part."""
    for k in blocks:
        if source.in_memory and any(parameter.is_meta for parameter in source.stack[k].parameters()):
            raise UnsupportedSurgery(
                f"The branches of block {k} of {type(source.model).__name__} cannot be read: its parameters are "
                "offloaded. Expected weights in memory, or a BlockwiseSource. Load the model without a device map that "
                "offloads it, or compress its checkpoint block by block (compress_checkpoint)."
            )
