"""The checksums of what makes a model of a folder, as ``sha256sum --check`` reads them too."""

from __future__ import annotations

import hashlib
from pathlib import Path

from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import progress

FILE = "SHA256SUMS"
_COVERED = ("*.safetensors", "config.json", "streamline.json", "*.py")
_AT_ONCE = 1 << 24  # bytes


def write_checksums(folder: Path) -> None:
    """Write the checksums of the weights, the configuration and the code in a folder beside them."""
    (folder / FILE).write_text("".join(f"{digest}  {name}\n" for name, digest in _digests(folder).items()))


def check_checksums(folder: Path) -> None:
    """Compare the weights, the configuration and the code in a folder with their checksums, if it has any.

    Raises
    ------
    StreamlineError
        If a file has another checksum, has none, or is gone.
    """
    if not (folder / FILE).is_file():
        return
    entries = [line.split(maxsplit=1) for line in (folder / FILE).read_text().splitlines() if line.strip()]
    if any(len(entry) != 2 or len(entry[0]) != 64 for entry in entries):
        raise StreamlineError(f"{folder / FILE} holds no checksums; expected lines of a SHA-256 and a file's name.")
    expected = {name: said for said, name in entries}
    present = _digests(folder)
    for name in sorted(expected.keys() | present.keys()):
        if present.get(name) != expected.get(name):
            what = "is missing" if name not in present else "is not the file that was written"
            raise StreamlineError(
                f"{folder / name} {what}: {FILE} beside it says otherwise. Copy the folder again; or, if something "
                f"else than streamline_hooks.save wrote into it, and is meant, delete {FILE}."
            )


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file that is covered, by its name."""
    files = sorted(file for pattern in _COVERED for file in folder.glob(pattern))
    found: dict[str, str] = {}
    with progress(sum(file.stat().st_size for file in files), "checksums", "B") as bar:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while piece := stream.read(_AT_ONCE):
                    digest.update(piece)
                    bar.update(len(piece))
            found[file.name] = digest.hexdigest()
    return found
