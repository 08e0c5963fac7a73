"""The files that sentence-transformers keeps beside a Transformers checkpoint: its modules, pooling and lengths.

``modules.json`` lists the modules that follow the model. Without it sentence-transformers takes the mean over the
tokens, whatever the original does, and says so in a log only.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from streamline_hooks.errors import StreamlineError

MODULES = "modules.json"
_ROOT_FILES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
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
    """A folder of sentence-transformers: the class and path of each module, "" for the Transformers model."""

    folder: Path
    modules: tuple[tuple[str, str], ...]

    @property
    def is_embedding(self) -> bool:
        """Whether it pools the states of its model to one vector a text, so that the model is used without a head."""
        file = self.folder / "config_sentence_transformers.json"
        kind = _object(file).get("model_type", "SentenceTransformer") if file.is_file() else "SentenceTransformer"
        return kind == "SentenceTransformer" and any(name == "Pooling" for name, _ in self.modules)

    @property
    def pooling(self) -> str:
        """Return the pooling as `streamline_hooks.task.Task` names it; raise if there is another one, or several."""
        paths = [path for name, path in self.modules if name == "Pooling"]
        if len(paths) != 1:
            raise StreamlineError(
                f"{self.folder / MODULES} lists {len(paths)} Pooling modules; expected one. Give --task "
                "embedding:pooling=mean, first, last or pooler."
            )
        return pooling_of(self.folder / paths[0] / "config.json")

    def copy_to(self, target: Path) -> None:
        """Copy ``modules.json``, the configurations and the folders of all modules but the model."""
        for pattern in _ROOT_FILES:
            for file in self.folder.glob(pattern):
                shutil.copyfile(file, target / file.name)
        for _, path in self.modules:
            if path and (self.folder / path).is_dir():
                shutil.copytree(self.folder / path, target / path, copy_function=shutil.copyfile)


def pooling_of(file: Path) -> str:
    """Read the pooling (mean, first or last) from a ``1_Pooling/config.json`` of any sentence-transformers version."""
    said = _object(file)
    if "pooling_mode" in said:
        named = said["pooling_mode"]
        modes = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    else:
        modes = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise StreamlineError(
            f"{file} pools by {', '.join(modes) or 'nothing'}, which is not known here; say --task "
            "embedding:pooling=mean, first, last or pooler."
        )
    return _POOLINGS[modes[0]]


def find_sentence_folder(name: str | Path) -> SentenceFolder | None:
    """Return the sentence-transformers folder of a path or cached hub model, or None if it is not one.

    Raise if ``modules.json`` is damaged or points outside the folder, if files are missing, or if the Transformers
    checkpoint is in a sub-folder.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _cached(str(name)) or folder
    if not (folder / MODULES).is_file():
        above = folder.absolute().parent
        if folder.is_dir() and (above / MODULES).is_file() and folder.name in [p for _, p in _modules(above)]:
            raise _inside(above, folder.name)
        return None
    found = SentenceFolder(folder, tuple(_modules(folder)))
    if not any(path == "" for _, path in found.modules):
        raise _inside(folder, found.modules[0][1])
    for kind, path in found.modules:
        if path == "" and not kind.endswith("Transformer"):
            raise StreamlineError(
                f"{folder / MODULES} has a {kind} in the folder itself; expected a Transformer, which holds a "
                "Transformers checkpoint. Load and compress its model in Python, and put it back there."
            )
        if path and kind not in _WITHOUT_FILES and not any((folder / path).glob("*")):
            raise StreamlineError(
                f"{folder / path} is missing or empty, and {MODULES} lists it as a {kind}. Copy or download the whole "
                "folder again."
            )
    return found


def sentence_folder_of(model: Any) -> SentenceFolder | None:
    """Return the sentence-transformers folder that a model in memory was loaded from, or None."""
    name = getattr(model, "name_or_path", None)
    return find_sentence_folder(name) if isinstance(name, str) and name else None


def download_sentence_files(name: str) -> None:
    """Bring what sentence-transformers keeps of a model on the hub to the local cache, if there is something."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[MODULES]))
        if (folder / MODULES).is_file():
            folders = [f"{path}/*" for _, path in _modules(folder) if path]
            snapshot_download(name, allow_patterns=[*_ROOT_FILES, *folders])
    except (OSError, ValueError):
        return  # no such model, or no network: who loads it says what is wrong


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Read the class names and paths in ``modules.json``."""
    file = folder / MODULES
    said = _json(file)
    found = []
    for entry in said if isinstance(said, list) and said else [None]:
        kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise StreamlineError(
                f"{file} holds {entry!r}; expected a list of objects with a type and a path. Copy the folder again."
            )
        if path and (PurePosixPath(path).name != path or PureWindowsPath(path).name != path or path == ".."):
            raise StreamlineError(
                f"{file} names {path!r}, which is not a folder in it; it is not read. Expected a name such as "
                "1_Pooling. Correct the path."
            )
        if not kind.startswith("sentence_transformers."):
            raise StreamlineError(
                f"{file} names {kind}, which may need code that is elsewhere; expected a module of "
                "sentence_transformers. Remove the entry, or compress the model apart and put it back there."
            )
        found.append((kind.rpartition(".")[2], path))
    return found


def _inside(folder: Path, path: str) -> StreamlineError:
    return StreamlineError(
        f"{folder / MODULES} has the model in the sub-folder {path!r}, the layout of an early sentence-transformers; "
        "expected config.json in the folder itself. Write it anew: SentenceTransformer(folder).save(new_folder)."
    )


def _object(file: Path) -> dict[str, Any]:
    said = _json(file)
    if not isinstance(said, dict):
        raise StreamlineError(f"{file} holds a {type(said).__name__}; expected a JSON object. Copy the folder again.")
    return said


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StreamlineError(f"{file} cannot be read as JSON: {error}. Copy the folder again.") from error


def _cached(name: str) -> Path | None:
    """Return the folder of the local cache that holds a model of the hub."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, MODULES)
    except ValueError:  # no name on the hub
        return None
    return Path(found).parent if isinstance(found, str) else None
