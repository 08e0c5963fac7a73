"""Files and folders are replaced as a whole, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.core import atomic_file, atomic_folder, check_writable

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="folders change places in one step on Linux alone")


def write(target: Path, content: str) -> None:
    with atomic_file(target) as new:
        new.write_text(content)


def write_folder(target: Path, content: str, *, overwrite: bool = True, disposable: bool = True) -> None:
    with atomic_folder(target, overwrite=overwrite, is_disposable=lambda folder: disposable) as new:
        (new / "inner").mkdir()
        for name in ("a", "inner/b"):
            (new / name).write_text(content)


def content_of(target: Path) -> str:
    if target.is_file():
        return target.read_text()
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == ["a", "inner", "inner/b"]
    one, other = (target / "a").read_text(), (target / "inner/b").read_text()
    assert one == other
    return one


@contextmanager
def calls_of(name: str, monkeypatch: pytest.MonkeyPatch, before: Callable[..., None]) -> Iterator[None]:
    """Call a function before each call of a function of `os`."""
    real = getattr(os, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, name, call)
        yield


# Replacing


@pytest.mark.parametrize("writing", [write, write_folder])
def test_nothing_else_is_left(writing: Callable[[Path, str], None], tmp_path: Path) -> None:
    target = tmp_path / "made" / "here" / "target"
    for content in ("first", "second"):
        writing(target, content)
        assert content_of(target) == content
        assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_exception_leaves_the_previous_version(kind: str, error: Any, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (write if kind == "file" else write_folder)(target, "first")
    full = isinstance(error, OSError)
    expected: Any = StreamlineError if full else error
    with pytest.raises(expected, match=rf"{target}.*No space left.*choose" if full else None):
        with atomic_file(target) if kind == "file" else atomic_folder(target, overwrite=True) as new:
            (new if kind == "file" else new / "half").write_text("half")
            raise error
    assert content_of(target) == "first" and list(tmp_path.iterdir()) == [target]


def test_files_written_beside_one_are_moved_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    with calls_of("replace", monkeypatch, lambda source, target: moved.append(Path(target).name)):
        with atomic_file(tmp_path / "a.onnx") as new:
            new.write_text("graph")
            new.with_name("z.data").write_text("weights")
    assert moved == ["z.data", "a.onnx"] and sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "z.data"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, writing in (("file", write), ("folder", write_folder)):
        writing(tmp_path / "elsewhere" / name, "first")
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
        writing(tmp_path / name, "second")
        assert (tmp_path / name).is_symlink() and content_of(tmp_path / "elsewhere" / name) == "second"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/file").touch()
    write(tmp_path / "file", "")
    write_folder(tmp_path / "folder", "")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain/file").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_everything_is_synced_before_it_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def synced(file: int) -> None:
        events.append(Path(f"/proc/self/fd/{file}").resolve().name if sys.platform == "linux" else "synced")

    with calls_of("fsync", monkeypatch, synced), calls_of("rename", monkeypatch, lambda *_: events.append("moved")):
        with calls_of("replace", monkeypatch, lambda *_: events.append("moved")):
            write(tmp_path / "file", "")
            write_folder(tmp_path / "folder", "")
    if sys.platform == "linux":
        assert events[:3] == ["file", "moved", tmp_path.name]
        assert set(events[3:-2]) == {"new", "a", "inner", "b"} and events[-2:] == ["moved", tmp_path.name]
    else:
        assert events.count("synced") >= 5 and "moved" in events


def test_scratch_files_are_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with calls_of("fsync", monkeypatch, synced.append), atomic_file(tmp_path / "file", sync=False) as new:
        new.touch()
    assert (tmp_path / "file").exists() and not synced


def test_a_process_in_an_empty_folder_stays_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_folder(Path(), "first")
    assert content_of(Path()) == "first" and Path.cwd().samefile(tmp_path / "here")


# A folder that is not to be replaced, or not to be deleted


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(StreamlineError, match=rf"{target}.*not empty.*choose"):
        with atomic_folder(target) as new:
            (new / "a").touch()
            target.mkdir()
            (target / "precious").write_text("keep me")
    assert (target / "precious").read_text() == "keep me" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("exchange", [pytest.param(True, marks=linux), False])
def test_a_version_that_may_not_be_deleted_is_kept_beside(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not exchange:
        monkeypatch.setattr(sys, "platform", "darwin")
    target = tmp_path / "target"
    for content in ("first", "second", "third"):
        write_folder(target, content, disposable=False)
    assert [content_of(tmp_path / f"target{end}") for end in ("", ".kept", ".kept-2")] == ["third", "first", "second"]
    assert len(list(tmp_path.iterdir())) == 3 and str(tmp_path / "target.kept-2") in caplog.text


@pytest.mark.parametrize("exchange", [pytest.param(True, marks=linux), False])
def test_an_interruption_between_the_renames_brings_the_previous_version_back(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    write_folder(target, "first")
    if not exchange:
        monkeypatch.setattr(sys, "platform", "darwin")
    for last in range(1, 3 if exchange else 6):
        calls = iter(range(1, 10))

        def interrupt(source: Any, goal: Any, last: int = last, calls: Iterator[int] = calls) -> None:
            if next(calls) == last:
                raise KeyboardInterrupt

        with calls_of("rename", monkeypatch, interrupt), pytest.raises(KeyboardInterrupt):
            write_folder(target, "second")
        assert content_of(target) == "first" and list(tmp_path.iterdir()) == [target]
    write_folder(target, "second")
    assert content_of(target) == "second" and list(tmp_path.iterdir()) == [target]


# Readers and other writers


@linux
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_reader_finds_a_complete_version_at_every_instant(kind: str, tmp_path: Path) -> None:
    target, stop, wrong, reads = tmp_path / "target", threading.Event(), [], [0]
    writing = write if kind == "file" else write_folder
    writing(target, "0" * 10_000)

    def read() -> None:
        while not stop.is_set():
            reads[0] += 1
            try:
                text = target.read_text() if kind == "file" else (target / "inner/b").read_text()
                if len(text) != 10_000 or len(set(text)) != 1:
                    wrong.append(text)
            except OSError as error:
                wrong.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        writing(target, str(number % 10) * 10_000)
    stop.set()
    reader.join()
    assert not wrong and reads[0] > 1 and list(tmp_path.iterdir()) == [target]


def test_what_another_writer_still_writes_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_file(target) as slow:
        slow.write_text("slow")
        write(target, "quick")
        assert target.read_text() == "quick"
    assert target.read_text() == "slow" and list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed_before_the_next_write(tmp_path: Path) -> None:
    """And only that of the same target, and nothing whose name is no work folder's."""
    target, aside = tmp_path / "target", tmp_path / "aside"
    others = [tmp_path / name for name in (".target", ".target.writing", "target.writing")]
    for other in others:
        other.mkdir()
    for with_lock in (True, False):
        with atomic_file(target) as new:
            new.write_text("killed")
            work = new.parent.parent
            shutil.copytree(work, aside)
        if not with_lock:
            shutil.rmtree(aside)
            aside.mkdir()
        aside.rename(work)
        write(tmp_path / "targe", "another")
        assert work.exists()
        write(target, "next")
        assert target.read_text() == "next"
        assert {path.name for path in tmp_path.iterdir()} == {"target", "targe", *(other.name for other in others)}


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_nothing_is_taken_for_a_leftover_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network disks: whether its writer lives cannot be known."""
    import fcntl

    def flock(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    target = tmp_path / "target"
    with atomic_file(target) as locked:
        locked.write_text("locked")
        monkeypatch.setattr(fcntl, "flock", flock)
        with atomic_file(target) as slow:
            slow.write_text("slow")
            write(target, "quick")
        assert target.read_text() == "slow"
    assert target.read_text() == "locked" and list(tmp_path.iterdir()) == [target]


# Processes that are killed, or write the same: forked by one process of its own, which imports once

FORKS = """
import json, os, signal, sys
from pathlib import Path
from streamline_hooks.core import check_writable
from tests.core.test_atomic_files import content_of, write, write_folder

base = Path(sys.argv[1])
real = sys.platform

def fork(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def killed(writing, target, step):
    left = [step]
    def kill(event, arguments):
        if event.startswith(("os.", "shutil.", "open")):
            left[0] -= 1
            if left[0] < 0:
                signal.raise_signal(signal.SIGKILL)
    sys.addaudithook(kill)
    writing(target, "new")

def each_stage(name, writing):
    seen = []
    for step in range(1000):
        target = base / name / str(step) / "target"
        writing(target, "old")
        if ended(fork(lambda: killed(writing, target, step))) == 0:
            return seen
        left, missing = len(list(target.parent.iterdir())), not target.exists()
        check_writable(target, folder=name != "file")
        found = content_of(target)
        writing(target, "next")
        seen.append([missing, found, left, content_of(target), [path.name for path in target.parent.iterdir()]])

def both(name):
    for number in range(40):
        write(base / "both" / "file", name * 10_000)
        write_folder(base / "both" / "folder", name * 10_000)

result = {"file": each_stage("file", write), "folder": each_stage("folder", write_folder)}
children = [fork(lambda: both(name)) for name in "ab"]
result["both"] = [ended(child) for child in children]
sys.platform = "darwin"  # where folders cannot change places in one step
result["no exchange"] = each_stage("no exchange", write_folder)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    if sys.platform != "linux":
        pytest.skip("folders change places in one step on Linux alone")
    base = tmp_path_factory.mktemp("forks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(base)],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return base, json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["file", "folder", "no exchange"])
def test_a_process_killed_at_any_stage_leaves_one_version_and_no_litter(
    kind: str, forks: tuple[Path, dict[str, Any]]
) -> None:
    seen = forks[1][kind]
    assert len(seen) > 10
    assert {found for _, found, *_ in seen} == {"old", "new"}  # complete; where it was missing, a check brought it back
    assert any(count > 1 for _, _, count, *_ in seen)  # what a killed process leaves
    assert all(after == "next" and names == ["target"] for *_, after, names in seen)
    missing = [missing for missing, *_ in seen]
    assert any(missing) if kind == "no exchange" else not any(missing)


def test_two_processes_leave_one_complete_version(forks: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = forks[0] / "both", forks[1]["both"]
    assert ended == [0, 0] and sorted(path.name for path in folder.iterdir()) == ["file", "folder"]
    for name in ("file", "folder"):
        assert content_of(folder / name) in ("a" * 10_000, "b" * 10_000)


# Whether a place can be written


def test_the_check_changes_nothing(tmp_path: Path) -> None:
    for name, folder in (("file", False), ("folder", True), ("deep/er/file", False)):
        check_writable(tmp_path / name, folder=folder)
    assert not list(tmp_path.iterdir())
    write_folder(tmp_path / "folder", "first")
    check_writable(tmp_path / "folder", folder=True)
    assert content_of(tmp_path / "folder") == "first" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("name", ["file/out", "file/deep/out", "x" * 256, "ü" * 128, "x" * 300 + "/out"])
def test_what_cannot_be_written_is_known_beforehand(name: str, folder: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StreamlineError, match=r"(?s)failed.*(Not a directory|File exists|name too long)"):
        check_writable(tmp_path / name, folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["x" * 240, "x" * 255, "ü" * 127])
def test_long_names_that_the_system_takes_are_written(name: str, tmp_path: Path) -> None:
    for folder in (True, False):
        check_writable(tmp_path / name, folder=folder)
    write(tmp_path / name, "first")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path: Path) -> None:
    write(tmp_path / "file", "first")
    check_writable(tmp_path / "file")
    with pytest.raises(StreamlineError, match=r"file is a file.*Choose"):
        check_writable(tmp_path / "file", folder=True)
    with pytest.raises(StreamlineError, match=r"is a folder.*Choose"):
        check_writable(tmp_path)
    with pytest.raises(StreamlineError, match="Writing / failed"):
        check_writable("/", folder=True)


def test_a_folder_that_forbids_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(path: Any, *_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with calls_of("mkdir", monkeypatch, forbid), pytest.raises(StreamlineError, match="Permission denied"):
        check_writable(tmp_path / "target")
