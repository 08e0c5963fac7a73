"""Tell what this library wrote to a folder from everything else, which is never deleted."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from streamline_hooks.checkpoint.card import FILE as CARD
from streamline_hooks.checkpoint.checksums import FILE as CHECKSUMS
from streamline_hooks.checkpoint.safety import CONFIG, PLAIN, read_json
from streamline_hooks.errors import StreamlineError

# Names that `save`, the tokenizers and processors that it saves, and the commands that add a page write. Further ones
# are listed in the checksums.
_NAMES = frozenset(
    {
        CHECKSUMS, CARD, CONFIG, PLAIN, "generation_config.json", "report.json", "report.html", "evaluation.json",
        "measured.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
        "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json",
    }
)  # fmt: skip
_PATTERNS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|figures/[a-z_]+\.(svg|png)"
    r"|(additional_)?chat_templates/[^/]+\.jinja"
)


def foreign_files(folder: Path, most: int = 4) -> list[str]:
    """Return the first paths in a folder that `save` did not write, relative to it.

    Parameters
    ----------
    folder : Path
        Its content counts as written by `save` if it has the checksums, and either the record of a surgery in
        ``config.json`` or ``streamline.json`` or the tag of this library in the model card: then the files that the
        checksums list or that `save` gives these names. Without these marks everything in it is foreign, and so are
        symbolic links, and folders that are empty or cannot be read.
    most : int
        How many to look for.

    Returns
    -------
    list of str
        Empty if `save` wrote all of it, and for an empty folder.
    """
    listed = _listed(folder) if _is_marked(folder) else None
    foreign: list[str] = []
    for path, folders, files in os.walk(folder, onerror=lambda error: foreign.append(str(error.filename))):
        folders.sort()
        here = Path(path).relative_to(folder)
        links = [name for name in folders if Path(path, name).is_symlink()]
        if not files and not folders and Path(path) != folder:
            foreign.append(f"{here.as_posix()}/")
        for name in sorted([*files, *links]):
            relative = (here / name).as_posix()
            known = listed is not None and (
                relative in _NAMES or relative in listed or _PATTERNS.fullmatch(relative) is not None
            )
            if not known or Path(path, name).is_symlink():
                foreign.append(relative)
        if len(foreign) >= most:
            break
    return foreign[:most]


def _is_marked(folder: Path) -> bool:
    if not (folder / CHECKSUMS).is_file():
        return False
    if any("streamline_hooks" in _content(folder / name) for name in (CONFIG, PLAIN)):
        return True
    header = _text(folder / CARD).split("\n---", 1)[0]
    return header.startswith("---") and "\n- streamline_hooks" in header


def _listed(folder: Path) -> set[str]:
    entries = [line.split(maxsplit=1) for line in _text(folder / CHECKSUMS).splitlines()]
    return {entry[1] for entry in entries if len(entry) == 2}


def _content(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except StreamlineError:
        return {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
