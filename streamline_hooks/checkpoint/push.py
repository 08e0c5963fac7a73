"""Upload a saved checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from streamline_hooks.checkpoint.safety import CHECKSUMS, CONFIG, DESCRIPTION, check_folder
from streamline_hooks.checkpoint.save import is_checkpoint, saved_files
from streamline_hooks.core import StreamlineError, read_json, validate_arguments

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

_MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*", "adapter_*", "*.py")
"""Patterns of files that Transformers may load as part of a model."""
_REPORTS = ("report.json", "evaluation.json", "measured.json")
_PAGE = "report.html"


@validate_arguments()
def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a checkpoint to the Hugging Face Hub in one commit.

    Only files written by `save` and `write_report` are uploaded: the model, config, tokenizer, card and report. A
    warning lists all other files in the folder, such as optimizer states or notes. Existing files of the repository are
    kept. If they include weights, adapters or code that the folder does not have, the upload is refused, because
    Transformers could load them instead of the new model. The folder is not changed.

    Another warning lists uploaded files that contain absolute paths of this machine, or samples of generated text,
    whose prompts come from the test data.

    Parameters
    ----------
    folder : str or Path
        Folder written by `save` or `compress`.
    repo_id : str
        Name of the repository, such as ``"my-name/my-model-small"``. It is created if it does not exist.
    private : bool
        Create a private repository; default False. An existing public repository is then refused.
    token : str, optional
        Access token with write permission; by default that of ``hf auth login`` or the variable ``HF_TOKEN``.
    endpoint : str, optional
        URL of the hub; by default ``https://huggingface.co``, or the variable ``HF_ENDPOINT``.
    revision : str, optional
        Branch to commit to; by default ``"main"``. It is created if it does not exist.

    Returns
    -------
    str
        URL of the repository, or of the branch.

    Raises
    ------
    StreamlineError
        If the folder is not a complete checkpoint of this library, the upload is refused, or it fails. After a failure
        the repository contains either all files of the commit or none.

    Examples
    --------
    >>> push("my-model-small", "my-name/my-model-small", private=True)  # doctest: +SKIP
    'https://huggingface.co/my-name/my-model-small'
    """
    source = Path(folder)
    if not is_checkpoint(source):
        raise StreamlineError(
            f"{source} is not a checkpoint of this library. Expected a folder written by `save` or `compress`, with "
            f"{CHECKSUMS} and a record of the surgery. Save the model with streamline_hooks.save and push that folder."
        )
    check_folder(source, described_by=DESCRIPTION if (source / DESCRIPTION).is_file() else CONFIG)
    files, other_files = saved_files(source)
    if other_files:
        logger.warning("Not uploaded, because this library did not write them: %s", ", ".join(other_files))
    _warn_of_private_content(source, files)

    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="streamline_hooks")
    try:
        return _upload(api, source, files, repo_id, private, revision)
    except StreamlineError:
        raise
    except Exception as error:  # the client raises many types of exceptions
        raise StreamlineError(
            f"{source} was not uploaded to {repo_id!r}: {type(error).__name__}: {error}\nExpected a repository that "
            "the token may write to, and a network connection. The repository contains all files of the commit or "
            "none. Check the name, log in (hf auth login) or pass a token with write permission, and call push again."
        ) from error


def _upload(api: HfApi, source: Path, files: list[str], repo_id: str, private: bool, revision: str | None) -> str:
    from huggingface_hub import CommitOperationAdd

    repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
    name = repository.repo_id  # includes the user name
    if private and not api.repo_info(name).private:
        raise StreamlineError(
            f"{name} exists and is public, but private=True. Expected a private repository. Make it private in its "
            "settings, choose another name, or pass private=False."
        )
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    _refuse_other_model(name, set(api.list_repo_files(name, revision=revision)) - set(files), source)
    operations = [CommitOperationAdd(file, source / file) for file in files]
    message = "Upload a model compressed by streamline_hooks"
    api.create_commit(name, operations, commit_message=message, revision=revision)
    if absent := sorted(set(files) - set(api.list_repo_files(name, revision=revision))):
        raise StreamlineError(
            f"The commit to {name} lacks {', '.join(absent)}, because the repository has a .gitignore. Expected all "
            f"files of {source}. Delete .gitignore there and call push again, or choose another repository."
        )
    return f"{api.endpoint}/{name}" + ("" if revision is None else f"/tree/{revision}")


def _refuse_other_model(repository: str, remaining: set[str], source: Path) -> None:
    """Raise if the repository would keep files of another model, which Transformers could load instead."""
    if foreign := sorted(name for name in remaining if "/" not in name and any(fnmatch(name, p) for p in _MODEL_FILES)):
        raise StreamlineError(
            f"{repository} contains {', '.join(foreign)}, which Transformers could load instead of the files in "
            f"{source}. Expected a repository without weights, adapters and code of another model. Delete these files "
            "on the hub and call push again, or push to a new repository."
        )


def _warn_of_private_content(folder: Path, files: list[str]) -> None:
    """Log a warning that lists files with absolute paths, or with prompts from the test data."""
    contents_by_file: dict[str, list[str]] = {}
    for name in (CONFIG, DESCRIPTION, *_REPORTS):
        content: Any = {}
        with suppress(StreamlineError):  # ignore damaged reports
            content = read_json(folder / name) if name in files else {}
        content = content if name in _REPORTS else content.get("streamline_hooks")
        contents_by_file[name] = [
            *(["samples"] if _has_samples(content) else []),
            *sorted(set(_absolute_paths(content))),
        ]
    page = html.unescape((folder / _PAGE).read_text(encoding="utf-8", errors="replace")) if _PAGE in files else ""
    contents_by_file[_PAGE] = ["samples"] if 'class="sample"' in page else []
    if any(
        re.search(r"(^|[\s'=,])(/|[A-Za-z]:[\\/])", command)
        for command in re.findall(r"<code>(.*?)</code>", page, re.S)
    ):
        contents_by_file[_PAGE].append("a command with absolute paths")
    contents_by_file[_PAGE] += sorted(
        {path for paths in contents_by_file.values() for path in paths if path != "samples" and path in page}
    )
    private = {name: contents for name, contents in contents_by_file.items() if contents}
    if not private:
        return
    descriptions = [name for name in private if name not in (CONFIG, DESCRIPTION)]
    remedies = [f"Delete {', '.join(descriptions)} in {folder} to upload without them."] if descriptions else []
    if len(descriptions) < len(private):
        remedies.append(
            "To avoid recorded paths, compress again with relative paths or hub names of models and data, or with "
            "list(documents), whose sources are not recorded."
        )
    logger.warning(
        "The uploaded files contain paths of this machine, or samples that begin with your test data: %s. Check that "
        "readers of the repository may see them. %s",
        "; ".join(f"{name}: {', '.join(contents)}" for name, contents in private.items()),
        " ".join(remedies),
    )


def _absolute_paths(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value that are absolute paths, except in samples."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from () if name == "samples" else _absolute_paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _absolute_paths(item)
    elif isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        yield value


def _has_samples(value: Any) -> bool:
    """Whether a JSON value contains a generated text with its prompt."""
    if isinstance(value, Mapping):
        return {"prompt", "text"} <= value.keys() or any(map(_has_samples, value.values()))
    return isinstance(value, list) and any(map(_has_samples, value))
