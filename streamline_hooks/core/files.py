"""Write files and folders atomically: readers see the complete previous version or the complete new version.

A new version is written to a hidden work folder next to the target, synced to disk, and moved into place. The writer
locks its work folder. A later write to the same target removes unlocked work folders, which killed processes left.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamline_hooks.core.errors import StreamlineError

if sys.platform != "win32":
    import fcntl

_logger = logging.getLogger(__name__)

# Names in a work folder. `new` is being written and `trash` is being deleted; both may be deleted at any time.
# `swapped` is exchanged with the target in one step. If the file system cannot exchange folders, `old` is the previous
# version while the target is missing.
_LOCK, _NEW, _SWAPPED, _OLD, _TRASH = "lock", "new", "swapped", "old", "trash"
_UNLOCKED = "unlocked"  # replaces the lock if files cannot be locked; such a folder is never removed
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Replace a file when the block ends without an exception.

    Parameters
    ----------
    path : str or Path
        The file to write. Missing parent folders are created; a symbolic link is followed.
    sync : bool
        Flush the file to disk before it replaces the previous version. Pass False only for temporary data.

    Yields
    ------
    Path
        Path of the new version in an empty folder. Other files written to that folder are moved to the target's folder
        first.

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
        Takes a previous version and returns whether it may be deleted. If not, it is renamed, with ``.kept`` appended.

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
        is_working_directory = target.is_dir() and os.path.samefile(target, os.curdir)
        _move_folder(new, target, overwrite)
        if is_working_directory:
            os.chdir(target)  # the working directory of this process was replaced
        _sync(target.parent)


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Raise if `atomic_file` (or `atomic_folder`) cannot write a path; tests this with an empty version next to it."""
    target = Path(path).resolve()
    with _report_failure(target):
        if target.exists() and target.is_dir() != folder:
            existing, expected = ("file", "folder") if folder else ("folder", "file")
            raise StreamlineError(f"{target} is a {existing}. Expected a {expected}. Choose another name.")
        missing = [parent for parent in target.parents if not parent.exists()]
        try:
            with _work_folder(target, None) as work:
                trial = work / _NEW / target.name
                trial.parent.mkdir()
                trial.mkdir() if folder else trial.write_bytes(b"\0")
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
            f"Writing {target} failed: {error}. The previous content is unchanged. Free disk space or choose another "
            "path."
        ) from error


def _move_folder(new: Path, target: Path, overwrite: bool) -> None:
    """Move a folder to its target, in one step where the system supports it."""
    while True:
        try:
            os.rename(new, target)  # never replaces a folder that is not empty
            return
        except OSError as error:
            if error.errno not in _NOT_EMPTY or not target.is_dir():
                raise
        if not any(target.iterdir()):  # Windows does not replace an empty folder either
            target.rmdir()
        elif not overwrite:
            raise FileExistsError(errno.EEXIST, "the folder is not empty; another process created it", str(target))
        else:
            with suppress(FileNotFoundError):  # deleted by another process
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
    os.rename(target, old)  # _clear restores it if the next step fails
    os.rename(new, target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False if the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(working_directory, os.fsencode(first), working_directory, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


# Work folders


@contextmanager
def _work_folder(target: Path, is_disposable: Callable[[Path], bool] | None) -> Iterator[Path]:
    """Create a locked work folder next to a target, after removing the work folders of killed processes."""
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
    """Create and lock a work folder; retry if another process removes it before it is locked."""
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
    raise OSError(errno.EBUSY, "other processes repeatedly removed its work folder", str(target))


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
                work.rmdir()  # its process was killed before it created the lock
            continue
        try:
            with suppress(BlockingIOError):  # a running process is writing
                if _lock(lock) and _is_file(lock, work / _LOCK):
                    _clear(work, target, is_disposable)
        finally:
            os.close(lock)


def _clear(work: Path, target: Path, is_disposable: Callable[[Path], bool] | None) -> None:
    """Remove a locked work folder, after restoring or renaming a previous version in it."""
    swapped, old, trash = work / _SWAPPED, work / _OLD, work / _TRASH
    with suppress(OSError):
        if old.exists() and not target.exists():
            os.rename(old, target)
        for previous in (swapped, old):
            if not previous.exists():
                continue
            if is_disposable is None:
                return  # left for a later `atomic_folder` call, which knows whether it may be deleted
            if is_disposable(previous):
                shutil.rmtree(trash, ignore_errors=True)
                os.rename(previous, trash)
            else:
                _keep_previous(previous, target)
        shutil.rmtree(work / _NEW, ignore_errors=True)
        shutil.rmtree(trash, ignore_errors=True)
        for name in (_UNLOCKED, _LOCK):
            (work / name).unlink(missing_ok=True)
        work.rmdir()


def _keep_previous(previous: Path, target: Path) -> None:
    """Rename a folder that contains the user's files to an unused name in the target's folder."""
    for number in itertools.count(1):
        backup = target.with_name(f"{target.name}.kept" + (f"-{number}" if number > 1 else ""))
        if backup.exists():
            continue
        try:
            os.rename(previous, backup)
            break
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
    _logger.warning(
        "%s was replaced, but contained files that this library did not write. They were moved to %s.", target, backup
    )


def _prefix(target: Path) -> str:
    """Return the common prefix of the names of a target's work folders on this machine."""
    name = target.name
    if len(os.fsencode(name)) > 64:
        name = f"{name[:16]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    return f".{name}.{machine}-"


def _lock(file: int) -> bool:
    """Lock an open file until it is closed; return False if files cannot be locked.

    Raises BlockingIOError if another process has locked the file.
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
    """Flush a file to disk, or the entries of a folder where the system supports it."""
    if path.is_symlink() and not path.is_dir():
        return
    with suppress(OSError) if path.is_dir() else nullcontext():
        file = os.open(path, os.O_RDWR if sys.platform == "win32" and not path.is_dir() else os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise `json.JSONDecodeError` for invalid and for too deeply nested JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def load_json(file: Path) -> Any:
    """Read a JSON file from a checkpoint folder; raise StreamlineError if it is damaged."""
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StreamlineError(f"{file} cannot be read as JSON: {error}. Copy the folder again.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file in a checkpoint folder; raise StreamlineError for any other content."""
    content = load_json(file)
    if not isinstance(content, dict):
        raise StreamlineError(
            f"{file} contains a {type(content).__name__}. Expected a JSON object. Copy the folder again."
        )
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON values to a file atomically."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_file(path) as new:
        new.write_text(text, encoding="utf-8")


_KEY = "streamline_hooks"


def write_file(
    path: str | Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, sync: bool = True
) -> Path:
    """Write tensors and JSON values to one safetensors file atomically; `sync` is passed to `atomic_file`."""
    with atomic_file(path, sync=sync) as new:
        save_file({k: v.contiguous() for k, v in tensors.items()}, new, {_KEY: json.dumps(values)})
    return Path(path)


def read_file(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and values that `write_file` wrote; `what` describes the expected content in errors."""
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except OSError as error:
        raise StreamlineError(f"{path} cannot be read: {error}. Pass a file that contains {what}.") from error
    except SafetensorError as error:
        raise StreamlineError(
            f"{path} is not a complete safetensors file ({error}). It may be truncated. Pass a file that contains "
            f"{what}."
        ) from error
    try:
        values = parse_json(text or "")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise StreamlineError(f"{path} is a safetensors file with other content. Pass a file that contains {what}.")
    return tensors, values
