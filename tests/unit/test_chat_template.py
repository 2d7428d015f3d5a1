"""A chat template is a stranger's program: its time and memory are bounded, and it may fail in any way."""

from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest

from colm.errors import CheckpointError, InvalidRequest
from colm.text.chat_template import ChatTemplate

HERE = timezone(timedelta(hours=2), "CEST")
DAY = datetime(2026, 3, 5, 12, tzinfo=HERE)
CONTENTS = ("hello", "hi", "more")

GREEDY = {
    "loops for ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "is folded when it is compiled": "{{ 2 ** 1000000000 }}",
    "fills memory while it is compiled": "{{ 'x' | center(3000000000) }}",
    "doubles a text": "{% set n = namespace(s='x') %}{% for _ in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "formats a wide number": "{{ '%3000000000d' | format(1) }}",
    "writes too much": "{% for _ in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
}


def make(source: str, now: Callable[[], datetime] = lambda: DAY) -> ChatTemplate:
    return ChatTemplate(source, {}, lambda number: CONTENTS[number], now)


@pytest.mark.parametrize("source", GREEDY.values(), ids=GREEDY.keys())
def test_a_template_that_takes_too_much_is_refused_at_load(source: str) -> None:
    """Bug: it stopped the gateway's load, or a request and then, one by one, all threads that tokenise."""
    with pytest.raises(CheckpointError, match=r"text\.chat_template takes more than 2 s of CPU time"):
        make(source)


FAILING = (
    "{{ 1 / 0 }}",
    "{{ messages[7].content.x }}",
    "{{ {}['a'].b }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)


@pytest.mark.parametrize("source", FAILING)
def test_a_template_that_fails_in_any_way_refuses_the_message(source: str) -> None:
    """Bug: what was neither jinja's nor a type's or value's error ended the request with an untyped one."""
    with pytest.raises(InvalidRequest, match=r"the chat template refused the message: .*; use raw completion"):
        make(source).text()


def test_a_template_that_python_cannot_compile_is_refused_at_load() -> None:
    with pytest.raises(CheckpointError, match=r"text\.chat_template"):
        make("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


def test_a_date_is_that_of_the_request_in_its_own_zone() -> None:
    today = [DAY]
    template = make("{{ strftime_now('%d %b %Y %Z') }} {{ messages[0].content }}", lambda: today[0])
    assert template.text() == "05 Mar 2026 CEST hello"
    today[0] += timedelta(days=1)
    assert template.text() == "06 Mar 2026 CEST hello"


def test_a_template_is_rendered_once_for_as_long_as_its_date_stays() -> None:
    now = [DAY]
    template = make("{{ strftime_now('%Y') }}", lambda: now[0])
    first = template._rendered["user",]
    now[0] += timedelta(days=1)
    assert template.text() == "2026"
    assert template._rendered["user",] is first


def test_a_template_that_minds_the_date_may_refuse_from_one_day_on() -> None:
    now = [DAY]
    template = make("{% if strftime_now('%d') != '05' %}{{ raise_exception('too late') }}{% endif %}ok", lambda: now[0])
    assert template.text() == "ok"
    now[0] += timedelta(days=1)
    with pytest.raises(InvalidRequest, match="too late"):
        template.text()


def test_each_sequence_of_roles_is_rendered_once_and_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colm.text.chat_template.MAX_KEPT", 2)
    template = make("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}")
    assert template.text(("system", "user")) == "system: hello;user: hi;"
    kept = template._rendered["system", "user"]
    assert template.text(("user", "assistant", "user")) == "user: hello;assistant: hi;user: more;"
    assert template.text(("system", "user")) == "system: hello;user: hi;"
    assert template._rendered["system", "user"] is kept
    assert len(template._rendered) == 2
