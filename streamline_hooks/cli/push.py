"""Implement ``streamline-hooks push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from streamline_hooks.checkpoint import push as upload
from streamline_hooks.cli.config_options import with_options
from streamline_hooks.cli.options import Json
from streamline_hooks.cli.output import print_json, print_log

Folder = Annotated[Path, Parameter(help="Folder with a compressed model.")]
Repository = Annotated[
    str, Parameter(help="Repository on the hub, organization/model; it is created if it does not exist.")
]
Private = Annotated[bool, Parameter(help="Make a new repository private.")]
Token = Annotated[str | None, Parameter(help="Access token. By default the token of `hf auth login`.")]
Endpoint = Annotated[str | None, Parameter(help="URL of the hub. By default the endpoint of huggingface_hub.")]
Revision = Annotated[str | None, Parameter(help="Branch to upload to. By default main.")]


@with_options()
def push(
    folder: Folder,
    repo_id: Repository,
    /,
    *,
    private: Private = False,
    token: Token = None,
    endpoint: Endpoint = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Upload a compressed model with its card, config, report and tokenizer to the Hugging Face hub."""
    print_log(to_stderr=True)
    address = upload(folder, repo_id, private=private, token=token, endpoint=endpoint, revision=revision)
    if as_json:
        print_json({"url": address})
    else:
        print(address)
