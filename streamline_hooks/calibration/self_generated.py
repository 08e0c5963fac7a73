"""Calibration text that an instruct model generates itself, through its chat template."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from streamline_hooks.batch import device_of, positions_of
from streamline_hooks.core.files import atomic_file
from streamline_hooks.digests import autocast_dtype, model_digest, texts_digest, tokenizer_digest
from streamline_hooks.errors import StreamlineError
from streamline_hooks.generation import end_tokens, require_generates, seeded, written_on
from streamline_hooks.json_file import parse_json
from streamline_hooks.passes import inference

_FORMS = (
    "Explain {topic} to somebody who has never heard of it.; Write a short story in which {topic} plays a part.; List "
    "ten facts about {topic}, with a sentence on each.; Write a dialogue between two friends who disagree about "
    "{topic}.; Write a small, commented Python program that has to do with {topic}, and say how it works.; Write a "
    "letter to a colleague who has asked for advice on {topic}.; Write a step-by-step guide for a beginner on "
    "{topic}.; Describe the history of {topic} in a few paragraphs.; Write a newspaper article about a recent event "
    "that concerns {topic}.; Make up five questions about {topic} and answer each one in detail.; Compare two views "
    "of {topic}, and say which one you find more convincing and why.; Write a page of a diary by somebody whose life "
    "is all about {topic}.; Pose a calculation problem about {topic}, then solve it step by step.; Write a speech "
    "that opens a conference on {topic}.; Describe common mistakes with {topic} and how to avoid them.; Write a poem "
    "about {topic}, then explain its images."
)
_TOPICS = (
    "sourdough bread; the tides of the sea; learning a second language; bicycle repair; the human heart; medieval "
    "castles; keeping bees; sorting algorithms; the weather in the mountains; a family budget; black holes; jazz "
    "music; volcanoes; teaching children to read; the stock market; chess openings; coral reefs; the printing press; "
    "gardening in a small space; railway journeys; vaccines; board games; ancient Rome; electric cars; sleep and "
    "dreams; football tactics; the life of a star; job interviews; databases; migrating birds; pottery; courts and "
    "trials; the immune system; moving to a new city; the Silk Road; photography at night; probability and dice; a "
    "village school; water supply in big cities; film music; elections; soil and farming; ocean exploration; old "
    "maps; spreadsheets; friendship; bridges; winter sports"
)
FORMS, TOPICS = tuple(_FORMS.split("; ")), tuple(_TOPICS.split("; "))
_SHORTEST = 16  # tokens; a shorter answer is an evasion or a title
_LEAST_DISTINCT = 0.6  # of an answer's runs of four tokens; prose has above 0.9
_PATIENCE = 8  # batches in a row without a new usable text, after which the model is given up


def self_generated(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    seed: int = 0,
    cache: str | Path | None = None,
    sequence_length: int = 512,
    temperature: float = 0.8,
    top_p: float = 0.95,
    batch_size: int = 32,
    conversation: bool = False,
) -> list[str]:
    """Let an instruct model answer prompts on many topics in many forms, and return the usable answers.

    A pruned model stays closer to the original on text in the original's words (arXiv 2410.09982). Answers that are
    short, repeat themselves or were generated before are left out. More `tokens` continue where fewer stop.

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
        An instruction-tuned causal language model, and its tokenizer with a chat template.
    tokens : int
        Generate until the usable texts have this many tokens together.
    seed : int
        Seed of the order of the prompts and of sampling; default 0.
    cache : str or Path, optional
        Folder for a file of the generated texts, named after all that they depend on but the date. It is read instead
        of generating again, also after an interruption.
    sequence_length, batch_size : int
        Tokens of an answer, at most, and answers generated at a time; default 512 and 32.
    temperature, top_p : float
        Of the sampling; default 0.8 and 0.95.
    conversation : bool
        Return whole conversations as the model saw them: template, prompt and answer, with special tokens as text.
        Conversations that do not tokenize to the same tokens are left out, and their prompts have another order.

    Raises
    ------
    StreamlineError
        If a setting is out of range, the tokenizer has no chat template or does not read conversations back, the model
        cannot generate or generates nothing usable, or the cached file is damaged.
    """
    require_generates(model)
    sampling, draw = {"temperature": temperature, "top_p": top_p}, ("conversation",) * conversation
    sizes = {"sequence_length": sequence_length, "batch_size": batch_size}
    _check(tokenizer, conversation, tokens=tokens, **sizes, **sampling)
    path, rows = None, list[dict[str, Any]]()
    if cache is not None:
        settings = (seed, *sizes.values(), *sampling.values(), conversation, autocast_dtype(model))
        identity = [model_digest(model), tokenizer_digest(tokenizer, FORMS + TOPICS), *FORMS, *TOPICS]
        identity.append(repr((*settings, sorted(end_tokens(model, tokenizer)))))
        path = Path(cache).expanduser() / f"self-generated-{texts_digest(identity)[:16]}.jsonl"
        rows = _read(path, batch_size) if path.exists() else rows
    queue, usable, idle = prompts(f"conversation {seed}" if conversation else seed), dict[str, int](), 0
    with tqdm(total=tokens, unit="token", desc="Generating calibration text", disable=None) as bar, inference(model):
        for number in count():
            asked = list(islice(queue, batch_size))
            if number * batch_size == len(rows):
                with seeded(device_of(model), seed, number, *draw):
                    rows += _generate(model, tokenizer, asked, sequence_length, sampling, conversation)
                if path is not None:
                    with atomic_file(path) as new:
                        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            before, batch = len(usable), rows[number * batch_size : (number + 1) * batch_size]
            usable |= {row["text"]: row["tokens"] for row in batch if row["text"]}
            idle = 0 if len(usable) > before else idle + 1
            total = sum(usable.values())
            bar.update(min(total, tokens) - bar.n)
            if total >= tokens:
                return list(usable)
            if idle == _PATIENCE:
                break
    raise StreamlineError(
        f"{tokens:,} tokens were requested; {type(model).__name__} generated {len(rows):,} texts, of which "
        f"{len(usable):,} with {total:,} tokens are usable. Expected different answers of {_SHORTEST} tokens or more "
        "without repetition, and conversations that tokenize to the same tokens. Give --calibration FILE or self."
    )


def prompts(seed: int | str) -> Iterator[str]:
    """Yield every form with every topic in an order that the seed decides, then all again in another, for ever."""
    every, shuffle = [form.format(topic=topic) for form in FORMS for topic in TOPICS], random.Random(seed).shuffle
    while True:
        shuffle(every)
        yield from every


def _check(tokenizer: Any, conversation: bool, **settings: float) -> None:
    least = {"tokens": 1, "sequence_length": _SHORTEST, "batch_size": 1, "temperature": 1e-6, "top_p": 1e-6}
    for name, value in settings.items():
        if not least[name] <= value <= (1 if name == "top_p" else math.inf):
            most = " and at most 1" if name == "top_p" else ""
            raise StreamlineError(f"{name}={value} is invalid. Expected at least {least[name]}{most}. Change it.")
    name, prompt = getattr(tokenizer, "name_or_path", ""), next(prompts(0))
    if not getattr(tokenizer, "chat_template", None):
        raise StreamlineError(
            f"The tokenizer {name!r} has no chat template. Expected that of an instruct model. Give --calibration FILE."
        )
    ids = _chat(tokenizer, prompt, tokenize=True, return_dict=False)
    if conversation and list(ids) != _ids(tokenizer, _chat(tokenizer, prompt, tokenize=False)):
        raise StreamlineError(
            f"The tokenizer {name!r} does not read the same tokens back from a prompt in its chat template. Expected "
            "one that does. Take the answers alone: --calibration self."
        )


def _generate(
    model: Any, tokenizer: Any, asked: Sequence[str], length: int, sampling: dict[str, float], conversation: bool
) -> list[dict[str, Any]]:
    """Sample an answer to each prompt; the text of an unusable one is empty."""
    chats = [_chat(tokenizer, prompt, tokenize=False) for prompt in asked]
    rows, ends = [_ids(tokenizer, chat) for chat in chats], end_tokens(model, tokenizer)
    width, room = max(map(len, rows)), positions_of(model.config) or math.inf
    length, found = int(min(length, max(room - width, _SHORTEST))), []  # `written_on` raises if there is no room
    answers = written_on(model, tokenizer, rows, new_tokens=length, sampling=sampling, keep_end=conversation)
    for chat, row, (answer,) in zip(chats, rows, answers, strict=True):
        ids = answer[:-1] if answer and answer[-1] in ends else answer
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        runs, size = [tuple(ids[k : k + 4]) for k in range(len(ids) - 3)], len(_ids(tokenizer, text))
        if size < _SHORTEST or len(set(runs)) < _LEAST_DISTINCT * len(runs):
            text = ""
        elif conversation:  # some tokenizers decode a prompt differently from how it was given
            options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            seen, every = (str(tokenizer.decode(one, **options)) for one in (row, row + answer))
            text, size = chat + every.removeprefix(seen), len(row + answer)
            text = text if every.startswith(seen) and _ids(tokenizer, text) == row + answer else ""
        found.append({"text": text, "tokens": size if text else 0})
    return found


def _read(path: Path, batch_size: int) -> list[dict[str, Any]]:
    try:
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if len(rows) % batch_size or any([*map(type, (row["text"], row["tokens"]))] != [str, int] for row in rows):
            raise ValueError("incomplete")
    except (ValueError, TypeError, KeyError) as error:
        raise StreamlineError(
            f"{path} is damaged ({error}). Expected one generated text in each line. Delete it to generate again."
        ) from error
    return rows


def _chat(tokenizer: Any, prompt: str, **options: Any) -> Any:
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, **options)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
