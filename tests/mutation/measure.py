"""Measure which mutants of the core code the tests detect: python -m tests.mutation.measure (`make mutation`).

1. The tests run once under coverage, which records the tests that execute each line.
2. A seeded random sample of positions in the code of `TARGETS` is drawn, and one mutation for each position.
   Cosmic Ray provides the mutations.
3. For each mutant, the tests that execute the mutated line run until the first failure.

Every finished mutant is appended to the results file, so an interrupted run continues where it stopped. The exit
status is 1 if less than `GOAL` of the mutants were killed, or if docs/mutation.md does not explain a survivor.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import difflib
import hashlib
import json
import multiprocessing
import os
import py_compile
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutation"
PAGE = ROOT / "docs" / "mutation.md"
GOAL = 0.85

TARGETS = (
    "streamline_hooks/surgery/*.py",
    "streamline_hooks/checkpoint/*.py",
    "streamline_hooks/core/*.py",
    "streamline_hooks/recording/recorder.py",
    "streamline_hooks/repair/least_squares.py",
)
TESTS = (
    "tests/core",
    "tests/surgery",
    "tests/checkpoint",
    "tests/testing",
    "tests/state_machine",
    "tests/recording/test_recorder.py",
    "tests/recording/test_recorder_graph.py",
    "tests/surgery/test_second_surgery.py",
    "tests/modeling/test_block_stack.py",
    "tests/architectures/test_properties.py",
    "tests/repair/test_least_squares.py",
    "tests/repair/test_projection.py",
    "tests/repair/test_fold_fit.py",
    "tests/repair/test_scaled.py",
    "tests/world",
)
SECONDS_OF_TESTS = 90.0
"""Limit on the tests of one mutant, by their times without coverage: nearest tests first, then the fastest."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file: what Cosmic Ray's operator does at its n-th position."""

    file: str
    line: int
    operator: str
    occurrence: int

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.operator}:{self.occurrence}"


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--sample", type=int, default=300, help="number of mutants (default: 300)")
    options.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options.add_argument("--again", action="store_true", help="the tests have changed: run them on all survivors again")
    arguments = options.parse_args()

    BUILD.mkdir(parents=True, exist_ok=True)
    results_file = BUILD / f"results-{digest_of_targets()}-{arguments.seed}.jsonl"
    results = {row["key"]: row for row in map(json.loads, read_lines(results_file))}
    if arguments.again:
        coverage_file().unlink(missing_ok=True)
        results = {key: row for key, row in results.items() if row["verdict"] != "survived"}
        results_file.write_text("".join(json.dumps(row) + "\n" for row in results.values()))
    covering, seconds = covering_tests(arguments.workers)
    sample = draw(arguments.sample, arguments.seed)
    tasks = [
        (mutant, choose_tests(mutant, tests_of_line(mutant, covering.get(mutant.file, {})), seconds))
        for mutant in sample
        if mutant.key not in results
    ]
    print(f"{len(sample)} mutants, {len(sample) - len(tasks)} of them tested in an earlier run", flush=True)
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(arguments.workers, initializer=prepare_worker, initargs=(context.Value("i", 0),)) as pool,
        results_file.open("a") as file,
    ):
        for number, row in enumerate(pool.imap_unordered(examine, tasks), start=1):
            results[row["key"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"[{number}/{len(tasks)}] {row['verdict']:<9} {row['seconds']:4.0f} s  {row['key']}", flush=True)
    return report([results[mutant.key] for mutant in sample])


def report(rows: list[dict[str, Any]]) -> int:
    survivors = [row for row in rows if row["verdict"] == "survived"]
    score = 1 - len(survivors) / len(rows)
    explained = PAGE.read_text() if PAGE.exists() else ""
    unexplained = [row for row in survivors if description(row) not in explained]
    for row in survivors:
        print(f"\nSURVIVED {row['key']}{'' if row in unexplained else ' (explained in docs/mutation.md)'}")
        print(f"`{description(row)}`\n{row['diff']}")
    print(f"\n{len(rows) - len(survivors)} of {len(rows)} mutants killed: {score:.1%} (goal {GOAL:.0%}).")
    if unexplained:
        print(f"{len(unexplained)} survivors have no reason in docs/mutation.md. Kill each by a test, or explain it.")
    return int(score < GOAL or bool(unexplained))


def description(row: dict[str, Any]) -> str:
    """Name a mutant independently of line numbers: the file, the line before and the line after."""
    lines = row["diff"].splitlines()
    before = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    after = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return f"{row['file']}: {before} -> {after}"


def target_files() -> list[Path]:
    return sorted(path for pattern in TARGETS for path in ROOT.glob(pattern))


def digest_of_targets() -> str:
    """Return a digest of the files that are mutated; results of another state of them do not count."""
    digest = hashlib.sha256()
    for path in target_files():
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# Coverage


def covering_tests(workers: int) -> tuple[dict[str, dict[int, set[str]]], dict[str, float]]:
    """Return, by file and line, the tests that execute it, and the seconds that each test takes."""
    file = coverage_file()
    if not file.exists():
        run_under_coverage(file, workers)
    content = json.loads(file.read_text())
    covering = {
        name: {int(line): {content["tests"][k] for k in numbers} for line, numbers in lines.items()}
        for name, lines in content["lines"].items()
    }
    return covering, content["seconds"]


def coverage_file() -> Path:
    return BUILD / f"coverage-{digest_of_targets()}.json"


def run_under_coverage(file: Path, workers: int) -> None:
    import coverage
    import pytest

    data_file, settings = BUILD / "coverage.data", BUILD / "coveragerc"
    settings.write_text(f"[run]\nsource = streamline_hooks\nparallel = True\ndata_file = {data_file}\n")
    for old in BUILD.glob("coverage.data*"):
        old.unlink()
    durations = Durations()
    os.chdir(ROOT)
    tests = [name for name in TESTS if (ROOT / name).exists()]
    status = pytest.main(
        [
            *("-q", "-n", str(workers), "--dist", "worksteal", "-m", "not slow and not architectures", *QUIET),
            *("--cov", "--cov-context=test", "--cov-report=", f"--cov-config={settings}", *tests),
        ],
        plugins=[durations],
    )
    if status != 0:
        sys.exit("The tests fail without any mutation. Correct that first.")
    data = coverage.CoverageData(str(data_file))
    data.read()
    names = sorted({test_of(context) for context in data.measured_contexts()} - {""})
    number = {name: k for k, name in enumerate(names)}
    lines: dict[str, dict[int, list[int]]] = {}
    for path in target_files():
        by_line = data.contexts_by_lineno(str(path))
        lines[path.relative_to(ROOT).as_posix()] = {
            line: sorted({number[test_of(context)] for context in contexts if context})
            for line, contexts in by_line.items()
        }
    file.write_text(json.dumps({"tests": names, "lines": lines, "seconds": durations.seconds}))


def test_of(context: str) -> str:
    """Return the id of a test, in which a bar may stand, without the phase behind the last bar."""
    return context.rpartition("|")[0]


class Durations:
    """A pytest plugin that sums the seconds of each test."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration


def tests_of_line(mutant: Mutant, covering: dict[int, set[str]]) -> set[str]:
    """Return the tests that execute a line; for a line that is executed at import, those of its function or file."""
    if covering.get(mutant.line):
        return covering[mutant.line]
    tree = ast.parse((ROOT / mutant.file).read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    signatures = [n for n in functions if n.lineno <= mutant.line < n.body[0].lineno]
    inside = any(n.body[0].lineno <= mutant.line <= (n.end_lineno or 0) for n in functions)
    if inside and not signatures:
        return set()
    first, last = (signatures[-1].body[0].lineno, signatures[-1].end_lineno or 0) if signatures else (0, sys.maxsize)
    return {test for line, tests in covering.items() if first <= line <= last for test in tests}


def choose_tests(mutant: Mutant, covering: set[str], seconds: dict[str, float]) -> list[str]:
    """Return the tests to run, in order: those of the file's own test file, then the others, the fastest first."""
    stem = Path(mutant.file).stem
    ordered = sorted(covering, key=lambda test: (f"/test_{stem}.py" not in test, seconds.get(test, 0.0), test))
    chosen, total = [], 0.0
    for test in ordered:
        total += seconds.get(test, 0.0)
        if chosen and total > SECONDS_OF_TESTS:
            break
        chosen.append(test)
    return chosen


# Mutants


def draw(count: int, seed: int) -> list[Mutant]:
    """Draw positions uniformly, and one mutation of each, so that no kind of mutation outnumbers the others.

    Positions and mutations are ordered by a digest of the seed and the text of their line, so that a change elsewhere
    in the code leaves nearly all of the sample as it was.
    """
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().splitlines() for path in target_files()}
    numbers: dict[tuple[str, ...], int] = defaultdict(int)
    found: list[tuple[str, Mutant]] = []
    for (file, line, column), mutants in sorted(possible_mutants().items()):
        place = (file, lines[file][line - 1], str(column))
        numbers[place] += 1
        place = (str(seed), *place, str(numbers[place]))
        found.append((_rank(*place), min(mutants, key=lambda m: _rank(*place, m.operator))))
    return [mutant for _, mutant in sorted(found, key=lambda pair: pair[0])[:count]]


def _rank(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def possible_mutants() -> dict[tuple[str, int, int], list[Mutant]]:
    """Return all mutants by position, without those in annotations, which are never evaluated."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.plugins import get_operator, operator_names

    by_position: dict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
    operators = [(name, get_operator(name)) for name in sorted(operator_names()) if "no-op" not in name]
    operators = [(name, operator()) for name, operator in operators if not operator.arguments()]
    for path in target_files():
        name, tree, skipped = path.relative_to(ROOT).as_posix(), get_ast_from_path(path), annotations(path)
        nodes = list(ast_nodes(tree))
        for operator_name, operator in operators:
            starts = (start for node in nodes for start, _ in operator.mutation_positions(node))
            for occurrence, start in enumerate(starts):
                if not any(low <= start < high for low, high in skipped):
                    by_position[name, *start].append(Mutant(name, start[0], operator_name, occurrence))
    return by_position


def annotations(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the (line, column) ranges of all type annotations of a file."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node.returns)
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            found.append(node.annotation)
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in found if n is not None]


# Running one mutant, in a worker process with a copy of the project

QUIET = ("-p", "no:randomly", "-p", "no:cacheprovider", "--hypothesis-seed=0")
_worker: dict[str, Path] = {}


def prepare_worker(counter: Any) -> None:
    """Copy the project, and import the large libraries, which every forked test run then has at once."""
    with counter.get_lock():
        counter.value += 1
        folder = BUILD / f"worker-{counter.value}"
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", ".hypothesis", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    _worker["folder"] = folder
    # Checked hashes, because a mutant may have the size and the second of the file that it replaces.
    compileall.compile_dir(
        folder / "streamline_hooks", quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
    )
    os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    sys.dont_write_bytecode = True
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def examine(task: tuple[Mutant, list[str]]) -> dict[str, Any]:
    """Return the verdict on one mutant: killed, timeout (which counts as killed), or survived."""
    mutant, tests = task
    began = time.monotonic()
    with mutated(mutant) as diff:
        verdict = run_forked(tests) if tests else "survived"
    return {**asdict(mutant), "key": mutant.key, "verdict": verdict, "tests": len(tests), "diff": diff,
            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


@contextlib.contextmanager
def mutated(mutant: Mutant) -> Iterator[str]:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path = _worker["folder"] / mutant.file
    original = path.read_text()
    changed = mutate_code(original, get_operator(mutant.operator)(), mutant.occurrence)
    path.write_text(changed)
    try:
        lines = difflib.unified_diff(original.splitlines(), changed.splitlines(), lineterm="", n=0)
        yield "\n".join(line for line in lines if not re.match(r"---|\+\+\+|@@", line))
    finally:
        path.write_text(original)


def run_forked(tests: list[str]) -> str:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        run_tests(tests)
    deadline = time.monotonic() + 60 + 4 * SECONDS_OF_TESTS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return verdict_of(os.waitstatus_to_exitcode(status))
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def verdict_of(status: int) -> str:
    if status in (4, 5):  # pytest found none of the tests
        raise RuntimeError(f"pytest ended with status {status}: the list of tests is out of date. Pass --again.")
    return "survived" if status == 0 else "killed"


def run_tests(tests: list[str]) -> None:
    """Run pytest in a forked process, which never returns."""
    status = 3
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        folder = _worker["folder"]
        os.chdir(folder)
        sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "streamline_hooks")]:
            del sys.modules[name]
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        import pytest

        status = int(pytest.main(["-x", "-q", "--rootdir", str(folder), *QUIET, *tests]))
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
