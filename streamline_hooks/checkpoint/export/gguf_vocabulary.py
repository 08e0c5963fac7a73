"""Write a tokenizer into a GGUF file, as llama.cpp reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.core import StreamlineError, get_logger, parse_json

if TYPE_CHECKING:
    import gguf

logger = get_logger(__name__)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # name in llama.cpp, and whether pieces that are tokens are not merged
    rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
    rf"{_WORDS}|\p{{N}}|{_REST}": ("qwen2", False),
}


def write_vocabulary(writer: gguf.GGUFWriter, folder: Path | None, size: int, end_tokens: Sequence[int]) -> None:
    """Write the tokenizer; token ids of the model without a token become unused tokens.

    Parameters
    ----------
    writer : gguf.GGUFWriter
    folder : Path or None
        Folder with ``tokenizer.json``; without one the file has no vocabulary.
    size : int
        Number of token ids of the model.
    end_tokens : sequence of int
        Tokens that end a text, see ``generation_config.eos_token_id``.
    """
    import gguf

    if folder is None:
        writer.add_tokenizer_model("no_vocab")
        return
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise StreamlineError(f"{file} is missing. Save a fast tokenizer there with tokenizer.save_pretrained.")
    tokenizer: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
    if tokenizer["model"].get("type") != "BPE":
        raise StreamlineError(
            f"{file} contains a {tokenizer['model'].get('type')} tokenizer. Expected BPE. Use a tokenizer of Llama."
        )
    falls_back_to_bytes = bool(tokenizer["model"].get("byte_fallback"))
    if falls_back_to_bytes:
        _require_steps(tokenizer, "normalizer", {"Prepend", "Replace"}, file)
        _require_steps(tokenizer, "pre_tokenizer", {"Metaspace", "Split"}, file)
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(_adds_space(tokenizer))
    else:
        _require_steps(tokenizer, "normalizer", {"NFC"}, file)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pretokenizer(tokenizer, file))
    tokens, types = _tokens(tokenizer, size)
    if falls_back_to_bytes:
        writer.add_token_scores(_scores(tokenizer, tokens))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not falls_back_to_bytes, n_vocab=size)
    special.special_token_ids |= _end_tokens(special.special_token_ids.get("eos"), end_tokens, file)
    special.add_special_token = _added_tokens(file, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def _steps(tokenizer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer."""
    step = tokenizer.get(name)
    if step is None:
        return []
    parts: list[dict[str, Any]] = step.get("normalizers") or step.get("pretokenizers") or [step]
    return parts


def _require_steps(tokenizer: dict[str, Any], name: str, accepted: set[str], file: Path) -> None:
    """Raise if a tokenizer changes or splits text in a way that llama.cpp does not."""
    if unknown := sorted({str(step.get("type")) for step in _steps(tokenizer, name)} - accepted):
        raise StreamlineError(
            f"{file}: the {name} has {', '.join(unknown)}, which llama.cpp does not do. Expected "
            f"{' or '.join(sorted(accepted))}. Convert the folder with convert_hf_to_gguf.py of llama.cpp."
        )


def _scores(tokenizer: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return a score for each token, by which llama.cpp merges pairs in the order of the list of merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    return [-float(ranks.get(token, len(ranks) + 1)) for token in tokens]


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a text begins with an added space."""
    if any(step.get("type") == "Prepend" for step in _steps(tokenizer, "normalizer")):
        return True
    spaces = [step for step in _steps(tokenizer, "pre_tokenizer") if step.get("type") == "Metaspace"]
    return any(s.get("prepend_scheme", "always" if s.get("add_prefix_space") else "never") != "never" for s in spaces)


def _end_tokens(known: int | None, wanted: Sequence[int], file: Path) -> dict[str, int]:
    """Return the ids of the tokens that end a text, by their names in GGUF."""
    ends = sorted(dict.fromkeys(wanted), key=lambda token: token != known) or ([] if known is None else [known])
    names = ("eos", "eot", "eom")
    if not 0 < len(ends) <= len(names):
        raise StreamlineError(
            f"{len(ends)} tokens end a text by the generation config of the model and {file.name}. Expected 1 to "
            f"{len(names)}, the most that GGUF has names for; llama.cpp would choose one itself. Set "
            "model.generation_config.eos_token_id."
        )
    return dict(zip(names, ends, strict=False))


def _added_tokens(file: Path, special: Mapping[str, int]) -> dict[str, bool]:
    """Return whether BOS and EOS are added to a text; llama.cpp has defaults of its own."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    inside, whole = (tokenizer.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    start = next((k for k in range(len(whole)) if whole[k : k + len(inside)] == inside), 0)
    added = {"bos": whole[:start], "eos": whole[start + len(inside) :]}
    for name, ids in added.items():
        if ids not in ([], [special.get(name)]):
            raise StreamlineError(
                f"{file} adds the tokens {ids} to a text. Expected at most its {name.upper()} token, "
                f"{special.get(name)}. Convert the folder with convert_hf_to_gguf.py of llama.cpp."
            )
    config = file.with_name("tokenizer_config.json")
    settings: dict[str, Any] = parse_json(config.read_text(encoding="utf-8")) if config.is_file() else {}
    explicit = {name: settings.get(f"add_{name}_token") for name in added}
    return {n: bool(ids) if explicit[n] is None else bool(explicit[n]) for n, ids in added.items()}


def _pretokenizer(tokenizer: dict[str, Any], file: Path) -> str:
    """Return the name of the pre-tokenizer in llama.cpp."""
    parts = _steps(tokenizer, "pre_tokenizer") or [{}]
    kinds = [part.get("type") for part in parts]
    merges_all = not tokenizer["model"].get("ignore_merges", False)
    last = parts[-1] if parts[-1].get("type") == "ByteLevel" and not parts[-1].get("add_prefix_space") else {}
    uses_regex = last.get("use_regex", True)
    if last and merges_all and uses_regex and kinds == ["ByteLevel"]:
        return "gpt-2"
    if last and merges_all and uses_regex and kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    isolates = parts[0].get("behavior") == "Isolated" and not parts[0].get("invert")
    if last and not uses_regex and kinds == ["Split", "ByteLevel"] and isolates:
        name, keeps_tokens = _SPLITS.get(str((parts[0].get("pattern") or {}).get("Regex")), ("", False))
        if name and keeps_tokens != merges_all:
            return name
    raise StreamlineError(
        f"{file}: the pre-tokenizer {', '.join(map(str, kinds))} is unknown. Expected one of Llama, SmolLM2, Qwen2 or "
        "GPT-2. Convert the folder with convert_hf_to_gguf.py of llama.cpp."
    )


def _tokens(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return all tokens by id, and their types."""
    import gguf

    model, kinds = tokenizer["model"], gguf.TokenType
    tokens_by_id = {number: token for token, number in model["vocab"].items()}
    types_by_id = dict.fromkeys(tokens_by_id, kinds.NORMAL)
    if model.get("byte_fallback"):
        types_by_id |= {number: kinds.BYTE for number, token in tokens_by_id.items() if _BYTE.fullmatch(token)}
    for added in tokenizer.get("added_tokens", []):
        is_special, content = added["special"], added["content"]
        # llama.cpp looks for these tokens in the text itself, where spaces are not replaced.
        tokens_by_id[added["id"]] = content if is_special else content.replace("\u2581", " ")
        types_by_id[added["id"]] = kinds.CONTROL if is_special else kinds.USER_DEFINED
        if added.get("lstrip") or added.get("rstrip"):
            logger.warning(f"{content!r} removes spaces next to it in Transformers, but not in llama.cpp")
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        types_by_id[unknown] = kinds.UNKNOWN
    if max(tokens_by_id) >= size:
        raise StreamlineError(
            f"The tokenizer has token {max(tokens_by_id)}, the model only {size} tokens. Pass the tokenizer of this "
            "model."
        )
    tokens = [tokens_by_id.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [int(types_by_id.get(number, kinds.UNUSED)) for number in range(size)]
