"""Validate checkpoint folders, and write checksums in the format of ``sha256sum --check``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from streamline_hooks.core import StreamlineError, atomic_file, progress_bar, read_json

CHECKSUMS = "SHA256SUMS"
_REQUIRED = ("*.safetensors", "config.json", "streamline.json", "*.py")  # directly in the folder; must have a checksum
# Descriptions that no loader reads; they may be rewritten after the model was saved.
_DESCRIPTIONS = ("README.md", "report.json", "report.html", "evaluation.json", "measured.json", "figures/*")
_AT_ONCE = 1 << 24  # bytes


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in a folder and its sub-folders, after all other files."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    _write(folder, _digests(folder, [name for name in names if name != CHECKSUMS]))


def update_checksums(folder: Path) -> None:
    """Update the checksums of card, report and page; other files keep theirs, so damage is still detected."""
    if not (folder / CHECKSUMS).is_file():
        return
    listed = _listed_checksums(folder)
    unchanged = {name: digest for name, digest in listed.items() if not _is_description(name)}
    # A figure that was not listed is the user's, and `save` replaces only folders whose files are listed.
    descriptions = [name for name in {*_DESCRIPTIONS, *listed} if _is_description(name)]
    try:
        _write(folder, unchanged | _digests(folder, descriptions))
    except OSError as error:
        raise StreamlineError(
            f"{folder / CHECKSUMS} cannot be updated: {error}. Free disk space and write the page again, or delete "
            f"{CHECKSUMS}."
        ) from error


def check_checksums(folder: Path) -> None:
    """Raise if a file is missing, has no checksum or differs from it; a folder without checksums passes.

    Card, report and page may be edited. Added files pass unless they are weights, config or code.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    expected = {name: digest for name, digest in _listed_checksums(folder).items() if not _is_description(name)}
    required = {file.name for pattern in _REQUIRED for file in folder.glob(pattern)}
    present = _digests(folder, expected.keys() | required)
    for name in sorted(expected.keys() | present.keys()):
        if present.get(name) != expected.get(name):
            problem = "is missing" if name not in present else "is not the file that was written"
            raise StreamlineError(
                f"{folder / name} {problem}, according to {CHECKSUMS}. Copy the folder again. If the change is "
                f"intended, delete {CHECKSUMS}."
            )


def _listed_checksums(folder: Path) -> dict[str, str]:
    """Read the checksums file of a folder; return the checksums by file name."""
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    entries = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(entry) != 2 or len(entry[0]) != 64 or not _is_inside(entry[1]) for entry in entries):
        raise StreamlineError(
            f"{folder / CHECKSUMS} is invalid. Expected lines with a SHA-256 and the name of a file in the folder. "
            f"Copy the folder again, or delete {CHECKSUMS}."
        )
    return {name: digest for digest, name in entries}


def _is_inside(name: str) -> bool:
    """Whether a name is a relative path inside the folder."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\\" not in name


def _is_description(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _DESCRIPTIONS)


def _write(folder: Path, digests: Mapping[str, str]) -> None:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    with atomic_file(folder / CHECKSUMS) as temporary_path:
        temporary_path.write_text(lines, encoding="utf-8")


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each named file that exists."""
    files = {name: folder / name for name in sorted(names) if (folder / name).is_file()}
    digests: dict[str, str] = {}
    with progress_bar(sum(file.stat().st_size for file in files.values()), "checksums", "B") as bar:
        for name, file in files.items():
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while piece := stream.read(_AT_ONCE):
                    digest.update(piece)
                    bar.update(len(piece))
            digests[name] = digest.hexdigest()
    return digests


CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
DESCRIPTION = "streamline.json"  # describes a model outside Transformers
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def check_folder(folder: Path, *, code: bool = False, described_by: str = CONFIG) -> dict[str, Any]:
    """Return the description of a checkpoint; raise unless the folder is complete and refers to nothing outside it.

    `code` is whether code in the folder may run; `described_by` is the file of the description, `CONFIG` or
    `DESCRIPTION`.
    """
    if not folder.is_dir():
        raise StreamlineError(
            f"{folder} is not a folder. Expected one that streamline_hooks.save wrote. Check the path."
        )
    if not (folder / described_by).is_file():
        raise StreamlineError(
            f"{folder} contains no model: {described_by} is missing. Pass a folder that `save` wrote."
        )
    config = read_json(folder / described_by)
    auto_map = config.get("auto_map", {})
    if not isinstance(auto_map, dict) or None in auto_map.values():
        raise StreamlineError(
            f"{folder / described_by}, auto_map: {auto_map!r} is invalid. Expected a class for each entry. Delete the "
            "entry, or save the model again."
        )
    if code:
        _check_code(folder, config)
    if described_by == CONFIG:
        _check_kernels(folder, config)
    if (folder / "adapter_config.json").exists():
        raise StreamlineError(
            f"{folder / 'adapter_config.json'}: the folder contains an adapter, not a model. Load the base model, then "
            "the adapter with peft.PeftModel.from_pretrained."
        )
    index = folder / INDEX
    if index.is_file() and (folder / WEIGHTS).is_file():
        raise StreamlineError(
            f"{folder} contains both {WEIGHTS} (weights in one file) and {INDEX} (weights in several files). Delete "
            "the wrong one."
        )
    files = _shards(index) if index.is_file() else {WEIGHTS: []}
    for name, keys in files.items():
        _check_weights(folder, name, keys)
    check_checksums(folder)
    return config


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    """Raise if the config refers to code outside the folder."""
    for key, classes in config.get("auto_map", {}).items():
        for name in classes if isinstance(classes, list) else [classes]:
            if name is not None and (not isinstance(name, str) or "--" in name or not _is_file_name(name)):
                raise StreamlineError(
                    f"{folder / CONFIG}, auto_map.{key}: {name!r} is code outside this folder, which is not run. "
                    "Expected a file in the folder and a class, such as modeling_streamline_hooks.StreamlinedConfig. "
                    "Correct or delete the entry."
                )


def _check_kernels(folder: Path, config: dict[str, Any], path: str = "") -> None:
    """Raise if the config, or a nested config, names a kernel that would be downloaded."""
    for key, value in config.items():
        if key.lstrip("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
            raise StreamlineError(
                f"{folder / CONFIG}, {path}{key}: {value!r} is code outside this folder, which is not run. Delete "
                "the entry, or load the model with Transformers if you trust the code."
            )
        if isinstance(value, dict):
            _check_kernels(folder, value, f"{path}{key}.")


def _shards(index: Path) -> dict[str, list[str]]:
    """Return the keys in each file of an index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StreamlineError(
            f"{index}, weight_map is invalid. Expected a mapping of weights to files. Copy the folder again."
        )
    files: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _is_file_name(name):
            raise StreamlineError(
                f"{index}, weight_map.{key}: {name!r} is outside this folder, which is not read. Expected a "
                "file in it. Copy the folder again."
            )
        files.setdefault(name, []).append(key)
    return files


def _is_file_name(name: str) -> bool:
    """Whether a name is the name of a file, not a path."""
    return PureWindowsPath(name).name == name and name not in ("", "..")  # also splits at /


def _check_weights(folder: Path, name: str, keys: list[str]) -> None:
    """Raise unless a file of weights is readable and contains the keys; `keys` is empty without an index."""
    file = folder / name
    if not file.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if not keys and pickles:
            raise StreamlineError(
                f"{folder} contains its weights in {pickles[0]}, a format that can run code when it is read. Expected "
                "safetensors. If you trust the file, load the model with its own library and save it again."
            )
        hint = f"; according to {INDEX} it contains {keys[0]}" if keys else ""
        raise StreamlineError(f"{file} is missing{hint}. Copy the folder again.")
    if file.suffix != ".safetensors":
        raise StreamlineError(f"{INDEX} names {name}. Expected a safetensors file. Copy the folder again.")
    try:
        with safe_open(file, framework="pt") as file_handle:
            present = set(file_handle.keys())
    except (SafetensorError, OSError) as error:
        raise StreamlineError(
            f"{file} is damaged or incomplete: {error}. Copy it again, or save the model again."
        ) from error
    if missing := sorted(set(keys) - present):
        raise StreamlineError(
            f"{file} does not contain {missing[0]}, which {INDEX} expects there. Copy the folder again."
        )
