"""The tokenizer of a checkpoint as GGUF holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    import gguf

_SPLIT_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
_SPLIT_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"


def write_vocabulary(writer: gguf.GGUFWriter, folder: Path | None, size: int) -> None:
    """Write the tokens, what kind each is, their merges, the special ones and the chat template.

    Parameters
    ----------
    writer : gguf.GGUFWriter
    folder : Path or None
        With ``tokenizer.json``; None for a file without a vocabulary.
    size : int
        Tokens that the model knows. Those that the tokenizer does not are written as unused.

    Raises
    ------
    StreamlineError
        If there is no such file, or if it is of a kind of which llama.cpp's name is not known here.
    """
    import gguf

    if folder is None:
        writer.add_tokenizer_model("no_vocab")
        return
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise StreamlineError(f"{file} is missing; save the tokenizer there with tokenizer.save_pretrained.")
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if said["model"].get("type") != "BPE":
        raise StreamlineError(f"{file} holds a {said['model'].get('type')}; expected BPE, as Llamas have it.")
    if said["model"].get("byte_fallback"):
        _write_sentencepiece(writer, folder)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pretokenizer(said, file))
        tokens, types = _tokens(said, size)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=not said["model"].get("byte_fallback"), n_vocab=size).add_to_gguf(
        writer, quiet=True
    )


def _write_sentencepiece(writer: gguf.GGUFWriter, folder: Path) -> None:
    """A vocabulary that falls back to bytes, as Llama 2's does."""
    import gguf

    vocabulary = gguf.LlamaHfVocab(folder)
    writer.add_tokenizer_model("llama")
    tokens, scores, types = zip(*vocabulary.all_tokens(), strict=True)
    writer.add_token_list(list(tokens))
    writer.add_token_scores(list(scores))
    writer.add_token_types([int(kind) for kind in types])


def _pretokenizer(said: dict[str, Any], file: Path) -> str:
    """llama.cpp's name for how text is cut before its merges."""
    steps = said.get("pre_tokenizer") or {}
    parts = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = str((parts[0].get("pattern") or {}).get("Regex"))
        for start, name in ((_SPLIT_LLAMA3, "llama-bpe"), (_SPLIT_QWEN2, "qwen2")):
            if pattern.startswith(start):
                return name
    raise StreamlineError(
        f"{file} cuts text in a way whose name in llama.cpp is not known here ({', '.join(map(str, kinds))}). Convert "
        "the folder with llama.cpp's own convert_hf_to_gguf.py, which knows more of them."
    )


def _tokens(said: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and its kind."""
    import gguf

    by_number = {number: token for token, number in said["model"]["vocab"].items()}
    kinds = dict.fromkeys(by_number, gguf.TokenType.NORMAL)
    for added in said.get("added_tokens", []):
        by_number[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if max(by_number) >= size:
        raise StreamlineError(
            f"The tokenizer knows token {max(by_number)}, the model only {size}; they do not belong together."
        )
    tokens = [by_number.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [int(kinds.get(number, gguf.TokenType.UNUSED)) for number in range(size)]
