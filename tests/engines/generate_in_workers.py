"""Generate in vLLM with two workers: python -m tests.engines.generate_in_workers CHECKPOINT PROMPTS TOKENS.

PROMPTS is a JSON list of lists of token ids. The new tokens are printed as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    from vllm import LLM, SamplingParams

    llm: Any = LLM(
        model=folder, dtype="float32", enforce_eager=True, max_model_len=96, skip_tokenizer_init=True, max_num_seqs=2,
        tensor_parallel_size=2,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
