import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.errors import ConfigError, RowFailure
from granite_ray.tasks.templates import Plain, Slot, TokenizedText, UserTemplate


def test_what_a_variable_gives_is_never_template_text() -> None:
    pieces = UserTemplate("a {{ x }} b").render({"x": "<|end_of_text|>"})
    assert pieces == ["a ", Plain("<|end_of_text|>"), " b"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ x | upper }}",
        "{{ x ~ '!' }}",
        "{{ '%s' | format(x) }}",
        "{{ [x] | join }}",
        "{% for y in [x] %}{{ y }}{% endfor %}",
        "{% set y = x %}{{ y }}",
        "{% set y %}-{{ x }}-{% endset %}{{ y }}",
        "{% if x %}{{ x }}{% endif %}",
        "{{ x | tojson | safe }}",
        "{{ x | escape }}",
    ],
)
@pytest.mark.parametrize("value", ["<|end_of_text|>", "{{ instruction }}", ""])
def test_no_filter_or_logic_makes_data_into_template_text(source: str, value: str) -> None:
    pieces = UserTemplate(source).render({"x": value})
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == ""


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=50))
def test_any_value_comes_back_whole_as_plain_text(value: str) -> None:
    assert UserTemplate("{{ x }}").render({"x": value}) == [Plain(value)]


def test_constants_of_the_template_are_template_text() -> None:
    assert UserTemplate("{{ '<|end_of_text|>' }}").render({}) == ["<|end_of_text|>"]


def test_known_token_ids_survive_only_where_the_text_is_unchanged() -> None:
    text = TokenizedText("abc", [1, 2])
    assert UserTemplate("{{ text }}").render({"text": text}) == [Plain("abc", [1, 2])]
    assert UserTemplate("{{ text | upper }}").render({"text": text}) == [Plain("ABC")]


def test_null_is_nothing_and_lists_are_json() -> None:
    pieces = UserTemplate("{{ a }}{{ b }}{{ c }}").render({"a": None, "b": ["ü", 1], "c": 1.5})
    assert pieces == [Plain(""), Plain('["ü", 1]'), Plain("1.5")]


def test_a_static_template_takes_slots() -> None:
    template = UserTemplate("{{ a }}-{{ b }}")
    assert template.is_static
    assert template.names == {"a", "b"}
    assert template.render({"a": Slot("a"), "b": Slot("b")}) == [Slot("a"), "-", Slot("b")]


@pytest.mark.parametrize(
    "source", ["{{ x|trim }}", "{% if x %}{% endif %}", "{{ x.y }}", "{{ 1 }}"]
)
def test_a_template_with_logic_is_not_static(source: str) -> None:
    assert not UserTemplate(source).is_static


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ x", "line 1"),
        ("{% filter upper %}{{ x }}{% endfilter %}", "filterblock"),
        ("{% include 'f' %}", "include"),
        ("{% extends 'f' %}", "extends"),
        ("{% macro m() %}{{ x }}{% endmacro %}", "macro"),
        ("{% block b %}{% endblock %}", "block"),
        ("{% for a in x recursive %}{{ loop(a) }}{% endfor %}", "recursive"),
        ("a\n{% call f() %}{% endcall %}", "line 2"),
        ("{{ x | nosuchfilter }}", "nosuchfilter"),
    ],
)
def test_a_template_that_cannot_work_is_refused_by_name(source: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.template") as caught:
        UserTemplate(source)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "source",
    ["{{ missing }}", "{{ x.y.z }}", "{{ x + 1 }}", "{{ 1 / 0 }}", "{{ x.__class__.__mro__[1] }}"],
)
def test_a_row_that_does_not_suit_the_template_fails_alone(source: str) -> None:
    with pytest.raises(RowFailure, match=r"task\.template") as caught:
        UserTemplate(source).render({"x": "secret words"})
    assert caught.value.error_type == "invalid_column"
    assert "secret" not in caught.value.message
