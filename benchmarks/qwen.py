"""Convert Qwen2.5-Coder-0.5B-Instruct from GGUF to a folder that the benchmarks load with ``--model``.

    python -m benchmarks.qwen GGUF_FILE FOLDER

The file comes from ``recipes/assemble_qwen.sh`` of the data folder. Its weights have 4 to 8 bits, and are saved in
float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    source = {"pretrained_model_name_or_path": options.file.parent, "gguf_file": options.file.name}
    AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).save_pretrained(options.folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
