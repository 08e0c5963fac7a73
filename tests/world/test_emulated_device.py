"""Recording, surgery, fits, training and generation on an accelerator that is emulated on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.world.emulated_device import IS_SUPPORTED


@pytest.mark.skipif(not IS_SUPPORTED, reason="this version of torch cannot emulate a device")
@pytest.mark.parametrize("chosen", ["waits", "not waits"])
def test_the_library_runs_on_an_accelerator(chosen: str) -> None:
    """The device changes PyTorch for a whole process, so these tests have one of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:randomly", "-p", "no:cacheprovider"]
    command += ["tests/world/on_emulated_device.py", "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
