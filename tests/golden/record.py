"""Record golden runs: ``python -m tests.golden.record NAME ...``.

A NAME may be a pattern such as ``'kind/*'``. Only the named runs are made, what changes is printed line by line, and
all other lines of the file stay as they are. A stored run that is in the table no longer is deleted by its name.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import sys
import tempfile
import time
from pathlib import Path

from tests.golden import store
from tests.golden.adapter import execute
from tests.golden.runs import RUNS


def main(arguments: list[str] | None = None, file: Path = store.FILE) -> int:
    """Record the named runs, and return 1 where one could not be recorded."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record", description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="+", help="a run or a pattern, such as 'kind/*'")
    runs = store.read(file)
    known = sorted({*RUNS, *runs})
    names = []
    for pattern in parser.parse_args(arguments).names:
        matching = fnmatch.filter(known, pattern)
        if not matching:
            parser.error(f"{pattern!r} matches no run. The runs are: {', '.join(known)}")
        names += [name for name in matching if name not in names]
    failed = 0
    for name in names:
        began, old = time.process_time(), runs.get(name, {})
        if name in RUNS:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # without bars
                facts = execute(RUNS[name].how, RUNS[name].settings, Path(folder))
            if narrow := store.narrow_margins(facts):
                print(f"{name}: not recorded: {', '.join(narrow)} below {store.MARGIN:g}; choose other settings.")
                failed = 1
                continue
            runs[name] = facts
        else:
            facts = {}
            del runs[name]
        changed = [key for key in sorted(old.keys() | facts.keys()) if old.get(key) != facts.get(key)]
        for key in changed:
            print("\n".join(_lines(name, key, old, facts)))
        print(
            f"{name}: {len(changed)} of {len(facts)} facts changed, {time.process_time() - began:.1f} s of CPU",
            flush=True,
        )
        store.write(runs, file)
    return failed


def _lines(name: str, key: str, old: store.Facts, new: store.Facts) -> list[str]:
    """The old and the new value of a fact."""
    return [f"{sign} {name}: {key}: {facts[key]!r}" for sign, facts in (("-", old), ("+", new)) if key in facts]


if __name__ == "__main__":
    sys.exit(main())
