from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from pyrolora.tasks.chat import Chat
from tests.test_models import byte_pairs

# With thoughts before each reply, unless they are switched off: then the prompt ends with empty ones.
TEMPLATE = """{%- set off = enable_thinking is defined and not enable_thinking -%}
{%- for m in messages -%}
<|{{ m.role }}|>{% if m.role == 'assistant' %}<t></t>{% endif %}{{ m.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% if off %}<t></t>{% endif %}{% endif -%}"""


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    found = byte_pairs()
    found.pad_token = found.eos_token
    found.chat_template = template
    return found


def test_a_prompt_is_the_users_turn() -> None:
    """Law: the tokens are those of the rendered template, without special tokens of the tokenizer's own."""
    own = tokenizer()
    chat = Chat(own, {"enable_thinking": False}, max_length=64)
    columns, cut = chat.tokens(["What?", "Question: What?"])
    texts = ["<|user|>What?<|end|><|assistant|><t></t>", "<|user|>Question: What?<|end|><|assistant|><t></t>"]
    assert [own.decode(ids) for ids in columns["input_ids"]] == texts and cut == []
    assert columns["attention_mask"] == [[1] * len(ids) for ids in columns["input_ids"]]


def test_answers_are_found_where_the_template_puts_them() -> None:
    """Law: an answer's token is the one that follows the prompt in the template's own rendering of the reply."""
    own = tokenizer()
    chat = Chat(own, {"enable_thinking": False}, max_length=64)
    found = chat.answer_tokens("What?", ["A", "B", "D"])
    assert own.convert_ids_to_tokens(found) == ["A", "B", "D"]
    spaced = tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    spaced.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert spaced.convert_ids_to_tokens(Chat(spaced, {}, max_length=64).answer_tokens("What?", ["A", "no"])) == [
        "ĠA",
        "Ġno",
    ]


def test_replies_that_begin_with_something_else_are_refused() -> None:
    """Law: where thoughts precede the answer, or an answer has several tokens, the error shows what does follow."""
    with pytest.raises(ValueError, match=r"'A', 'B' do not: 'A' → \['<', 't', .*enable_thinking"):
        Chat(tokenizer(), {}, max_length=64).answer_tokens("What?", ["A", "B"])
    with pytest.raises(ValueError, match="'zebra' do not"):
        Chat(tokenizer(), {"enable_thinking": False}, max_length=64).answer_tokens("What?", ["A", "zebra"])


def test_long_prompts_lose_their_beginning() -> None:
    """Law: a cut prompt keeps the template around it and its own end, at exactly the most tokens."""
    own = tokenizer()
    chat = Chat(own, {"enable_thinking": False}, max_length=50)
    columns, cut = chat.tokens(["a. " * 40 + "B. yes", "short"])
    text = own.decode(columns["input_ids"][0])
    assert cut == [0] and len(columns["input_ids"][0]) == 50
    assert text.startswith("<|user|>") and text.endswith("B. yes<|end|><|assistant|><t></t>")


def test_what_is_missing_is_said() -> None:
    """Law: no chat template, or no room for it, is an error that says so."""
    with pytest.raises(ValueError, match="has no chat template"):
        Chat(tokenizer(None), {}, max_length=64)
    with pytest.raises(ValueError, match="max_length=20 is too small"):
        Chat(tokenizer(), {}, max_length=20)
