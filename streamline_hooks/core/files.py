"""Write files and folders atomically: readers find the previous version or the new one, never a part of either.

A new version is written to a hidden work folder beside its target, synced, and moved into place. The writer holds a
lock in its work folder, so that a later write of the same target removes what a killed process left behind, and never
what a living one is still writing.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from streamline_hooks.errors import StreamlineError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

# In a work folder. `new` is being written and `trash` being deleted; both may go at any time. `swapped` changes places
# with the target in one step. `old` is the previous version while the target is missing, where no such step exists.
_LOCK, _NEW, _SWAPPED, _OLD, _TRASH = "lock", "new", "swapped", "old", "trash"
_UNLOCKED = "unlocked"  # in the place of the lock where files cannot be locked: such a work folder is never a leftover
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Replace a file when the block ends without an exception.

    Parameters
    ----------
    path : str or Path
        The file to write. Missing parent folders are created; a symbolic link is followed.
    sync : bool
        Flush the file to the disk before it replaces the previous version. Only scratch data needs no sync.

    Yields
    ------
    Path
        Where to write the new version, under its final name in an empty folder. Further files that are written beside
        it are moved along, before it.

    Raises
    ------
    StreamlineError
        If writing fails; the previous version is unchanged.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_file(f"{folder}/notes.txt") as new:
    ...         _ = new.write_text("complete")
    ...     [file.name for file in Path(folder).iterdir()]
    ['notes.txt']
    """
    target = Path(path).resolve()
    with _report_failure(target), _work_folder(target, None) as work:
        (work / _NEW).mkdir()
        yield work / _NEW / target.name
        files = sorted((work / _NEW).iterdir(), key=lambda file: file.name == target.name)
        for file in files if sync else []:
            _sync(file)
        for file in files:
            os.replace(file, target.parent / file.name)
        if sync:
            _sync(target.parent)


@contextmanager
def atomic_folder(
    path: str | Path, *, overwrite: bool = False, is_disposable: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """Create or replace a folder when the block ends without an exception.

    Parameters
    ----------
    path : str or Path
        The folder to write. Missing parent folders are created; a symbolic link is followed.
    overwrite : bool
        Replace a folder that is not empty.
    is_disposable : callable
        Whether a previous version may be deleted. One that may not is kept beside the new version, under the name of
        the folder with ``.kept`` appended.

    Yields
    ------
    Path
        An empty folder to write the new version to.

    Raises
    ------
    StreamlineError
        If writing fails, or without `overwrite` if the folder is not empty; the previous version is unchanged.
    """
    target = Path(path).resolve()
    with _report_failure(target), _work_folder(target, is_disposable) as work:
        new = work / _NEW
        new.mkdir()
        yield new
        for parent, _, files in os.walk(new):
            for name in files:
                _sync(Path(parent, name))
            _sync(Path(parent))
        stay = target.is_dir() and os.path.samefile(target, os.curdir)
        _move_folder(new, target, overwrite)
        if stay:
            os.chdir(target)  # the folder of this process was replaced
        _sync(target.parent)


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Raise unless a file or folder can be written, by writing an empty one where the real one would be prepared.

    Parameters
    ----------
    path : str or Path
        Nothing is left behind, and what is there is unchanged.
    folder : bool
        Whether it is to be a folder.

    Raises
    ------
    StreamlineError
        If `atomic_file`, or `atomic_folder`, could not write it.
    """
    target = Path(path).resolve()
    with _report_failure(target):
        if target.exists() and target.is_dir() != folder:
            is_a, needed = ("file", "folder") if folder else ("folder", "file")
            raise StreamlineError(f"{target} is a {is_a}; a {needed} is written there. Choose another name.")
        missing = [parent for parent in target.parents if not parent.exists()]
        try:
            with _work_folder(target, None) as work:
                made = work / _NEW / target.name
                made.parent.mkdir()
                made.mkdir() if folder else made.write_bytes(b"\0")
        finally:
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()


@contextmanager
def _report_failure(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StreamlineError(
            f"Writing {target} failed: {error}. What was there before is untouched. Make room or choose another place."
        ) from error


def _move_folder(new: Path, target: Path, overwrite: bool) -> None:
    """Move a folder to its target, in one step wherever the system has one."""
    while True:
        try:
            os.rename(new, target)  # never replaces a folder that is not empty
            return
        except OSError as error:
            if error.errno not in _NOT_EMPTY or not target.is_dir():
                raise
        if not any(target.iterdir()):  # Windows refuses an empty one too
            target.rmdir()
        elif not overwrite:
            raise FileExistsError(errno.EEXIST, "the folder is not empty; it appeared meanwhile", str(target))
        else:
            with suppress(FileNotFoundError):  # deleted meanwhile
                _replace_folder(new, target)
                return


def _replace_folder(new: Path, target: Path) -> None:
    swapped, old = new.with_name(_SWAPPED), new.with_name(_OLD)
    os.rename(new, swapped)
    try:
        if _exchange(swapped, target):
            return
    except OSError:
        os.rename(swapped, new)
        raise
    os.rename(swapped, new)
    os.rename(target, old)  # comes back with the work folder, should the next step fail
    os.rename(new, target)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or its file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


# Work folders


@contextmanager
def _work_folder(target: Path, is_disposable: Callable[[Path], bool] | None) -> Iterator[Path]:
    """Create a locked work folder beside a target, after removing those that killed processes left."""
    if not target.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if target.parent.is_dir():
        _remove_leftovers(target, is_disposable)
    work, lock = _create_locked(target)
    try:
        try:
            yield work
        finally:
            _clear(work, target, is_disposable)
    finally:
        os.close(lock)


def _create_locked(target: Path) -> tuple[Path, int]:
    """Create a work folder and lock it; again where another process takes it for a leftover in between."""
    for _ in range(100):
        work = target.with_name(f"{_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}.writing")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            work.mkdir()
            lock = os.open(work / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except FileNotFoundError:
            continue
        try:
            if not _lock(lock):
                (work / _UNLOCKED).touch()
                (work / _LOCK).unlink()
                return work, lock
            if _is_file(lock, work / _LOCK):
                return work, lock
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(lock)
    raise OSError(errno.EBUSY, "its work folder is removed by others again and again", str(target))


def _remove_leftovers(target: Path, is_disposable: Callable[[Path], bool] | None) -> None:
    """Remove the work folders of a target whose processes on this machine have ended."""
    pattern = re.compile(re.escape(_prefix(target)) + r"\d+-[0-9a-f]{8}\.writing")
    for name in os.listdir(target.parent):
        if not pattern.fullmatch(name):
            continue
        work = target.with_name(name)
        try:
            lock = os.open(work / _LOCK, os.O_RDWR)
        except OSError:
            with suppress(OSError):
                work.rmdir()  # killed before it had a lock
            continue
        try:
            with suppress(BlockingIOError):  # a living process is writing
                if _lock(lock) and _is_file(lock, work / _LOCK):
                    _clear(work, target, is_disposable)
        finally:
            os.close(lock)


def _clear(work: Path, target: Path, is_disposable: Callable[[Path], bool] | None) -> None:
    """Remove a locked work folder, and bring back or keep a previous version that is in it."""
    swapped, old, trash = work / _SWAPPED, work / _OLD, work / _TRASH
    with suppress(OSError):
        if old.exists() and not target.exists():
            os.rename(old, target)
        for previous in (swapped, old):
            if not previous.exists():
                continue
            if is_disposable is None:
                return  # a write that can tell whether it may be deleted comes later
            if is_disposable(previous):
                shutil.rmtree(trash, ignore_errors=True)
                os.rename(previous, trash)
            else:
                _keep_beside(previous, target)
        shutil.rmtree(work / _NEW, ignore_errors=True)
        shutil.rmtree(trash, ignore_errors=True)
        for name in (_UNLOCKED, _LOCK):
            (work / name).unlink(missing_ok=True)
        work.rmdir()


def _keep_beside(previous: Path, target: Path) -> None:
    """Give a folder with files of the user's a name of its own beside the target."""
    number = 1
    while True:
        kept = target.with_name(f"{target.name}.kept" + (f"-{number}" if number > 1 else ""))
        if not kept.exists():
            try:
                os.rename(previous, kept)
                break
            except OSError as error:
                if error.errno not in _NOT_EMPTY:
                    raise
        number += 1
    logger.warning("%s was replaced, but held files that this library did not write. They are in %s.", target, kept)


def _prefix(target: Path) -> str:
    """What the names of all work folders of a target on this machine begin with; short where its own name is long."""
    name = target.name
    if len(os.fsencode(name)) > 64:
        name = f"{name[:16]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    return f".{name}.{machine}-"


def _lock(file: int) -> bool:
    """Lock an open file until it is closed; False where files cannot be locked.

    Raises
    ------
    BlockingIOError
        If another process has the lock.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    """Flush a file to the disk, or the names in a folder where the system can."""
    if path.is_dir():
        with suppress(OSError):
            _sync_opened(path, os.O_RDONLY)
    elif not path.is_symlink():
        _sync_opened(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)


def _sync_opened(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)
