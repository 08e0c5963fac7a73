"""What can be told to be impossible before anything is asked of a model, which may take hours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_hooks.batch import positions_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.sliding import Documents, WindowSettings, usual_window
from streamline_hooks.evaluation.speed import require_timed, room_for_prompt
from streamline_hooks.evaluation.suite import Suite
from streamline_hooks.evaluation.writing import prompt_tokens


def require_askable(suite: Suite, models: Mapping[str, Any], batch_size: int) -> None:
    """Raise where models cannot be asked what is in a suite.

    Parameters
    ----------
    suite : Suite
    models : mapping of str to transformers.PreTrainedModel
        One, or a changed model and its original.
    batch_size : int
        Texts at a time.

    Raises
    ------
    StreamlineError
        If a model has too few positions for what it is to read or to write, what is timed cannot be, two models that
        are to be compared on text differ in their vocabulary, or the tokenizer has no template or no first token that
        is needed.
    """
    for model in models.values():
        _require_room(model, suite)
    if suite.text:
        window = min(map(usual_window, models.values())) if suite.window is None else suite.window
        settings = WindowSettings(window, suite.stride, batch_size, suite.first)
        for model in models.values():
            Documents(model, suite.tokenizer, [], settings)
        _require_one_vocabulary(models)
    if suite.timed is not None:
        tokens, new_tokens, _ = suite.timed
        tokens = min(room_for_prompt(model, new_tokens, tokens) for model in models.values())
        for name, model in models.items():
            require_timed(name, model, tokens + new_tokens)


def _require_room(model: Any, suite: Suite) -> None:
    """Raise where a model has too few positions for what it is to write."""
    positions = positions_of(getattr(model, "config", None))
    asked = [(f"prompt {k}", prompt, False, suite.new_tokens) for k, prompt in enumerate(suite.prompts)]
    asked += [(p.where, p.prompt, t.chat, t.new_tokens) for t in suite.problems.values() for p in t.problems]
    for where, prompt, chat, new_tokens in asked:
        length = len(prompt_tokens(suite.tokenizer, prompt, chat))
        if positions is not None and length + new_tokens > positions:
            raise StreamlineError(
                f"The {length} tokens of {where} and {new_tokens} more need {length + new_tokens} positions; this "
                f"{type(model).__name__} has {positions}. Shorten it, show fewer examples, or ask for fewer new tokens."
            )


def _require_one_vocabulary(models: Mapping[str, Any]) -> None:
    """Raise where two models are seen, by the size of their heads, to differ in their vocabulary."""
    heads = {name: getattr(model, "get_output_embeddings", lambda: None)() for name, model in models.items()}
    sizes = {name: size for name, head in heads.items() if (size := getattr(head, "out_features", None)) is not None}
    if len(set(sizes.values())) > 1:
        said = " and ".join(f"{name} for {size}" for name, size in sizes.items())
        raise StreamlineError(
            f"The models have logits of different vocabularies, {said} tokens, so that what they say of a text cannot "
            "be compared. Compare models of one vocabulary, or evaluate them one by one, without a reference."
        )
