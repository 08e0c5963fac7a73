"""What is looked at in a checkpoint's folder before anything of it is loaded.

Loading reads JSON and safetensors, which run nothing, from this folder and from nowhere else.
"""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from streamline_hooks.checkpoint.checksums import check_checksums
from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
PLAIN = "streamline.json"  # describes a model that is no Transformers model, which has no configuration
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def check_folder(folder: Path, *, code: bool = False, described_by: str = CONFIG) -> dict[str, Any]:
    """Raise unless a folder holds a whole checkpoint that names nothing outside it.

    Parameters
    ----------
    folder : Path
    code : bool
        Whether code that it names may be run.
    described_by : str
        The file that says what is in it: its configuration, or `PLAIN`.

    Returns
    -------
    dict
        What that file holds.

    Raises
    ------
    StreamlineError
        The text names the file and, where there is one, the key.
    """
    if not folder.is_dir():
        raise StreamlineError(f"{folder} is no folder. Give one that streamline_hooks.save wrote.")
    if not (folder / described_by).is_file():
        raise StreamlineError(f"{folder} holds no model: {described_by} is missing. Give a folder that `save` wrote.")
    config = read_json(folder / described_by)
    auto_map = config.get("auto_map", {})
    if not isinstance(auto_map, dict) or None in auto_map.values():
        raise StreamlineError(
            f"{folder / described_by}, auto_map: {auto_map!r} does not name a class for each entry. Delete the entry, "
            "or save the model again."
        )
    if code:
        _check_code(folder, config)
    if described_by == CONFIG:
        _check_kernels(folder, config)
    if (folder / "adapter_config.json").exists():
        raise StreamlineError(
            f"{folder / 'adapter_config.json'} makes this folder an adapter of a model that is elsewhere. Load that "
            "model, then the adapter with peft.PeftModel.from_pretrained."
        )
    index = folder / INDEX
    if index.is_file() and (folder / WEIGHTS).is_file():
        raise StreamlineError(
            f"{folder} holds {WEIGHTS} and {INDEX} both, the weights in one file and in several. Delete the one that "
            "is not meant."
        )
    files = _shards(index) if index.is_file() else {WEIGHTS: None}
    for name, keys in files.items():
        _check_weights(folder, name, keys)
    check_checksums(folder)
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises
    ------
    StreamlineError
        If it is none.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StreamlineError(f"{file} cannot be read as JSON: {error}. Copy the folder again.") from error
    if not isinstance(content, dict):
        raise StreamlineError(
            f"{file} holds a {type(content).__name__}; expected a JSON object. Copy the folder again."
        )
    return content


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    """Raise if the configuration names code of another repository, which asking for this folder's would run."""
    for key, said in config.get("auto_map", {}).items():
        for name in said if isinstance(said, list) else [said]:
            if name is not None and (not isinstance(name, str) or "--" in name or not _is_plain(name)):
                raise StreamlineError(
                    f"{folder / CONFIG}, auto_map.{key}: {name!r} is code outside this folder; it is not run. Expected "
                    "the name of a file in it and of a class, such as modeling_streamline_hooks.StreamlinedConfig."
                )


def _check_kernels(folder: Path, said: dict[str, Any], path: str = "") -> None:
    """Raise if the configuration, or one inside it, names an implementation that would be fetched from elsewhere."""
    for key, value in said.items():
        if key.lstrip("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
            raise StreamlineError(
                f"{folder / CONFIG}, {path}{key}: {value!r} is code outside this folder; it is not run. Delete the "
                "entry, or load the model with Transformers where you trust it."
            )
        if isinstance(value, dict):
            _check_kernels(folder, value, f"{path}{key}.")


def _shards(index: Path) -> dict[str, list[str] | None]:
    """The files that an index names, and the keys that each is said to hold."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise StreamlineError(f"{index}, weight_map: expected which file holds which weight. Copy the folder again.")
    files: dict[str, list[str] | None] = {}
    for key, name in where.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise StreamlineError(
                f"{index}, weight_map.{key}: {name!r} is outside this folder; it is not read. Expected a file in it."
            )
        files.setdefault(name, [])
        files[name] = [*(files[name] or []), key]
    return files


def _is_plain(name: str) -> bool:
    """Whether a name is one in a folder, and no path to somewhere else."""
    return PureWindowsPath(name).name == name and name not in ("", "..")  # Windows separates by / too


def _check_weights(folder: Path, name: str, keys: list[str] | None) -> None:
    """Raise unless a file of weights is whole and holds what the index says."""
    file = folder / name
    if not file.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if keys is None and pickles:
            raise StreamlineError(
                f"{folder} holds its weights in {pickles[0]}, a format that can run code when it is read; it is not "
                "read. Expected safetensors: load the model where you trust it, and save it again."
            )
        said = f"; {INDEX} says that it holds {keys[0]}" if keys else ""
        raise StreamlineError(f"{file} is missing{said}. Copy the folder again.")
    if file.suffix != ".safetensors":
        raise StreamlineError(f"{INDEX} names {name}, which is no safetensors file; it is not read.")
    try:
        with safe_open(file, framework="pt") as opened:
            present = set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise StreamlineError(
            f"{file} is damaged or cut off: {error}. Copy it again, or save the model again."
        ) from error
    lost = sorted(set(keys or ()) - present)
    if lost:
        raise StreamlineError(f"{file} does not hold {lost[0]}, as {INDEX} says. The two are of different models.")
