"""Chat templates: what they may do, and what is refused in time."""

import sys
import threading
import time
from typing import Any

import pytest

from ondevice.errors import OptionError, TemplateError
from ondevice.text import chat_template
from ondevice.text.chat_template import render

USER = [{"role": "user", "content": "Hi"}]


def run(template: str, messages: list[dict[str, Any]] | None = None, **kwargs: Any) -> str:
    values: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    return render(template, USER if messages is None else messages, **{**values, **kwargs})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m['content'] }}{% endfor %}",
            "<s>user: Hi",
        ),
        ("{% if add_generation_prompt %}\n  {% if 1 %}\nA{% endif %}\n{% endif %}", "A"),
        ("{{ tools is none }}{{ documents }}{{ nosuch }}", "TrueNone"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<ü>\\''} | tojson }}", '{"a": "<ü>\'"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% generation %}x{% endgeneration %}", "x"),
        (
            "{% set n = namespace(a='') %}{% for i in 'abc' %}{% set n.a = n.a ~ i %}{% endfor %}{{ n.a }}",
            "abc",
        ),
        ("{{ '%s %03d' | format('a', 7) }}{{ '{:>4}'.format(1) }}{{ '%s' % 'b' }}", "a 007   1b"),
        ("{{ ' a '.strip().replace('a', 'b').ljust(3) }}|{{ ['x', 'y'] | join('-') }}", "b  |x-y"),
        ("{{ messages | map(attribute='role') | list }}{{ messages[0:1] | length }}", "['user']1"),
        ("{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m('x') | safe | e }}{{ 2 ** 10 }}", "[x]1024"),
        ("{% set x %}a{{ 1 }}b{% endset %}{{ x | upper }}{{ ('a' 'b') * 2 }}", "A1Babab"),
        (
            "{{ [1, 2, 3] | batch(2, 'x') | list }}{{ [1, 2, 3] | slice(2, 'x') | list }}",
            "[[1, 2], [3, 'x']][[1, 2], [3, 'x']]",
        ),
        ("{{ 'ab' | center(6) }}|{{ 1.26 | round(1) }}{{ 2.1 | round(0, 'ceil') | int }}", "  ab  |1.33"),
        (
            "{{ [1, 2.5] | sum }}{{ [{'a': 1}, {'a': 2}] | sum('a', 10) }}{{ [[1], [2]] | sum(start=[]) }}",
            "3.513[1, 2]",
        ),
        (
            "{{ 'a b c d e f' | wordwrap(3) | replace('\n', '/') }}{{ 'abcdefgh' | truncate(5, true, leeway=0) }}",
            "a b/c d/e fab...",
        ),
        (
            "{{ 'a b&é' | urlencode }}{{ {'a': 1, 'b': none} | xmlattr }}{{ '<b>x</b>' | striptags }}",
            'a%20b%26%C3%A9 a="1"x',
        ),
        (
            "{{ '<' | forceescape }}{{ [1] | pprint }}{{ 1000000 | filesizeformat }}{{ messages[0] | attr('nosuch') }}",
            "&lt;[1]1.0 MB",
        ),
        ("{{ 'see http://a.org' | urlize }}", 'see <a href="http://a.org" rel="noopener">http://a.org</a>'),
        ("{{ 3 is odd and 4 is divisibleby(2) and 'x' is string and [] is sequence and 1 is in([1]) }}", "True"),
        ("", ""),
    ],
)
def test_renders(template: str, text: str) -> None:
    assert run(template) == text


def test_variables_reach_the_template() -> None:
    assert run("{{ thinking }}{{ tools[0].name }}", thinking=True, tools=[{"name": "t"}]) == "Truet"
    assert run("{{ bos_token is defined }}", bos_token=None) == "False"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_reaching_out_is_refused(template: str) -> None:
    with pytest.raises(TemplateError, match="--raw"):
        run(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**(10**9) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ ('%(a)s' * 1000) % {'a': 'x' * 100000} }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'.center(10**9) }}",
        "{{ '7'.zfill(10**9) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a' | indent(10**9, true) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
        "{{ ('{0}' * 1000).format('x' * 100000) }}",
        "{{ [1] * 10**9 }}",
        "{{ (1).to_bytes(10**9) }}",
        "{{ 'a'.translate({97: 'x' * 100000}) }}",
        "{{ ('a' * 1000000) | join('b' * 1000) }}",
        "{{ ('b' * 1000).join('a' * 1000000) }}",
        "{{ ('a' * 1000000).replace('a', 'b' * 1000) }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000) }}",
        "{{ [1, [2]] | tojson(indent=10**9) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ range(10**9) | list }}",
        "{{ lipsum(n=10**6) }}",
        "{{ [1] | batch(10**9, 'x') | list }}",
        "{{ [1] | batch(10**9) | list }}",
        "{{ [1] | slice(10**9) | list }}",
        "{{ [1] | slice(1000, 'x' * 100000) | list }}",
        "{{ 1.5 | round(10**9, 'ceil') }}",
        "{{ 1 | round(-10**9, 'floor') }}",
        "{{ (['a' * 100000] * 100) | sum(start='') }}",
        "{{ ('a b' * 100000) | wordwrap(1, true, 'x' * 1000) }}",
        "{{ ('www.a.org ' * 10000) | urlize }}",
        "{{ ('www.a.org ' * 100) | urlize(target='x' * 100000) }}",
        "{{ ('é' * 999999) | urlencode }}",
        "{{ '' | attr('__class__') }}",
        "{{ [1, 2] | random }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        *(
            "{% set ns = namespace(x=SEED) %}{% for i in range(9999) %}STEP{% endfor %}{{ ns.x }}".replace(
                "SEED", seed
            ).replace("STEP", step)
            for seed, step in [
                ("7", "{% set ns.x = ns.x * ns.x %}"),
                ("'a'", "{% set ns.x = ns.x + ns.x %}"),
                ("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
                ("'a'", "{% set ns.x = ns.x.replace('a', 'aa') %}"),
                ("'a'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
                ("'a' * 999999", "{% set ns.x = ns.x.upper() %}"),
                ("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
                ("[1]", "{% set ns.x = (ns.x, ns.x) %}"),
                ("[1]", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
                ("[1]", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
                ("[1]", "{% set ns.x = ns.x + ns.x %}"),
            ]
        ),
        "{% macro m(n) %}{{ m(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ m(60, 1) }}",
        "{% for i in range(100000) %}" + "A" * 100 + "{% endfor %}",
        "{% set x %}{% for i in range(100000) %}" + "A" * 100 + "{% endfor %}{% endset %}",
        "{% filter upper %}{% for i in range(100000) %}" + "A" * 100 + "{% endfor %}{% endfilter %}",
        "{% block b %}{% for i in range(100000) %}" + "A" * 100 + "{% endfor %}{% endblock %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "x" * 300_000,
    ],
)
def test_what_grows_is_refused_at_once(template: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError, match="--raw"):
        run(template)
    assert time.monotonic() - start < chat_template.MAX_SECONDS - 0.5  # refused, not timed out


LONG_LOOPS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "{{ 'a' " + "~ 'a'" * 50_000 + " }}",
]


@pytest.mark.parametrize("template", LONG_LOOPS)
def test_time_is_limited_in_any_thread(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    caught: list[Exception] = []

    def work() -> None:
        try:
            run(template)
        except TemplateError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    start = time.monotonic()
    thread.start()
    thread.join()
    assert time.monotonic() - start < 3
    assert "ran longer than 0.2 s" in str(caught[0])


@pytest.mark.parametrize("template", ["{{ 1 }}", "{{ 1 / 0 }}", LONG_LOOPS[0]])
def test_a_tracer_that_was_there_stays(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.1)

    def tracer(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        if template == "{{ 1 }}":
            run(template)
        else:
            with pytest.raises(TemplateError):
                run(template)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("a\n{% for %}", "line 2"),
        ("{{ 'x' | nosuch }}", "nosuch"),
        ("{{ nosuch.a.b }}", "'nosuch' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
    ],
)
def test_errors_say_what_and_the_way_out(template: str, message: str) -> None:
    with pytest.raises(TemplateError, match=f"chat template: .*{message}.*--raw"):
        run(template)


def test_values_that_are_no_json_are_refused() -> None:
    with pytest.raises(OptionError, match="messages: object cannot be given"):
        run("", [{"role": "user", "content": object()}])
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(OptionError, match="nested deeper"):
        run("", tools=deep)


def test_a_long_conversation_is_quick_and_whole() -> None:
    messages = [{"role": "user", "content": f"{i} " + "word " * 1000} for i in range(300)]
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content | trim) + '\\n' }}{% endfor %}"
    start = time.monotonic()
    text = run(template, messages)
    assert time.monotonic() - start < 2
    assert text.count("word") == 300_000


def test_the_compiled_template_is_kept() -> None:
    chat_template._compiled.cache_clear()
    run("{{ 'kept' }}")
    run("{{ 'kept' }}")
    assert chat_template._compiled.cache_info().hits == 1
