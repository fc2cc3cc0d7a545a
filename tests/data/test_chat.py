"""Conversations in the tokenizer's chat template; one that leaves out a turn is named."""

import copy
import logging

import pytest
from transformers import PreTrainedTokenizerFast

from grasp_lora.data.encode import render_chat
from grasp_lora.errors import DataError

TURNS = [{"role": "user", "content": "hi"}]


@pytest.fixture
def with_template(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tiny_tokenizer)


def test_prompts_are_those_of_transformers(with_template):
    with_template.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m | tojson }}{% endfor %}"
    conversations = [[{"role": "user", "content": f'é "{i}"\n\x00\u2028'}] * (i % 3 + 1) for i in range(40)]
    expected = with_template.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    assert render_chat(with_template, conversations, [""] * 40) == expected


SYSTEM = {"role": "system", "content": " Be  brief.\n"}
# As Phi-3-mini had it at first, Gemma (the first user turn gets the text), and what knows its own words in it, as SmolLM3.
DROPS = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
FOLDS = "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}\n{% endif %}{{ messages[-1].content }}"
REWRITES = "{{ messages[0].content.replace('/no_think', '') | upper }}{{ messages[-1].content | trim }}"


def test_a_template_that_leaves_out_the_system_message_is_refused(with_template):
    with_template.chat_template = DROPS
    assert render_chat(with_template, [TURNS], ["a"]) == ["[user]hi"]
    with pytest.raises(
        DataError, match=r"^b: the tokenizer's chat template leaves out the system message; put .* first user turn$"
    ):
        render_chat(with_template, [TURNS, [SYSTEM, *TURNS], [SYSTEM, *TURNS]], ["a", "b", "c"])


@pytest.mark.parametrize("template", [FOLDS, REWRITES, "{{ messages | tojson }}"])
@pytest.mark.parametrize("content", ["Be  brief.\n", "/no_think", 'a\n"b"'])
def test_a_template_may_change_texts(template, content, with_template, caplog):
    with_template.chat_template = template
    talk = [{**SYSTEM, "content": content}, {"role": "user", "content": f" {content} "}]
    with caplog.at_level(logging.WARNING):
        assert render_chat(with_template, [talk], ["a"])
    assert not caplog.messages


def test_a_template_that_leaves_out_a_user_turn_is_named(with_template, caplog):
    with_template.chat_template = "{{ messages[-1].content }}"
    early = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    with caplog.at_level(logging.WARNING):
        assert render_chat(with_template, [TURNS, [*early, *TURNS], [*early, *TURNS]], ["a", "b", "c"]) == ["hi"] * 3
    assert caplog.messages == [
        "b: the tokenizer's chat template leaves out a user turn, so the model does not see it; check the template"
    ]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no \x1b[31m\n system') }}", r"no \\x1b\[31m system"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    ],
)
def test_what_a_template_refuses_is_one_line(template, reason, with_template):
    with_template.chat_template = template
    with pytest.raises(DataError, match=rf"^row 0: the tokenizer's chat template refuses it: {reason}") as caught:
        render_chat(with_template, [TURNS], ["row 0"])
    assert "\n" not in str(caught.value)
