"""A model of 300 million weights is compressed in far less memory than its weights take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.scale import config_of, write_llama
from streamline_hooks import load
from streamline_hooks.surgery import MODEL_TYPE
from tests.processes import in_a_new_process

MEASURED = """
    import json, sys
    from pathlib import Path
    import torch
    from benchmarks.scale import config_of, peaks, write_llama
    from streamline_hooks import load
    from streamline_hooks.pipeline import BlockwiseOptions, compress_checkpoint
    from tests.checkpoint.block_by_block import AMOUNTS, reader
    from tests.configured import configured

    folder = Path(sys.argv[1])
    def run(name):
        config = configured(**{**AMOUNTS, "shortlist": 2, "state_memory": 2**20, "protect": (0, 1, -1)})
        output = folder / f"{name}_short"
        tokenizer, texts = reader()
        how = BlockwiseOptions(max_shard_size="60MB")
        return compress_checkpoint(folder / name, texts, config, tokenizer=tokenizer, output=output, blockwise=how)
    def most():  # and not ru_maxrss, which begins at what the process had that started this one
        return peaks()["VmHWM"]
    write_llama(folder / "small", config_of("small"))
    run("small")  # what is imported late, and thread pools
    before = most()
    result = run("300m")
    print(json.dumps([most() - before, result.plan.removed, result.peak_memory]))
    whole = load(folder / "300m", dtype="auto")
    sum(float(weight.sum()) for weight in whole.parameters())
    print(json.dumps(most() - before))
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif("sys.platform != 'linux'", reason="the figure is read from /proc")
def test_three_hundred_million_weights(tmp_path: Path) -> None:
    write_llama(tmp_path / "300m", config_of("300m"))
    size = sum(file.stat().st_size for file in (tmp_path / "300m").glob("*.safetensors"))
    assert 590e6 < size < 610e6
    said = in_a_new_process(MEASURED, tmp_path).stdout.splitlines()
    (apart, removed, peak), whole = map(json.loads, said[-2:])
    assert whole > 0.95 * size, "the figure sees what is in memory"
    assert apart < size / 2, f"{apart:,} bytes of {size:,}"
    assert peak > apart and len(removed) == 2
    assert len(list((tmp_path / "300m_short").glob("*.safetensors"))) > 5
    short = load(tmp_path / "300m_short", dtype="auto")
    assert short.config.num_hidden_layers == 18 and short.config.to_dict()["model_type"] == MODEL_TYPE
    with torch.no_grad():
        assert short(torch.arange(3, 19)[None]).logits.isfinite().all()


def test_the_checkpoint_is_the_same_for_a_seed_and_loads_whole(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_llama(tmp_path / name, config_of("small"), seed=seed)
    models = [load(tmp_path / name, dtype="auto") for name in ("one", "same", "other")]
    first, same, other = (model.model.layers[3].mlp.up_proj.weight for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other) and first.dtype == torch.bfloat16
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight
    assert models[0].config.num_hidden_layers == 28
