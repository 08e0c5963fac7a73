"""The checksums of the files in a checkpoint folder, in the format of ``sha256sum --check``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from streamline_hooks.core.files import atomic_file
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import progress

FILE = "SHA256SUMS"
_REQUIRED = ("*.safetensors", "config.json", "streamline.json", "*.py")  # of the folder itself; never left out
# What says something about the model and is read by nobody who loads it. It may be written again after the model was.
_DESCRIPTIONS = ("README.md", "report.json", "report.html", "evaluation.json", "measured.json", "figures/*")
_AT_ONCE = 1 << 24  # bytes


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in a folder and its sub-folders; call it after everything else was written."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    _write(folder, _digests(folder, [name for name in names if name != FILE]))


def update_checksums(folder: Path) -> None:
    """Bring the checksums of the card, the report and the page up to date, in a folder that has checksums.

    Those of all other files stay, so that a damaged file is not taken for the one that was written.

    Raises
    ------
    StreamlineError
        If the checksums cannot be read or written.
    """
    if not (folder / FILE).is_file():
        return
    kept = {name: digest for name, digest in _listed(folder).items() if not _is_description(name)}
    found = [file.relative_to(folder).as_posix() for pattern in _DESCRIPTIONS for file in folder.glob(pattern)]
    try:
        _write(folder, kept | _digests(folder, found))
    except OSError as error:
        raise StreamlineError(
            f"{folder / FILE} cannot be brought up to date: {error}. Make room, write the page again, or delete {FILE}."
        ) from error


def check_checksums(folder: Path) -> None:
    """Compare the files in a folder with their checksums, if it has any.

    The card, the report and the page are left out: they may be edited. Files that were added are accepted unless they
    are weights, configuration or code; folders of earlier versions list only these.

    Raises
    ------
    StreamlineError
        If a file has another checksum, has none, or is gone.
    """
    if not (folder / FILE).is_file():
        return
    expected = {name: digest for name, digest in _listed(folder).items() if not _is_description(name)}
    required = {file.name for pattern in _REQUIRED for file in folder.glob(pattern)}
    present = _digests(folder, expected.keys() | required)
    for name in sorted(expected.keys() | present.keys()):
        if present.get(name) != expected.get(name):
            what = "is missing" if name not in present else "is not the file that was written"
            raise StreamlineError(
                f"{folder / name} {what}: {FILE} beside it says otherwise. Copy the folder again; or, if something "
                f"else than streamline_hooks.save wrote into it, and is meant, delete {FILE}."
            )


def _listed(folder: Path) -> dict[str, str]:
    """Return the checksums that a folder's file lists, by name."""
    entries = [line.split(maxsplit=1) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
    entries = [entry for entry in entries if entry]
    if any(len(entry) != 2 or len(entry[0]) != 64 or not _is_inside(entry[1]) for entry in entries):
        raise StreamlineError(
            f"{folder / FILE} holds no checksums; expected lines of a SHA-256 and the name of a file in the folder. "
            f"Copy the folder again, or delete {FILE}."
        )
    return {name: digest for digest, name in entries}


def _is_inside(name: str) -> bool:
    """Whether a name is a path to a place below the folder."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\\" not in name


def _is_description(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _DESCRIPTIONS)


def _write(folder: Path, digests: Mapping[str, str]) -> None:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    with atomic_file(folder / FILE) as new:
        new.write_text(lines, encoding="utf-8")


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of those of the named files that exist."""
    files = {name: folder / name for name in sorted(names) if (folder / name).is_file()}
    found: dict[str, str] = {}
    with progress(sum(file.stat().st_size for file in files.values()), "checksums", "B") as bar:
        for name, file in files.items():
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while piece := stream.read(_AT_ONCE):
                    digest.update(piece)
                    bar.update(len(piece))
            found[name] = digest.hexdigest()
    return found
