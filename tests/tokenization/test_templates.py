"""Chat templates: transformers' text for what templates may do, a refusal for what they may not, in bounded time."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llmkit.errors import InputError
from llmkit.tokenization.templates import TemplateRefusal, render

TALK = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi \u00e9\U0001f642 {{ 7 }}"},
    {"role": "assistant", "content": " yes "}, {"role": "user", "content": "and?"},
]  # fmt: skip
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA2 = """{{ bos_token }}{% for m in messages[1:] %}{% if m.role == 'user' %}[INST] {% if loop.first %}<<SYS>>
{{ messages[0].content }}
<</SYS>>

{% endif %}{{ m.content|trim }} [/INST]{% else %}{{ ' ' ~ m.content|trim ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"""
TOOLS = """{% macro one(m) %}{{ m | tojson(indent=1) }}{% endmacro %}{% set ns = namespace(n=0) %}
{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{% set ns.n = ns.n + 1 %}{{ m.content ~ one(m) }}
{% generation %}{{ ns.n }}{% endgeneration %}{% endfor %}{{ extra }}{{ tools is none }}"""


def tokenizer(template):
    return SimpleNamespace(chat_template=template, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("template", [CHATML, LLAMA2, TOOLS], ids=["chatml", "llama-2", "tools"])
@pytest.mark.parametrize("continues", [False, True])
def test_the_text_is_that_of_transformers(template, continues):
    talk = TALK[:3] if continues else TALK
    options = {"add_generation_prompt": not continues, "continue_final_message": continues, "extra": ["x", 1]}
    expected = render_jinja_template(
        conversations=[talk], chat_template=template, bos_token="<s>", eos_token="</s>", **options
    )[0][0]
    assert render(tokenizer(template), talk, **options) == expected


def test_the_default_of_several_templates():
    assert render(tokenizer({"default": "a", "tool_use": "b"}), TALK) == "a"
    with pytest.raises(InputError, match="none of the tokenizer's chat templates is called `default`"):
        render(tokenizer({"tool_use": "b"}), TALK)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only users') }}", "refuses this conversation: only users"),
        ("{% for %}", "refuses this conversation: "),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation: "),
    ],
)
def test_what_a_template_refuses(template, said):
    with pytest.raises(TemplateRefusal, match=said):
        render(tokenizer(template), TALK)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1/0 }}", "fails: ZeroDivisionError"),
        ("{{ 'a'+1 }}", "fails: TypeError"),
        ("{% include 'x' %}", "fails: TypeError"),
        ("{{ 'x' | tojson(indent='y') | int(base=99) }}{{ '9' | int(base=99) | abs('z') }}", "fails: "),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "fails: RecursionError"),
        ("(" * 5000 + "{{ " + "(" * 5000 + " }}", "fails: |refuses|budget"),
        (5, "no text but int: 5"),
        (None, "no chat template"),
    ],
    ids=range(8),
)
def test_what_fails_is_the_fault_of_the_template(template, said):
    with pytest.raises(InputError, match=said):
        render(tokenizer(template), TALK)
    assert render(tokenizer("{{ messages | length }}"), TALK) == "4"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ([0]*(10**9))|length }}",
        "{{ 'a' * 10**10 }}",
        "{{ 'a' | center(10**9) }}",
        "{{ '%999999999d' % 1 }}{{ '{:>999999999}'.format(1) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for i in range(99) %}{{ 'x' * 99999 }}{% endfor %}",
    ],
)
def test_memory_and_output_are_bounded(template):
    start = time.monotonic()
    with pytest.raises(InputError, match=r"budget|MemoryError|Range too big|fails"):
        render(tokenizer(template), TALK)
    assert time.monotonic() - start < 30
    assert render(tokenizer("{{ messages | length }}"), TALK) == "4"


@pytest.mark.slow  # each uses up its two seconds
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9**(9**9) }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_time_is_bounded(template):
    with pytest.raises(InputError, match=r"the chat template goes beyond its budget \(2 s, 256 MiB"):
        render(tokenizer(template), TALK)
    assert render(tokenizer("{{ messages | length }}"), TALK) == "4"
