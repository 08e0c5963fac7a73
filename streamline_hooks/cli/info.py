"""Implement ``streamline-hooks info``."""

from __future__ import annotations

from streamline_hooks.cli.config_options import with_options
from streamline_hooks.cli.options import Json
from streamline_hooks.cli.output import print_json
from streamline_hooks.core import describe_environment, table


@with_options()
def info(*, as_json: Json = False) -> None:
    """Print the versions, the devices, and the installed and missing optional packages."""
    environment = describe_environment()
    if as_json:
        print_json(environment)
        return
    versions = [(name, version or "not installed") for name, version in environment["versions"].items()]
    print(table(versions, ("package", "version")))
    devices = environment["devices"]
    cpu = devices["cpu"]
    memory = f"{_size(cpu['available'])} of {_size(cpu['memory'])} free"
    print(f"\ncpu      {cpu['cores']} cores, {cpu['threads']} threads, {memory}")
    for number, gpu in enumerate(devices["cuda"]):
        print(f"cuda:{number}   {gpu['name']}, {_size(gpu['memory'])}")
    print(f"mps      {'yes' if devices['mps'] else 'no'}\n")
    extras = [
        (name, "yes" if extra["installed"] else "no", ", ".join(extra["missing"]), extra["install"])
        for name, extra in environment["extras"].items()
    ]
    print(table(extras, ("extra", "installed", "missing", "install")))


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.1f} GB"
