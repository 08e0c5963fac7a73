"""Compare the speed of SmolLM2-135M and of a shortened copy in vLLM and in llama.cpp.

    python -m benchmarks.engine_speed --folder FOLDER --python vllm=PYTHON [--python llama.cpp=PYTHON]
        [--removed 8] [--prompt 256] [--tokens 64] [--rounds 9]

Both models are saved to FOLDER in float32. For each engine, which needs a Python environment of `make engines`, each
model is loaded by a process of its own, and the two take turns: a prompt with one new token, then the same prompt with
more. A row has the time to the first token and the time per further token of both as medians, their ratio as the median
over rounds, the peak memory of each process, and the ideal ratio: the fraction of the weights that are read for a token
and remain, with the LM head for new tokens and without it for the prompt. The results are saved to
``benchmarks/results/engine_speed.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, ROOT
from benchmarks.timing import machine

FILE = RESULTS / "engine_speed.json"
NAMES = {"vllm": "vLLM", "llama.cpp": "llama.cpp"}
Generate = Callable[[list[int], int], float]
"""Generate a number of tokens after a prompt, and return the seconds."""


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], help="interpreter of an engine, ENGINE=PYTHON")
    parser.add_argument("--removed", type=int, default=8, help="number of removed blocks")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens after the first")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    ideal = save_models(options.folder, options.removed)
    content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    for pair in options.python:
        engine, _, python = pair.partition("=")
        content["rows"][engine] = ideal | compare(engine, python, options)
        content["machine"], content["prompt"], content["tokens"] = machine(), options.prompt, options.tokens
        write(FILE, content)
        FILE.with_suffix(".md").write_text(table(content))
    print(table(content))


def save_models(folder: Path, removed: int) -> dict[str, Any]:
    """Save the original and a copy without blocks in the middle, and return the ideal ratios of their times."""
    from streamline_hooks import LayerSurgeon, find_stack, save
    from streamline_hooks.checkpoint import export_folder, load_pretrained

    model, tokenizer = load_pretrained("smollm2")
    shortened = copy.deepcopy(model)
    blocks = list(find_stack(model).blocks)
    with LayerSurgeon(shortened) as surgeon:
        surgeon.remove(range((len(blocks) - removed) // 2, (len(blocks) + removed) // 2))
        surgeon.commit()
    for name, variant in (("original", model), ("shortened", shortened)):
        save(variant, folder / name, tokenizer=tokenizer, overwrite=True)
        export_folder(folder / name, folder / f"{name}.gguf", "gguf", overwrite=True)
    weights = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    head = model.get_output_embeddings().weight.numel()
    kept = weights * (1 - removed / len(blocks))
    return {"removed": removed, "ideal_first": kept / weights, "ideal_next": (kept + head) / (weights + head)}


def compare(engine: str, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """Let both models take turns; the first round is a warm-up."""
    prompt = [1000 + 7 * k for k in range(options.prompt)]
    workers = {name: Worker(engine, python, options.folder / name) for name in ("original", "shortened")}
    first: dict[str, list[float]] = {name: [] for name in workers}
    following: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(options.rounds + 1):
        for name, worker in workers.items():
            one, more = (worker.ask(prompt, count)["seconds"] for count in (1, 1 + options.tokens))
            if number:
                first[name].append(one)
                following[name].append((more - one) / options.tokens)
    memory = {name: worker.close() for name, worker in workers.items()}

    def ratio(seconds: dict[str, list[float]]) -> float:
        return statistics.median(a / b for a, b in zip(seconds["shortened"], seconds["original"], strict=True))

    medians = {name: (statistics.median(first[name]), statistics.median(following[name])) for name in workers}
    return {"seconds": medians, "first": ratio(first), "next": ratio(following), "memory_bytes": memory}


class Worker:
    """A process that has loaded a model in an engine and waits for prompts."""

    def __init__(self, engine: str, python: str, model: Path) -> None:
        command = [python, "-m", "benchmarks.engine_speed", "worker", engine, str(model)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ)
        )

    def ask(self, prompt: list[int], count: int) -> dict[str, float]:
        """Generate tokens and return the seconds and the peak memory in bytes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([prompt, count]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"seconds"'):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise SystemExit("The engine stopped before it answered; see its messages above.")

    def close(self) -> float:
        """End the process and return its peak memory in bytes."""
        memory = self.ask([1, 2, 3], 1)["memory_bytes"]
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        return memory


def work(engine: str, model: Path) -> None:
    """Answer each line of the standard input, [prompt, number of new tokens]."""
    generate = {"vllm": _vllm, "llama.cpp": _llama_cpp}[engine](model)
    for line in sys.stdin:
        prompt, count = json.loads(line)
        seconds = generate(prompt, count)
        # Not ru_maxrss, which begins with the peak of the process that started this one.
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
        print(json.dumps({"seconds": seconds, "memory_bytes": peak}), flush=True)


def _vllm(model: Path) -> Generate:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=1, enable_prefix_caching=False
    )

    def generate(prompt: list[int], count: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        return time.perf_counter() - started

    return generate


def _llama_cpp(model: Path) -> Generate:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = f"{model}.gguf", 512, 1
    params.warmup, params.verbosity, params.cpuparams.n_threads = False, 1, len(os.sched_getaffinity(0))
    server = xllamacpp.Server(params)

    def generate(prompt: list[int], count: int) -> float:
        request = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        started = time.perf_counter()
        server.handle_completions(request)
        return time.perf_counter() - started

    return generate


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    removed = next(iter(content["rows"].values()))["removed"]
    lines = [
        f"SmolLM2-135M-Instruct and the same without {removed} of its 30 blocks, float32, one request of "
        f"{content['prompt']} tokens and {content['tokens']} further new tokens. Ratios are those of the shortened "
        "model to the original, as medians over rounds in which both take turns. The ideal is the fraction of the "
        "weights that remain, for the prompt without the LM head.",
        "",
        "| engine | first token, ms | ratio | ideal | of the ideal speed | next token, ms | ratio | ideal "
        "| of the ideal speed | memory, MB |",
        f"|{'---|' * 10}",
    ]
    for engine, row in content["rows"].items():
        (first, following), (short_first, short_following) = (
            row["seconds"][name] for name in ("original", "shortened")
        )
        cells = [f"{1000 * first:.0f} → {1000 * short_first:.0f}", f"{row['first']:.2f}", f"{row['ideal_first']:.2f}"]
        cells += [f"{row['ideal_first'] / row['first']:.2f}"]
        cells += [f"{1000 * following:.1f} → {1000 * short_following:.1f}", f"{row['next']:.2f}"]
        cells += [f"{row['ideal_next']:.2f}", f"{row['ideal_next'] / row['next']:.2f}"]
        memory = [row["memory_bytes"][name] / 1e6 for name in ("original", "shortened")]
        lines.append(f"| {NAMES[engine]} | {' | '.join(cells)} | {memory[0]:.0f} → {memory[1]:.0f} |")
    return "\n".join([*lines, "", "Made by `python -m benchmarks.engine_speed`.", ""])


if __name__ == "__main__":
    main()
