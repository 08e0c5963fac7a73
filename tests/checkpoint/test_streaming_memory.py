"""What a pass has in memory, by the operating system's own figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tests.processes import in_a_new_process

MEASURED = """
    import json, re, sys
    from pathlib import Path
    import torch, accelerate, transformers
    from transformers.models.llama import modeling_llama
    from streamline_hooks import statistics
    from streamline_hooks.checkpoint import BlockwiseSource, open_checkpoint
    from streamline_hooks.checkpoint import load
    from streamline_hooks.testing import tiny_model

    folder = sys.argv[1]
    def most():  # and not ru_maxrss, which begins at what the process had that started this one
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    def run(source, batches):
        return statistics.profile(source, batches, replicates=0).cosine.sum().item()
    run(BlockwiseSource(tiny_model("llama")), [torch.arange(3, 43).view(2, 20)])  # late imports, thread pools
    before = most()
    batches = [torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(k)) for k in range(8)]
    cosine = run(BlockwiseSource(open_checkpoint(folder), memory=2**20), batches)
    print(json.dumps([most() - before, cosine]))
    cosine = run(load(folder, dtype="auto"), batches)
    print(json.dumps([most() - before, cosine]))
"""


@pytest.mark.skipif("sys.platform != 'linux'", reason="the figure is read from /proc")
def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=768, intermediate_size=1280, num_hidden_layers=8, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert 20e6 < block < 25e6
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    del model
    apart, whole = map(json.loads, in_a_new_process(MEASURED, tmp_path).stdout.splitlines()[-2:])
    assert apart[1:] == pytest.approx(whole[1:], rel=1e-9)
    assert whole[0] > 8 * block, "the figure sees what is in memory"
    assert apart[0] < 2 * block + 30e6, f"{apart[0]:,} bytes; a block has {block:,}"
    assert apart[0] < whole[0] / 2
