from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from streamline_hooks.core import StreamlineError
from streamline_hooks.data import MixedSource, SelfGenerationConfig, mixed_split, read_documents
from streamline_hooks.data import self_generated as generated
from streamline_hooks.data.self_generated import FORMS, TOPICS, prompts

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
END = 256


# A small answer, and few prompts, so that a test writes dozens of tokens and not thousands.
def self_generated(
    model: Any, tokenizer: Any, *, tokens: int, cache: str | Path | None = None, **settings: Any
) -> list[str]:
    """Generate with the fields of a config."""
    return generated(model, tokenizer, SelfGenerationConfig(**settings), tokens=tokens, cache=cache)


SHORT: dict[str, Any] = {"tokens": 150, "sequence_length": 24, "batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: on a busy machine, threads that wait for one another take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, and one for the end."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocabulary, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=400,
        bos_token_id=None,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def replace_generate(model: LlamaForCausalLM, answer: Callable[[int, int], list[int]]) -> list[dict[str, Any]]:
    """Let ``answer(call, row)`` answer in place of the model, and return the list of what it was called with."""
    calls: list[dict[str, Any]] = []

    def generate(self: LlamaForCausalLM, input_ids: torch.Tensor, **options: Any) -> Any:
        if options.get("output_logits"):  # it is looked whether padding has a part in the answer
            return SimpleNamespace(logits=[torch.zeros(len(input_ids), 3)])
        calls.append({"input_ids": input_ids, **options})
        rows = [answer(len(calls) - 1, row) for row in range(len(input_ids))]
        width = max(map(len, rows))
        padded = torch.tensor([row + [END] * (width - len(row)) for row in rows], dtype=torch.long)
        return torch.cat([input_ids, padded], dim=1)

    vars(model)["generate"] = MethodType(generate, model)
    return calls


def varied(call: int, row: int) -> list[int]:
    """An answer of 30 tokens that no other row of no other call has."""
    return torch.randperm(90, generator=torch.Generator().manual_seed(100 * call + row))[:30].tolist()


def test_it_writes_until_there_are_enough_tokens(model: LlamaForCausalLM, tokenizer: Any) -> None:
    texts = self_generated(model, tokenizer, **SHORT)
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert sum(counts) >= 150
    assert min(counts) >= 16
    assert len(set(texts)) == len(texts)


def test_the_seed_decides_and_the_random_state_is_left_alone(model: LlamaForCausalLM, tokenizer: Any) -> None:
    before = torch.get_rng_state()
    first = self_generated(model, tokenizer, **SHORT)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert self_generated(model, tokenizer, **SHORT) == first
    assert self_generated(model, tokenizer, seed=1, **SHORT) != first


def test_training_mode_is_put_back_module_by_module(model: LlamaForCausalLM, tokenizer: Any) -> None:
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    expected = self_generated(copy.deepcopy(model).eval(), tokenizer, **SHORT)
    assert self_generated(model, tokenizer, **SHORT) == expected
    assert [module.training for module in model.modules()] == modes


def test_more_tokens_continue_where_less_stopped(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    few = self_generated(model, tokenizer, cache=tmp_path, **SHORT)
    many = self_generated(model, tokenizer, cache=tmp_path, **{**SHORT, "tokens": 300})
    assert many[: len(few)] == few
    assert len(many) > len(few)
    assert len(list(tmp_path.iterdir())) == 1
    assert self_generated(model, tokenizer, **{**SHORT, "tokens": 300}) == many
    assert self_generated(model, tokenizer, cache=tmp_path, **SHORT) == few


def test_an_interrupt_loses_no_batch_that_was_written(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    expected = self_generated(copy.deepcopy(model), tokenizer, **{**SHORT, "tokens": 300})

    real = model.generate
    calls = 0

    def interrupted(self: LlamaForCausalLM, **options: Any) -> Any:
        nonlocal calls
        if options.get("output_logits"):  # it is looked whether padding has a part in the answer
            return real(**options)
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(**options)

    vars(model)["generate"] = MethodType(interrupted, model)
    with pytest.raises(KeyboardInterrupt):
        self_generated(model, tokenizer, cache=tmp_path / "made" / "here", **{**SHORT, "tokens": 300})
    (file,) = (tmp_path / "made" / "here").iterdir()
    assert len(file.read_text().splitlines()) == 2 * SHORT["batch_size"]

    assert self_generated(model, tokenizer, cache=tmp_path / "made" / "here", **{**SHORT, "tokens": 300}) == expected
    assert calls == 3 + len(file.read_text().splitlines()) // SHORT["batch_size"] - 2
    calls = 10
    assert self_generated(model, tokenizer, cache=tmp_path / "made" / "here", **{**SHORT, "tokens": 300}) == expected
    assert calls == 10
    assert set(expected) <= set(read_documents(file))


def test_the_file_is_named_after_all_that_its_texts_depend_on(
    model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    """A tokenizer that was put right may have the same template, and another vocabulary or other rules."""
    replace_generate(model, varied)

    def files(tokenizer: Any = tokenizer, **change: Any) -> int:
        self_generated(model, tokenizer, cache=tmp_path, **{**SHORT, **change})
        return len(list(tmp_path.iterdir()))

    assert files() == files() == 1
    for number, change in enumerate(
        [{"seed": 1}, {"sequence_length": 20}, {"batch_size": 3}, {"temperature": 0.7}, {"top_p": 0.9}], start=2
    ):
        assert files(**change) == number
    template, rules = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    template.chat_template = "A question: " + TEMPLATE
    rules.backend_tokenizer.normalizer = normalizers.Lowercase()
    letters = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = letters["model"]["vocab"]
    vocabulary["b"], vocabulary["c"] = vocabulary["c"], vocabulary["b"]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(letters)), eos_token="<end>")
    other.chat_template = TEMPLATE
    assert [files(changed) for changed in (template, rules, other)] == [7, 8, 9]
    with torch.autocast("cpu", torch.bfloat16):
        assert files() == 10
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 11]
    assert files() == 11
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert files() == 12
    model.config.rms_norm_eps = 1e-3
    assert files() == 13


def test_the_file_is_named_after_the_adapters_that_are_on(
    model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    replace_generate(adapted, varied)
    self_generated(adapted, tokenizer, cache=tmp_path, **SHORT)
    with adapted.disable_adapter():
        self_generated(adapted, tokenizer, cache=tmp_path, **SHORT)
    assert len(list(tmp_path.iterdir())) == 2
    self_generated(adapted, tokenizer, cache=tmp_path, **SHORT)
    assert len(list(tmp_path.iterdir())) == 2


def test_prompts_are_padded_on_the_left_and_the_tokenizer_is_not_touched(
    model: LlamaForCausalLM, tokenizer: Any
) -> None:
    calls = replace_generate(model, varied)
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side)
    self_generated(model, tokenizer, tokens=100, sequence_length=24, batch_size=5)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side) == before
    asked = prompts(0)
    for call in calls:
        for ids, mask in zip(call["input_ids"].tolist(), call["attention_mask"].tolist(), strict=True):
            length = sum(mask)
            assert mask == [0] * (len(mask) - length) + [1] * length
            assert tokenizer.decode(ids[-length:]) == next(asked)
            assert set(ids[:-length]) <= {END}
    assert any(0 in call["attention_mask"] for call in calls)


def test_what_repeats_itself_is_short_or_was_written_before_is_dropped(model: LlamaForCausalLM, tokenizer: Any) -> None:
    answers = [
        [*range(10, 13)] * 10,  # repeats itself
        [*range(10, 20)],  # short
        [],  # empty
        varied(0, 0),
    ]
    calls = replace_generate(model, lambda call, row: answers[row] if call == 0 else varied(call % 2, row))
    texts = self_generated(model, tokenizer, tokens=240, sequence_length=24, batch_size=4)
    expected = [varied(0, 0), *(varied(1, row) for row in range(4)), *(varied(0, row) for row in range(1, 4))]
    assert texts == [tokenizer.decode(ids).strip() for ids in expected][: len(texts)]
    assert len(calls) == 3


def test_an_answer_ends_at_its_first_end(model: LlamaForCausalLM, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = [95, 96]
    calls = replace_generate(model, lambda call, row: [*varied(call, row), (95, 96, END)[row], *range(40)])
    texts = self_generated(model, tokenizer, tokens=80, sequence_length=24, batch_size=3)
    assert texts == [tokenizer.decode(varied(0, row)).strip() for row in range(3)]
    assert calls[0]["eos_token_id"] == [95, 96, END]


SYSTEM = "You are a helpful model which answers what it is asked, shortly, and with all the care there is."
CHAT = (
    "{{ '<sys>' }}{% if messages[0]['role'] != 'system' %}" + SYSTEM + "{{ '\\n\\n' }}{% endif %}{% for message in "
    "messages %}{{ '<user>' + message['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}"
)


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    """A template that adds a system prompt by itself, and special tokens of its own."""
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<sys>", "<user>", "<answer>"]})
    chat.chat_template = CHAT
    return chat


def half(tokenizer: Any) -> int:
    """The first of two bytes of a letter, which alone is none."""
    return int(tokenizer.convert_tokens_to_ids("\u00c3"))


class TestConversations:
    SHORT: ClassVar[dict[str, Any]] = {"tokens": 500, "sequence_length": 40, "batch_size": 3, "conversation": True}

    @pytest.fixture
    def model(self, model: LlamaForCausalLM) -> LlamaForCausalLM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(END + 4)
        return model

    def test_they_are_what_the_model_saw_and_said(self, model: LlamaForCausalLM, chat: Any) -> None:
        calls = replace_generate(model, lambda call, row: varied(call, row) + [END] * (row == 1))
        texts = self_generated(model, chat, **self.SHORT)
        seen = [
            ids[mask.bool()].tolist()
            for call in calls
            for ids, mask in zip(call["input_ids"], call["attention_mask"], strict=True)
        ]
        for number, text in enumerate(texts):
            call, row = divmod(number, 3)
            # An end that was written stays; the rows of a batch that are shorter end with one too.
            said = [*varied(call, row), END]
            assert chat(text, add_special_tokens=False)["input_ids"] == seen[number] + said
            assert text.startswith(f"<sys>{SYSTEM}\n\n<user>") and "<answer>" in text and text.endswith("<end>")
        assert sum(len(chat(text, add_special_tokens=False)["input_ids"]) for text in texts) >= 500

    def test_an_answer_that_was_cut_off_has_no_end(self, model: LlamaForCausalLM, chat: Any) -> None:
        replace_generate(model, lambda call, row: varied(call, row))
        texts = self_generated(model, chat, **self.SHORT)
        assert not any("<end>" in text for text in texts)

    def test_they_are_kept_in_a_file_of_their_own(self, model: LlamaForCausalLM, chat: Any, tmp_path: Path) -> None:
        alone = {key: value for key, value in self.SHORT.items() if key != "conversation"}
        replace_generate(model, varied)
        self_generated(model, chat, cache=tmp_path, **alone)
        texts = self_generated(model, chat, cache=tmp_path, **self.SHORT)
        assert len(list(tmp_path.iterdir())) == 2
        replace_generate(model, lambda call, row: pytest.fail("it was generated again"))
        assert self_generated(model, chat, cache=tmp_path, **self.SHORT) == texts
        self_generated(model, chat, cache=tmp_path, **alone)

    def test_they_are_other_texts_than_the_answers_of_the_same_seed(self, model: LlamaForCausalLM, chat: Any) -> None:
        """A mixture that holds both would otherwise leave out of one what it took from the other."""
        states = []

        def drawn(call: int, row: int) -> list[int]:
            states.append(torch.get_rng_state())
            return varied(call, row)

        calls = replace_generate(model, drawn)
        self_generated(model, chat, **{**self.SHORT, "conversation": False})
        first, asked = states[0], calls[0]["input_ids"]
        states.clear(), calls.clear()
        self_generated(model, chat, **self.SHORT)
        assert not torch.equal(states[0], first) and not torch.equal(calls[0]["input_ids"], asked)

    def test_what_is_not_read_back_is_left_out(self, model: LlamaForCausalLM, chat: Any) -> None:
        """What is sampled may be no usual spelling: half a letter of two bytes."""
        replace_generate(model, lambda call, row: [*varied(call, row), *([half(chat)] if row else [])])
        texts = self_generated(model, chat, **self.SHORT)
        own = [chat.decode(varied(call, 0)).strip() for call in range(len(texts))]
        assert all(answer in text for answer, text in zip(own, texts, strict=True))

    def test_a_tokenizer_that_reads_none_back(self, model: LlamaForCausalLM, chat: Any) -> None:
        replace_generate(model, lambda call, row: [*varied(call, row), half(chat)])
        with pytest.raises(StreamlineError, match=r"24 texts, of which 0.*same tokens.*self"):
            self_generated(model, chat, **self.SHORT)

    def test_a_template_that_is_not_read_back(self, model: LlamaForCausalLM, chat: Any) -> None:
        """A tokenizer whose template comes to tokens by a way of its own."""
        calls = replace_generate(model, varied)
        real = chat.apply_chat_template

        def with_more(messages: Any, **options: Any) -> Any:
            return [0, *real(messages, **options)] if options["tokenize"] else real(messages, **options)

        chat.apply_chat_template = with_more
        expected = r"chat template.*Use.*--calibration self"
        with pytest.raises(StreamlineError, match=expected):
            self_generated(model, chat, **self.SHORT)
        assert not calls

    def test_a_prompt_that_is_decoded_otherwise_than_it_was_written(self, model: LlamaForCausalLM, chat: Any) -> None:
        """As a tokenizer does that puts a space after each special token."""
        replace_generate(model, varied)
        real = chat.decode
        chat.decode = lambda ids, **options: real(ids, **options).replace("<user>", "<user> ")
        texts = self_generated(model, chat, **self.SHORT)
        assert all("<user> " not in text for text in texts)
        chat.decode = real
        replace_generate(model, varied)
        assert texts == self_generated(model, chat, **self.SHORT)

    def test_they_are_dealt_with_the_system_prompt(self, model: LlamaForCausalLM, chat: Any) -> None:
        replace_generate(model, varied)
        texts = self_generated(model, chat, **{**self.SHORT, "tokens": 4000})
        sizes = {"calibration_tokens": 1200, "validation_tokens": 600, "test_tokens": 600, "sequence_length": 300}
        split = mixed_split({"chat": MixedSource(texts, 1.0, conversations=True)}, chat, **sizes)
        for part in (split.calibration, split.validation, split.test):
            text = chat.decode(part.flatten().tolist())
            assert text.count("<user>") == pytest.approx(text.count(f"<sys>{SYSTEM}\n\n"), abs=1) and SYSTEM in text


def test_a_model_whose_weights_are_offloaded_writes_the_same(model: LlamaForCausalLM, tokenizer: Any) -> None:
    import accelerate

    wanted = self_generated(model, tokenizer, **SHORT)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    assert self_generated(offloaded, tokenizer, **SHORT) == wanted


@pytest.mark.parametrize("batch_size", [1, 12])
def test_what_is_kept_of_the_same_answers_does_not_depend_on_the_batch_size(
    model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, batch_size: int
) -> None:
    def scores(size: int) -> list[dict[str, Any]]:
        replace_generate(model, lambda call, row: varied(0, size * call + row))
        folder = tmp_path / str(size)
        self_generated(model, tokenizer, tokens=300, sequence_length=24, batch_size=size, cache=folder)
        (file,) = folder.iterdir()
        return [json.loads(line) for line in file.read_text().splitlines()]

    expected = scores(2)
    assert scores(batch_size)[: len(expected)] == expected[: len(scores(batch_size))]


def test_prompts_are_many_and_each_comes_once_before_any_comes_again() -> None:
    number = len(FORMS) * len(TOPICS)
    assert number >= 60
    stream = prompts(3)
    first, second = list(islice(stream, number)), list(islice(stream, number))
    assert len(set(first)) == number
    assert sorted(first) == sorted(second)
    assert first != second
    assert list(islice(prompts(3), number)) == first
    assert list(islice(prompts(4), number)) != first


class TestErrors:
    def test_no_chat_template(self, model: LlamaForCausalLM, tokenizer: Any) -> None:
        plain = copy.deepcopy(tokenizer)
        plain.chat_template = None
        with pytest.raises(StreamlineError, match=r"Expected.*--calibration FILE"):
            self_generated(model, plain, tokens=100)

    def test_cannot_generate(self, model: LlamaForCausalLM, tokenizer: Any) -> None:
        with pytest.raises(StreamlineError, match=r"LlamaModel"):
            self_generated(model.model, tokenizer, tokens=100)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"tokens": 0}, r"tokens=0.*at least 1"),
            ({"sequence_length": 15}, r"sequence_length=15.*at least 16"),
            ({"temperature": 0.0}, r"temperature=0.0.*at least 1e-06"),
            ({"temperature": math.nan}, r"temperature=nan.*Expected"),
            ({"top_p": 1.5}, r"top_p=1.5.*Expected.*1"),
            ({"batch_size": 0}, r"batch_size=0.*at least 1"),
        ],
    )
    def test_settings(self, model: LlamaForCausalLM, tokenizer: Any, setting: dict[str, Any], message: str) -> None:
        with pytest.raises(StreamlineError, match=message):
            self_generated(model, tokenizer, **{"tokens": 100, **setting})

    def test_no_room_for_an_answer(self, model: LlamaForCausalLM, tokenizer: Any) -> None:
        model.config.max_position_embeddings = 40
        with pytest.raises(StreamlineError, match=r"new_tokens=16 need.*has 40"):
            self_generated(model, tokenizer, tokens=100)

    def test_a_model_that_says_nothing(self, model: LlamaForCausalLM, tokenizer: Any) -> None:
        calls = replace_generate(model, lambda call, row: [END, END])
        with pytest.raises(StreamlineError, match=r"150 tokens.*16 texts.*0 with 0 tokens"):
            self_generated(model, tokenizer, **SHORT)
        assert len(calls) == 8

    @pytest.mark.parametrize("damage", ['{"text": ', "[]", '{"text": "a"}', '{"text": 1, "tokens": 1}'])
    def test_damaged_cache(self, model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, damage: str) -> None:
        replace_generate(model, varied)
        self_generated(model, tokenizer, cache=tmp_path, **SHORT)
        (file,) = tmp_path.iterdir()
        file.write_text(damage + "\n")
        with pytest.raises(StreamlineError, match=r"is damaged.*Expected.*Delete"):
            self_generated(model, tokenizer, cache=tmp_path, **SHORT)


def test_a_trained_model_writes_stories(stories: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = stories
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE + " Once upon a time"
    options: dict[str, Any] = {"tokens": 1_000, "sequence_length": 128, "batch_size": 4}
    texts = self_generated(model, tokenizer, cache=tmp_path, **options)
    assert sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) >= 1_000
    assert " was " in " ".join(texts)
    assert self_generated(model, tokenizer, cache=tmp_path, **options) == texts
