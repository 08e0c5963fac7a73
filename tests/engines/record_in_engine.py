"""Record hidden states in vLLM: python -m tests.engines.record_in_engine CHECKPOINT IMPLEMENTATION TOKENS BLOCKS FILE.

TOKENS and BLOCKS are JSON lists. The inputs and outputs of the blocks are saved to FILE. It is a process of its own,
because vLLM changes classes of Transformers.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

import streamline_hooks as sh


def main() -> None:
    folder, implementation, prompt, blocks, file = sys.argv[1:]
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm: Any = LLM(
        model=folder, dtype="float32", enforce_eager=True, max_model_len=96, skip_tokenizer_init=True,
        max_num_seqs=1, enable_prefix_caching=False, model_impl=implementation,
    )  # fmt: skip
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    sampling = SamplingParams(temperature=0, max_tokens=4, min_tokens=4, ignore_eos=True, detokenize=False)
    with sh.HiddenStateRecorder(model, json.loads(blocks)) as record:
        for _ in range(2):  # the second one would be read from a cache of prefixes
            (output,) = llm.generate([{"prompt_token_ids": json.loads(prompt)}], sampling, use_tqdm=False)
    new = list(output.outputs[0].token_ids)
    torch.save({"tokens": new, "inputs": record.inputs, "outputs": record.outputs}, file)


if __name__ == "__main__":
    main()
