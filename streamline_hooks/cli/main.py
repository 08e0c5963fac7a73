"""Run the commands, and map errors and Ctrl-C to exit codes."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from cyclopts import App, CycloptsError, Group, RepeatArgumentError

from streamline_hooks.cli.output import discard_output, print_error
from streamline_hooks.core import StreamlineError, TrainingInterrupted

INSTALL = "--install-completion"
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
BROKEN_PIPE = 141  # exit code if the reader of the output closed the pipe
COMMANDS = {
    "compress": (
        "compress",
        "Remove the blocks whose loss is repaired best, repair the model, measure it and save it.",
    ),
    "plan": ("plan", "Estimate the time and memory of a compression, on this machine or from a shape."),
    "inspect": ("inspect", "Print the block stacks of a model."),
    "rank": ("rank", "Print the windows of blocks that contribute least."),
    "sweep": ("sweep", "Compress a model in many ways, and compare quality, size and speed."),
    "evaluate": ("evaluate", "Measure a model, also relative to its original."),
    "generate": ("generate", "Continue texts."),
    "export": ("export", "Export a compressed model as a plain checkpoint, GGUF or ONNX."),
    "push": ("push", "Upload a compressed model to the Hugging Face hub."),
    "check": ("inspect", "Verify surgery, caches and checkpoints on a model."),
    "diff": ("inspect", "Match the blocks of two models by their weights."),
    "info": ("info", "Print versions, devices and optional packages."),
}
"""Module and description of each command; the module is imported when the command runs."""


def make_app(command: str = "") -> App:
    """Return the application with all commands; `command` uses its docstring as help."""
    app = App(
        name="streamline-hooks",
        help="Find, remove and repair the transformer blocks that contribute least.",
        version=sys.modules[__name__.partition(".")[0]].__version__,
        help_format="plaintext",
        help_epilogue="streamline-hooks COMMAND --help-all lists all options of a command in groups.",
        group_parameters=Group("Options"),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        exit_on_error=False,
        print_error=False,
    )
    for name, (module, text) in COMMANDS.items():
        app.command(f"streamline_hooks.cli.{module}:{name}", name=name, help=None if name == command else text)
    app.register_install_completion_command(INSTALL, help="Install completion for the current shell.")
    return app


def main() -> None:
    """Run the command line.

    The exit code is 2 after an error, 130 after Ctrl-C, and 141 if the reader of the output closed the pipe. A
    compression finishes even then.
    """
    try:
        run(sys.argv[1:])
        sys.stdout.flush()
    except (KeyboardInterrupt, TrainingInterrupted) as error:
        print_error(str(error) or "interrupted")
        sys.exit(INTERRUPTED)
    except StreamlineError as error:
        print_error(str(error))
        sys.exit(2)
    except BrokenPipeError:
        discard_output(sys.stdout)
        sys.exit(BROKEN_PIPE)


def run(arguments: Sequence[str]) -> None:
    """Run a command, and raise its errors.

    Parameters
    ----------
    arguments : sequence of str
        The command and its arguments.

    Raises
    ------
    StreamlineError
        If the command, an option or a value is invalid, or the command fails.
    """
    command = arguments[0] if arguments else ""
    if command and not command.startswith("-") and command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        raise StreamlineError(
            f"The command {command!r} is unknown. Expected one of {', '.join(COMMANDS)}. "
            + (f"Did you mean {nearest[0]!r}?" if nearest else "See streamline-hooks --help.")
        )
    app = make_app(command)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and command in COMMANDS and command != "compress":
        raise StreamlineError(
            f"{command} was started in {count} processes (WORLD_SIZE), which would all write the same files. Expected "
            "one process. Run it without torchrun; only compress runs in several processes."
        )
    help_all = "--help-all" in arguments and command in COMMANDS
    try:
        with every_option([command] if help_all else COMMANDS if command == INSTALL else []):
            app([command, "--help"] if help_all else arguments)
    except RepeatArgumentError as error:
        raise StreamlineError(
            f"{error.token.keyword} was given more than once. Expected it once. Omit the others; where it accepts "
            f"several values, separate them as streamline-hooks {command} --help shows."
        ) from None
    except CycloptsError as error:
        text = " ".join(str(error).split())
        raise StreamlineError(f"{text} See streamline-hooks {command} --help-all.") from None


def completion(shell: Literal["bash", "zsh", "fish", "powershell"]) -> str:
    """Return the completion script of a shell, which does not start Python."""
    with every_option(COMMANDS):
        return make_app().generate_completion(shell=shell)


@contextmanager
def every_option(commands: Iterable[str]) -> Iterator[None]:
    """Show all options of some commands in the help within the context."""
    functions = [
        getattr(importlib.import_module(f"streamline_hooks.cli.{COMMANDS[name][0]}"), name) for name in commands
    ]
    for function in functions:
        function.show(everything=True)
    try:
        yield
    finally:
        for function in functions:
            function.show(everything=False)
