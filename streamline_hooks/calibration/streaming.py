"""Documents one after the other, of sources of any size: each process's own, without repetitions, shuffled or not."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from streamline_hooks.calibration.documents import documents_in, listed, nothing_found
from streamline_hooks.distributed import Processes, here
from streamline_hooks.errors import StreamlineError

_Item = TypeVar("_Item")
_LONGEST = 50_000_000  # characters; a source without the right separators is one document of any size


def stream_documents(
    source: str | Path | Sequence[str | Path],
    *,
    shuffle: int = 0,
    seed: int = 0,
    remember: int = 1_000_000,
    processes: Processes | None = None,
) -> Iterator[str]:
    """Yield this process's documents of one or several sources of any size.

    One document is in memory at a time, those that are shuffled, and a digest of each that is remembered. Nothing is
    read before the first one is asked for, and nothing after the last.

    The order is that of the sources; in a folder that of the files' names; in a file that of the documents. Which
    process a document belongs to is told by its content, so that each belongs to one, and all processes together have
    those that one process alone would have. Each reads the whole source to find its own, since what is repeated may
    stand in any file; what costs more, making tokens of them, is shared. Shares are as even as chance makes them.

    Parameters
    ----------
    source : str, Path or a sequence of them
        See `read_documents`. A data set is streamed to its end, not up to a limit.
    shuffle : int
        So many documents are held, and which of them comes next is drawn; 0 or 1 leaves them in their order. What
        stands further behind than that does not come to the front.
    seed : int
        Of the shuffle.
    remember : int
        A document is left out if one of so many before it is the same (up to blanks around it); 0 keeps repetitions.
        About 250 bytes each, divided among the processes.
    processes : Processes, optional
        Which process this is; by default what `streamline_hooks.distributed.here` says.

    Yields
    ------
    str
        Documents, stripped, without empty ones.

    Raises
    ------
    StreamlineError
        At once, if a source does not exist or an argument is out of range. Later, if a source cannot be read, holds a
        text of more than 50 million characters without a separator, or if there is no text in any.

    Examples
    --------
    >>> whole = list(stream_documents("pydoc"))
    >>> shares = [list(stream_documents("pydoc", processes=Processes(rank, 3))) for rank in range(3)]
    >>> sorted(whole) == sorted(shares[0] + shares[1] + shares[2])
    True
    >>> mixed = list(stream_documents("pydoc", shuffle=50))
    >>> whole == mixed, sorted(whole) == sorted(mixed)
    (False, True)
    """
    for name, value in (("shuffle", shuffle), ("remember", remember)):
        if value < 0:
            raise StreamlineError(f"{name}={value}: expected a number of documents, 0 or more. Use 0 to do without.")
    sources = listed(source)
    found = documents_in(sources, longest=_LONGEST)  # raises now where a source does not exist
    own = _own(found, sources, remember, processes or here())
    return shuffled_within(own, shuffle, seed) if shuffle > 1 else own


def shuffled_within(items: Iterable[_Item], size: int, seed: int) -> Iterator[_Item]:
    """Hold so many items and yield one of them at random for each that comes in.

    Examples
    --------
    >>> list(shuffled_within(range(8), 3, seed=0))
    [1, 3, 0, 4, 2, 5, 7, 6]
    """
    draw = random.Random(seed)
    held: list[_Item] = []
    for item in items:
        if len(held) < size:
            held.append(item)
        else:
            place = draw.randrange(size)
            yield held[place]
            held[place] = item
    draw.shuffle(held)
    yield from held


def content_digest(document: str) -> bytes:
    """16 bytes that tell a document from any other."""
    return hashlib.blake2b(document.encode(), digest_size=16).digest()


def _own(found: Iterator[str], sources: list[str | Path], remember: int, processes: Processes) -> Iterator[str]:
    known: OrderedDict[bytes, int] = OrderedDict()  # by when they were last met; other processes know the others
    number = -1
    for document in found:
        if not (stripped := document.strip()):
            continue
        number += 1
        digest = content_digest(stripped)
        if int.from_bytes(digest[:8]) % processes.count != processes.rank:
            continue
        last = known.pop(digest, None)
        if remember:
            known[digest] = number
            while known[next(iter(known))] <= number - remember:
                known.popitem(last=False)
        if last is None or number - last > remember:
            yield stripped
    if number < 0:
        raise nothing_found(sources)
