"""The command line where no model fits into memory: python -m tests.cli.blockwise_command compress FOLDER ..."""

from __future__ import annotations

from unittest import mock

from streamline_hooks import cli

if __name__ == "__main__":
    with mock.patch("streamline_hooks.pipeline.cost.fits_in_memory", lambda folder, memory: False):
        cli.main()
