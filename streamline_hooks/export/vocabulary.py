"""The tokenizer of a checkpoint as GGUF holds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json

if TYPE_CHECKING:
    import gguf

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # llama.cpp's name, and whether a piece that is a token is not merged
    rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
    rf"{_WORDS}|\p{{N}}|{_REST}": ("qwen2", False),
}


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
    said: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
    if said["model"].get("type") != "BPE":
        raise StreamlineError(f"{file} holds a {said['model'].get('type')}; expected BPE, as Llamas have it.")
    if said["model"].get("byte_fallback"):
        _write_sentencepiece(writer, folder, said, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pretokenizer(said, file))
        tokens, types = _tokens(said, size)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=not said["model"].get("byte_fallback"), n_vocab=size).add_to_gguf(
        writer, quiet=True
    )


def _write_sentencepiece(writer: gguf.GGUFWriter, folder: Path, said: dict[str, Any], size: int) -> None:
    """A vocabulary that falls back to bytes, as Llama 2's does."""
    import gguf

    rows = list(gguf.LlamaHfVocab(folder).all_tokens())
    _require_fitting(len(rows), size)
    rows += [(f"[PAD{k}]".encode(), -10_000.0, gguf.TokenType.UNUSED) for k in range(len(rows), size)]
    steps = said.get("normalizer") or {}
    parts = steps.get("normalizers", [steps])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _, _ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([int(kind) for _, _, kind in rows])
    writer.add_add_space_prefix(
        any(part.get("type") == "Prepend" for part in parts)
        or (said.get("pre_tokenizer") or {}).get("prepend_scheme", "never") != "never"
    )


def _require_fitting(tokens: int, size: int) -> None:
    if tokens > size:
        raise StreamlineError(f"The tokenizer has {tokens} tokens and the model {size}; it is another model's.")


def _pretokenizer(said: dict[str, Any], file: Path) -> str:
    """llama.cpp's name for how text is cut before its merges."""
    steps = said.get("pre_tokenizer") or {}
    parts = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [part.get("type") for part in parts]
    merges_all = not said["model"].get("ignore_merges", False)
    last = parts[-1] if parts[-1].get("type") == "ByteLevel" and not parts[-1].get("add_prefix_space") else {}
    by_regex = last.get("use_regex", True)
    if last and merges_all and by_regex and kinds == ["ByteLevel"]:
        return "gpt-2"
    if last and merges_all and by_regex and kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if last and not by_regex and kinds == ["Split", "ByteLevel"]:
        name, whole = _SPLITS.get(str((parts[0].get("pattern") or {}).get("Regex")), ("", False))
        if name and whole != merges_all:
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
