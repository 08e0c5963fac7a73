"""Read and copy the files of sentence-transformers in the folder of a Transformers checkpoint.

``modules.json`` lists the modules that follow the model. Without this file sentence-transformers pools by the mean over
the tokens, without a warning.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from streamline_hooks.core import StreamlineError, load_json, read_json

MODULES_FILE = "modules.json"
HUB_REVISION = "_streamline_hub_revision"
"""Attribute with the revision of a model that was not loaded from the main branch of the hub."""
_ROOT_FILES = (MODULES_FILE, "config_sentence_transformers.json", "sentence_*_config.json")
_WITHOUT_FILES = ("Normalize",)  # modules that may have no folder
_POOLINGS = {
    "mean": "mean",
    "cls": "first",
    "lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class SentenceFolder:
    """A folder of sentence-transformers.

    Attributes
    ----------
    folder : pathlib.Path
    modules : tuple of (str, str)
        Class name and path of each module; the path of the Transformers model is "".
    """

    folder: Path
    modules: tuple[tuple[str, str], ...]

    @property
    def is_embedding(self) -> bool:
        """Whether the folder pools hidden states into one vector per text and uses the model without a head."""
        file, default = self.folder / "config_sentence_transformers.json", "SentenceTransformer"
        kind = read_json(file).get("model_type", default) if file.is_file() else default
        return kind == default and any(name == "Pooling" for name, _ in self.modules)

    @property
    def pooling(self) -> str:
        """Name of the pooling in `Task`. Raises `StreamlineError` unless there is exactly one known pooling."""
        paths = [path for name, path in self.modules if name == "Pooling"]
        if len(paths) != 1:
            raise StreamlineError(
                f"{self.folder / MODULES_FILE} lists {len(paths)} Pooling modules. Expected one. Set --task "
                "embedding:pooling=mean, first, last or pooler."
            )
        return pooling_of(self.folder / paths[0] / "config.json")

    def copy_to(self, target: Path) -> None:
        """Copy ``modules.json``, the configurations, and the folders of all modules except the model."""
        for pattern in _ROOT_FILES:
            for file in self.folder.glob(pattern):
                shutil.copyfile(file, target / file.name)
        for _, path in self.modules:
            if path and (self.folder / path).is_dir():
                shutil.copytree(self.folder / path, target / path, copy_function=shutil.copyfile)


def pooling_of(file: Path) -> str:
    """Read the pooling (mean, first or last) from a ``1_Pooling/config.json`` of any sentence-transformers version."""
    config = read_json(file)
    modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if "pooling_mode" in config:
        value = config["pooling_mode"]
        modes = [str(mode) for mode in (value if isinstance(value, list) else [value])]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise StreamlineError(
            f"{file} has the pooling {', '.join(modes) or 'none'}. Expected one of {', '.join(_POOLINGS)}. Set --task "
            "embedding:pooling=mean, first, last or pooler."
        )
    return _POOLINGS[modes[0]]


def find_sentence_folder(name: str | Path, revision: str | None = None) -> SentenceFolder | None:
    """Return the sentence-transformers folder of a path or a cached hub model, or None if there is none.

    `revision` of a hub model defaults to the main branch. Raises `StreamlineError` if ``modules.json`` is damaged or
    names a path outside the folder, if files are missing, or if the Transformers checkpoint is in a sub-folder.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        with suppress(ValueError):  # not a valid repository name of the hub
            if isinstance(cached := try_to_load_from_cache(str(name), MODULES_FILE, revision=revision), str):
                folder = Path(cached).parent
    if not (folder / MODULES_FILE).is_file():
        above = folder.absolute().parent
        if folder.is_dir() and (above / MODULES_FILE).is_file() and folder.name in [p for _, p in _modules(above)]:
            raise _inside(above, folder.name)
        return None
    sentence_folder = SentenceFolder(folder, tuple(_modules(folder)))
    if not any(path == "" for _, path in sentence_folder.modules):
        raise _inside(folder, sentence_folder.modules[0][1])
    for kind, path in sentence_folder.modules:
        if path == "" and not kind.endswith("Transformer"):
            raise StreamlineError(
                f"{folder / MODULES_FILE} has a {kind} in the folder itself. Expected a Transformer, whose files are a "
                "Transformers checkpoint. Load and compress its model in Python, and save it there."
            )
        if path and kind not in _WITHOUT_FILES and not any((folder / path).glob("*")):
            raise StreamlineError(
                f"{folder / path} is missing or empty, but {MODULES_FILE} lists it as a {kind}. Expected its files. "
                "Copy or download the whole folder again."
            )
    return sentence_folder


def sentence_folder_of(model: Any) -> SentenceFolder | None:
    """Return the sentence-transformers folder from which a model was loaded, or None."""
    name = getattr(model, "name_or_path", None)
    revision = getattr(model, HUB_REVISION, None)
    return find_sentence_folder(name, revision) if isinstance(name, str) and name else None


def download_sentence_files(name: str, revision: str | None = None) -> None:
    """Download the sentence-transformers files of a hub model, if any, to the local cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[MODULES_FILE]))
        if (folder / MODULES_FILE).is_file():
            folders = [f"{path}/*" for _, path in _modules(folder) if path]
            snapshot_download(name, revision=revision, allow_patterns=[*_ROOT_FILES, *folders])
    except (OSError, ValueError):
        return  # no such model, or no network; loading the model will raise


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Read the class names and paths in ``modules.json``."""
    file = folder / MODULES_FILE
    entries = load_json(file)
    modules = []
    for entry in entries if isinstance(entries, list) and entries else [None]:
        kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise StreamlineError(
                f"{file} contains {entry!r}. Expected a list of objects with a type and a path. Copy the folder again."
            )
        if path and (PurePosixPath(path).name != path or PureWindowsPath(path).name != path or path == ".."):
            raise StreamlineError(
                f"{file} names the path {path!r}, which is not directly inside the folder and is not read. Expected a "
                "name such as 1_Pooling. Correct the path."
            )
        if not kind.startswith("sentence_transformers."):
            raise StreamlineError(
                f"{file} names {kind}, which may need other code. Expected a module of sentence_transformers. Remove "
                "the entry, or compress the model outside this folder and copy it back."
            )
        modules.append((kind.rpartition(".")[2], path))
    return modules


def _inside(folder: Path, path: str) -> StreamlineError:
    return StreamlineError(
        f"{folder / MODULES_FILE} has the model in the sub-folder {path!r}, a layout of early sentence-transformers "
        "versions. Expected config.json in the folder itself. Save the folder again: "
        "SentenceTransformer(folder).save(new_folder)."
    )
