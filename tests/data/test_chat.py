"""A chat template is a program of a stranger: it makes prompts, or ends within limits and is named in one line."""

import copy
import logging
import resource
import threading
import time

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from grasp_lora.data import chat
from grasp_lora.data.chat import render_chat
from grasp_lora.errors import DataError

TURNS = [{"role": "user", "content": "hi"}]
GROWS = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = "

OUT_OF_MEMORY = {
    "a product": "{{ 'a' * 10**10 }}",
    "doubled texts": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled lists": GROWS + "ns.x + ns.x %}{% endfor %}",
    "a width": "{{ '%2000000000d' % 1 }}",
    "a width of format": "{{ '{:>9999999999}'.format('a') }}",
    "replaced by itself": "{% set x = ('a' * 9999).replace('a', 'a' * 99999) %}{{ x }}",
    "joined": "{{ (['a' * 99999] * 99999) | join('b') }}",
    "centered": "{{ 'a' | center(10**10) }}",
    "bytes": "{{ 'a'.encode().ljust(10**10) }}",
    "a batch": "{{ [1] | batch(10**10, 0) | list | length }}",
}
TOO_DEEP = {
    "a macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
}
WITHOUT_END = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one operation": "{{ [1] | slice(10**10) | list | length }}",
}
REFUSED = {
    "what it says itself": ("{{ raise_exception('\x1b[31mno\n' * 10**5) }}", r"refuses it: \\x1b\[31mno \\x1b"),
    "a division by zero": ("{{ 1 / 0 }}", "refuses it: division by zero"),
    "no valid template": ("{% for %}", "refuses it: Expected an expression"),
    "a file": ("{% include '/etc/passwd' %}", "refuses it: no loader"),
    "the insides of Python": ("{{ ''.__class__.__mro__ }}", "refuses it: access to attribute '__class__'"),
    "thousands of digits": ("{{ (10**5000) | string }}", "refuses it: Exceeds the limit"),
    "much text": ("{{ 'a' * 10**6 }}", "refuses it: it makes them 10 times as long and adds 10000 characters"),
    "no default template": ({"rag": "a", "tool_use": "b"}, "refuses it: This model has multiple chat templates"),
}


@pytest.fixture
def with_template(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that tests reach soon."""
    monkeypatch.setattr(chat, "MOST_SECONDS", 1)
    monkeypatch.setattr(chat, "MOST_MEMORY", 2**28)  # a new thread alone reserves 2**27


def children() -> set[int]:
    """Processes that this one has started and not waited for; a server of forks of other tests may be among them."""
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize(
    ("template", "message"),
    [
        *((template, r"refuses it: it needs more than \d+ bytes of memory") for template in OUT_OF_MEMORY.values()),
        *((template, "refuses it: maximum recursion depth exceeded") for template in TOO_DEEP.values()),
        *((template, r"does not end; it was stopped after 1 s of computing") for template in WITHOUT_END.values()),
        *REFUSED.values(),
    ],
    ids=[*OUT_OF_MEMORY, *TOO_DEEP, *WITHOUT_END, *REFUSED],
)
def test_hostile_templates(template: str | dict, message: str, with_template: PreTrainedTokenizerFast) -> None:
    with_template.chat_template = template
    started = children()
    before = resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(DataError, match=rf"^row 0: the tokenizer's chat template {message}") as caught:
        render_chat(with_template, [TURNS], ["row 0"])
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == before[0]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before[1].ru_utime - before[1].ru_stime < 2
    assert children() == started


@pytest.mark.usefixtures("tight")
def test_the_first_conversation_that_is_refused_is_named(with_template: PreTrainedTokenizerFast) -> None:
    with_template.chat_template = "{{ 1 // (messages[0].content | length) }}{{ 'a' * 10**(messages | length) }}"
    fine, empty, long = TURNS, [{"role": "user", "content": ""}], TURNS * 10
    assert render_chat(with_template, [fine, fine], ["a", "b"]) == ["0" + "a" * 10] * 2
    with pytest.raises(DataError, match=r"^b: the tokenizer's chat template refuses it: .* by zero"):
        render_chat(with_template, [fine, empty, long], ["a", "b", "c"])
    with pytest.raises(DataError, match=r"^c: the tokenizer's chat template refuses it: it needs more than"):
        render_chat(with_template, [fine, fine, long, empty], ["a", "b", "c", "d"])


@pytest.mark.usefixtures("tight")
def test_any_thread_may_ask_and_others_go_on(with_template: PreTrainedTokenizerFast) -> None:
    """Several threads at once, one of them with a template that does not end."""
    endless = copy.deepcopy(with_template)
    endless.chat_template = WITHOUT_END["loops"]
    with_template.chat_template = "{{ messages[0].content }}\u2028\U0001f600"
    found: dict[int, object] = {}
    started = children()

    def ask(number: int) -> None:
        try:
            found[number] = render_chat(with_template if number else endless, [TURNS] * 50, ["x"] * 50)
        except DataError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "does not end" in str(found.pop(0))
    assert list(found.values()) == [["hi\u2028\U0001f600"] * 50] * 3
    assert children() == started


def test_prompts_are_those_of_transformers(with_template: PreTrainedTokenizerFast) -> None:
    with_template.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m | tojson }}{% endfor %}"
    conversations = [[{"role": "user", "content": f'é "{i}"\n\x00\u2028'}] * (i % 3 + 1) for i in range(40)]
    expected = with_template.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    assert render_chat(with_template, conversations, [""] * 40) == expected


SYSTEM = {"role": "system", "content": " Be  brief.\n"}
# As Phi-3-mini had it at first, Gemma (the first user turn gets the text), and what knows its own words in it, as SmolLM3.
DROPS = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
FOLDS = "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}\n{% endif %}{{ messages[-1].content }}"
REWRITES = "{{ messages[0].content.replace('/no_think', '') | upper }}{{ messages[-1].content | trim }}"


def test_a_template_that_leaves_out_the_system_message_is_refused(with_template: PreTrainedTokenizerFast) -> None:
    with_template.chat_template = DROPS
    assert render_chat(with_template, [TURNS], ["a"]) == ["[user]hi"]
    with pytest.raises(
        DataError, match=r"^b: the tokenizer's chat template leaves out the system message; put .* first user turn$"
    ):
        render_chat(with_template, [TURNS, [SYSTEM, *TURNS], [SYSTEM, *TURNS]], ["a", "b", "c"])


@pytest.mark.parametrize("template", [FOLDS, REWRITES, "{{ messages | tojson }}"])
@pytest.mark.parametrize("content", ["Be  brief.\n", "/no_think", 'a\n"b"'])
def test_a_template_may_change_texts(
    template: str, content: str, with_template: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with_template.chat_template = template
    talk = [{**SYSTEM, "content": content}, {"role": "user", "content": f" {content} "}]
    with caplog.at_level(logging.WARNING):
        assert render_chat(with_template, [talk], ["a"])
    assert not caplog.messages


def test_a_template_that_leaves_out_a_user_turn_is_named(
    with_template: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with_template.chat_template = "{{ messages[-1].content }}"
    early = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    with caplog.at_level(logging.WARNING):
        assert render_chat(with_template, [TURNS, [*early, *TURNS], [*early, *TURNS]], ["a", "b", "c"]) == ["hi"] * 3
    assert caplog.messages == [
        "b: the tokenizer's chat template leaves out a user turn, so the model does not see it; check the template"
    ]


def test_it_takes_little_time(with_template: PreTrainedTokenizerFast) -> None:
    with_template.chat_template = "{{ messages[0].content }}"
    render_chat(with_template, [TURNS], [""])
    started = time.process_time()
    render_chat(with_template, [TURNS] * 100, [""] * 100)
    assert time.process_time() - started < 0.5
