"""Conversations: golden token masks of well-known shapes of templates, written out by hand.

In the expected texts, ⟦ and ⟧ stand around the tokens that have a loss. Every byte and every special token is a token
of its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chats import GEMMA, LLAMA_3, MISTRAL, QWEN_2_5, QWEN_3, TOKENS, byte_level, chat_tokenizer, shown
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fedray.config import DataConfig, RawRows
from fedray.data.examples import assemble
from fedray.data.formats.instructions import find_instructions
from fedray.data.sources.files import Files
from fedray.data.tokens.chat import find_chat_template
from fedray.data.tokens.chat_templates import CHATML, PLAIN
from fedray.data.tokens.tokenise import Tokenised, tokenise
from fedray.errors import ConfigError, DataError

Conversation = list[dict[str, Any]]


def turns(*contents: str, system: str | None = None) -> Conversation:
    """Return a conversation in which user and assistant take turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents))]


def config(folder: Path, **settings: Any) -> DataConfig:
    return Files.model_validate({"files": {"train": "-"}, "cache_dir": str(folder), "max_length": 1000} | settings)


@pytest.fixture
def tokens(tmp_path: Path) -> Callable[..., Tokenised]:
    """Return a function that tokenises conversations."""

    def make(
        tokenizer: PreTrainedTokenizerBase, *conversations: Conversation, columns: Any = None, **settings: Any
    ) -> Tokenised:
        data = config(tmp_path, **settings)
        raw = RawRows("here", columns or {"messages": list(conversations)}, "train")
        template = find_chat_template(data, tokenizer)
        instructions = find_instructions([raw], data, template is not None)
        return tokenise(assemble([raw], data, "causal_lm", instructions), tokenizer, data, template)

    return make


def marked(tokenizer: PreTrainedTokenizerBase, found: Tokenised) -> list[str]:
    return [shown(tokenizer, row["input_ids"], row["labels"]) for row in found.table.to_pylist()]


TWO = turns("Hi", "Hello.", "More?", "No.", system="Be brief.")

GOLDEN = {
    "llama_3": (
        LLAMA_3,
        TWO,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nMore?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦No.<|eot_id|>⟧",
    ),
    "llama_3, blanks around an answer": (
        LLAMA_3,
        turns(" Hi\n", "  Hello. \n"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧",
    ),
    "qwen_2.5": (
        QWEN_2_5,
        TWO,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nMore?<|im_end|>\n"
        "<|im_start|>assistant\n⟦No.<|im_end|>⟧",
    ),
    "qwen_2.5, no system turn, last a question": (
        QWEN_2_5,
        turns("Hi", "Hello.", "More?"),
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧",
    ),
    "qwen_3": (
        QWEN_3,
        TWO,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nMore?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nNo.<|im_end|>⟧",
    ),
    "qwen_3, thoughts": (
        QWEN_3,
        turns("Hi", "<think>\nA guest.\n</think>\n\nHello.", "More?", "<think>\nI see.\n</think>\n\nNo."),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nI see.\n</think>\n\nNo.<|im_end|>⟧",
    ),
    "qwen_3, nothing but a thought": (
        QWEN_3,
        turns("Hi", "<think>\nA guest.\n</think>\n\n", "More?", "No."),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n"
        "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nNo.<|im_end|>⟧",
    ),
    "gemma": (
        GEMMA,
        turns("Hi", "Hello.", "More?", "No. "),
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\nMore?<end_of_turn>\n<start_of_turn>model\n⟦No.<end_of_turn>⟧",
    ),
    "mistral": (
        MISTRAL,
        TWO,
        "<s>[INST] Hi[/INST] ⟦Hello.</s>⟧[INST] Be brief.\n\nMore?[/INST] ⟦No.</s>⟧",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_assistants_turns_and_the_tokens_that_end_them_have_a_loss(
    tokens: Callable[..., Tokenised], name: str
) -> None:
    template, conversation, expected = GOLDEN[name]
    tokenizer = chat_tokenizer(template)
    found = tokens(tokenizer, conversation)
    assert marked(tokenizer, found) == [expected]
    whole = tokenizer.apply_chat_template(conversation)["input_ids"]
    ids = found.table["input_ids"][0].as_py()
    assert ids == whole[: len(ids)]  # nothing is added to what transformers makes: no second token begins the text


CHATML_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "⟦Hello.<|im_end|>⟧\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧"
)
PLAIN_TEXT = "Be brief.\n\nUser: Hi\n\nAssistant:⟦ Hello.<eos>⟧\n\nUser: More?\n\nAssistant:⟦ No.<eos>⟧"


@pytest.mark.parametrize(("name", "expected"), [("chatml", CHATML_TEXT), ("plain", PLAIN_TEXT)])
@pytest.mark.parametrize("bos", [None, "<bos>"])
def test_built_in_templates_begin_as_the_tokenizer_begins_a_text(
    tokens: Callable[..., Tokenised], name: str, expected: str, bos: str | None
) -> None:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], bos)
    assert marked(tokenizer, tokens(tokenizer, TWO, chat_template=name)) == [(bos or "") + expected]


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_marks_of_a_template_say_what_transformers_says(tokens: Callable[..., Tokenised], template: str) -> None:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = template
    (row,) = tokens(tokenizer, TWO).table.to_pylist()
    whole = tokenizer.apply_chat_template(TWO, return_assistant_tokens_mask=True)
    size = len(row["input_ids"])
    assert row["input_ids"] == whole["input_ids"][:size]
    assert [int(label != -100) for label in row["labels"]] == whole["assistant_masks"][:size]
    assert not any(whole["assistant_masks"][size:])


def without_marks(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
answers = texts.filter(lambda text: text.strip() and "</think>" not in text)


@given(st.lists(st.tuples(texts, answers), min_size=1, max_size=3), st.sampled_from(["chatml", *TOKENS]))
def test_characters_say_the_same_as_marks(
    tmp_path_factory: pytest.TempPathFactory, exchanges: Sequence[tuple[str, str]], template: str
) -> None:
    """Without its marks, ChatML's spans are found by characters and equal the marked ones. In the other shapes, the
    spans are the answers, one after another, each with the token that ends it."""
    conversation = turns(*(text for exchange in exchanges for text in exchange))
    unmarked = without_marks(CHATML) if template == "chatml" else template
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"]) if template == "chatml" else chat_tokenizer(template)
    tokenizer.chat_template = unmarked
    rendered = find_chat_template(config(Path()), tokenizer).render(conversation)
    if template == "chatml":
        tokenizer.chat_template = CHATML
        assert rendered == find_chat_template(config(Path()), tokenizer).render(conversation)
        return
    end = {LLAMA_3: "<|eot_id|>", GEMMA: "<end_of_turn>", MISTRAL: "</s>"}.get(template, "<|im_end|>")
    expected = [(answer.strip() if template in (LLAMA_3, GEMMA) else answer) + end for _, answer in exchanges]
    if template == QWEN_3:
        expected[-1] = f"<think>\n\n</think>\n\n{expected[-1]}"
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == expected
    assert rendered.text[rendered.spans[-1][0] : rendered.answer_end] == expected[-1].removesuffix(end)


def test_only_the_completion_of_lists_of_turns_has_a_loss(tokens: Callable[..., Tokenised]) -> None:
    tokenizer = chat_tokenizer(GEMMA)
    columns = {"prompt": [TWO[1:4]], "completion": [TWO[4:]]}
    expected = (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nMore?<end_of_turn>\n<start_of_turn>model\n⟦No.<end_of_turn>⟧"
    )
    assert marked(tokenizer, tokens(tokenizer, columns=columns)) == [expected]
    tokenizer = byte_level()
    expected = "User: Hi\n\nAssistant: Hello.<eos>\n\nUser: More?\n\nAssistant:⟦ No.<eos>⟧"
    assert marked(tokenizer, tokens(tokenizer, columns=columns, chat_template="plain")) == [expected]


def test_the_reference_is_the_last_answer_without_the_token_that_ends_it(tokens: Callable[..., Tokenised]) -> None:
    for tokenizer in (chat_tokenizer(LLAMA_3), chat_tokenizer(MISTRAL)):
        assert tokens(tokenizer, TWO).table["answer"].to_pylist() == ["No."]
    assert tokens(byte_level(), TWO, chat_template="plain").table["answer"].to_pylist() == [" No."]


def test_a_long_conversation_keeps_the_first_token_and_its_last_answer(tokens: Callable[..., Tokenised]) -> None:
    """Of 24 tokens, 4 are the last answer's (`No.` and the token that ends it). The other 20 are `<bos>` and the 19
    before the answer: 7 of its own header, 2 that end the turn before, `More?` with its line break 6, and `user` 4.

    The whole has 1 + (1 + 5 + 2 + 2) + (1 + 6 + 6 + 2) + (1 + 5 + 5 + 2) + (1 + 6 + 3 + 1) = 50 tokens.
    """
    tokenizer = chat_tokenizer(GEMMA)
    found = tokens(tokenizer, turns("Hi", "Hello.", "More?", "No."), max_length=24)
    expected = "<bos>user\nMore?<end_of_turn>\n<start_of_turn>model\n⟦No.<end_of_turn>⟧"
    assert marked(tokenizer, found) == [expected]
    (note,) = found.notes
    assert note == (
        "data.max_length: 24 cuts 1 of 1 examples; the longest has 50 tokens, and half of the cut ones lose 26 or "
        "more; no answer is cut"
    )


def test_a_template_that_ends_no_turn_is_noted(tokens: Callable[..., Tokenised]) -> None:
    """The end-of-text token then follows the last answer; without marks, as with them."""
    template = "{% for turn in messages %}{{ turn.role[0] }}>MARK{{ turn.content }}END\n{% endfor %}"
    unmarked = template.replace("MARK", "").replace("END", "")
    tokenizer = byte_level()
    found = tokens(tokenizer, TWO, chat_template=unmarked)
    assert marked(tokenizer, found) == ["s>Be brief.\nu>Hi\na>⟦Hello.⟧\nu>More?\na>⟦No.<eos>⟧"]
    assert "writes no token after the assistant's turns" in found.notes[0]


def test_marks_without_the_token_that_ends_a_turn_are_noted(tokens: Callable[..., Tokenised]) -> None:
    text = (
        "{% for turn in messages %}{{ turn.role[0] }}>{% if turn.role == 'assistant' %}"
        "{% generation %}{{ turn.content }}{% endgeneration %}{% else %}{{ turn.content }}{% endif %}"
        "{{ eos_token }}\n{% endfor %}"
    )
    found = tokens(byte_level(), TWO, chat_template=text)
    assert marked(byte_level(), found) == ["s>Be brief.<eos>\nu>Hi<eos>\na>⟦Hello.⟧<eos>\nu>More?<eos>\na>⟦No.⟧"]
    assert "leaves '<eos>' out of what it marks" in found.notes[0]


def test_todays_date_is_always_the_same(tokens: Callable[..., Tokenised]) -> None:
    text = "{{ strftime_now('%d %b %Y') }}\n{{ messages[-1].content }}{{ eos_token }}"
    found = tokens(byte_level(), turns("Hi", "Hello."), chat_template=text)
    assert marked(byte_level(), found) == ["26 Jul 2024\n⟦Hello.<eos>⟧"]


REFUSED: dict[str, tuple[str, Conversation, str]] = {
    "system turn": (
        GEMMA,
        TWO,
        r"here: row 1: the tokenizer's chat template cannot render .*System role not supported",
    ),
    "order": (GEMMA, [*TWO[1:3], *TWO[2:]], "roles must alternate"),
    "content left out": (
        "{% for turn in messages %}{{ turn.role }}{% endfor %}<eos>",
        TWO,
        r"does not show where turn 3 begins and ends.*\{% generation %\}",
    ),
    "content twice": (
        "{% for turn in messages %}{{ turn.content + turn.content }}{% endfor %}<eos>",
        TWO,
        "does not show where turn 3 begins and ends",
    ),
    "what precedes depends on the content": (
        "{% for turn in messages %}{{ turn.content | length }}{{ turn.content }}{% endfor %}<eos>",
        TWO,
        "does not show where turn 3 begins and ends",
    ),
    "nothing marked": (
        "{% for turn in messages %}{% if turn.role == 'x' %}{% generation %}{{ turn.content }}{% endgeneration %}"
        "{% endif %}{% endfor %}",
        TWO,
        "marks nothing of the conversation",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_conversation_that_cannot_be_marked_is_refused(tokens: Callable[..., Tokenised], name: str) -> None:
    template, conversation, message = REFUSED[name]
    tokenizer = chat_tokenizer(GEMMA)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        tokens(tokenizer, conversation)


def test_conversations_need_a_template(tokens: Callable[..., Tokenised], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no chat template; set data\.chat_template to `plain`, `chatml`"):
        tokens(byte_level(), TWO)
    with pytest.raises(ConfigError, match=r"'chatml' writes '<\|im_start\|>', which is no token of this tokenizer"):
        tokens(byte_level(), TWO, chat_template="chatml")
    with pytest.raises(ConfigError, match=r"'plian' is neither a file nor .*did you mean 'plain'.*chatml, plain"):
        tokens(byte_level(), TWO, chat_template="plian")


def test_several_templates_need_a_default(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"tools": PLAIN, "rag": PLAIN}
    with pytest.raises(ConfigError, match=r"the tokenizer's chat template: .*tools.*; set data\.chat_template"):
        find_chat_template(config(tmp_path), tokenizer)
    tokenizer.chat_template |= {"default": CHATML}
    assert find_chat_template(config(tmp_path), tokenizer).text == CHATML


def test_a_template_may_be_a_file(tokens: Callable[..., Tokenised], tmp_path: Path) -> None:
    """The configuration then has its content, and needs no file where it is used."""
    path = tmp_path / "chat.jinja"
    path.write_text(PLAIN)
    assert config(tmp_path, chat_template=str(path)).chat_template == PLAIN
    found = tokens(byte_level(), TWO, chat_template=str(path))
    assert marked(byte_level(), found) == [PLAIN_TEXT]


def test_another_template_makes_other_tokens_in_the_cache(tokens: Callable[..., Tokenised]) -> None:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"])
    expected = {"chatml": CHATML_TEXT, "plain": PLAIN_TEXT}
    for name in ("chatml", "plain", "chatml", "plain"):
        assert marked(tokenizer, tokens(tokenizer, TWO, chat_template=name)) == [expected[name]]
    columns = {"prompt": [TWO[:4]], "completion": [TWO[4:]]}  # the same turns, of which fewer are learned
    assert marked(tokenizer, tokens(tokenizer, columns=columns, chat_template="plain")) != [PLAIN_TEXT]
