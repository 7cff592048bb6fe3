# SPDX-License-Identifier: GPL-2.0-or-later
"""What stands for parts of the standard library in processes behaves like them."""

import contextlib
import copy
import enum
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenvm import context, jsontext
from xenvm.choice import IntChoice, StrChoice


def colours(base):
    class Colour(base):
        """Two of them."""

        RED = "red"
        GREEN = "green"

        @property
        def loud(self):
            return self.upper()

    return Colour


class Level(IntChoice):
    LOW = 0
    HIGH = 9


@pytest.mark.parametrize("base", [StrChoice, enum.StrEnum])
def test_a_choice_is_like_an_enumeration(base):
    kind = colours(base)
    assert kind("red") is kind.RED is kind["RED"]
    assert (kind.RED.name, kind.RED.value, kind.RED.loud, str(kind.RED), f"{kind.RED}") == (
        "RED",
        "red",
        "RED",
        *["red"] * 2,
    )
    assert kind.RED == "red"
    assert {kind.RED: 1}["red"] == 1
    assert isinstance(kind.RED, str)
    assert isinstance(kind.RED, kind)
    assert copy.deepcopy([kind.RED])[0] is kind.RED
    assert [*kind][:2] == ["red", "green"]
    for wrong in ("RED", "", None, 0, ["red"]):
        with pytest.raises(ValueError, match="is not a valid .*Colour"):
            kind(wrong)
    with pytest.raises(KeyError):
        kind["red"]


def test_members_of_choices():
    assert len(colours(StrChoice)) == 2
    assert set(Level) == {0, 9}
    assert max(Level) is Level.HIGH
    assert (str(Level.HIGH), f"{Level.HIGH:>2}", Level.HIGH + 1, json.dumps(Level.HIGH)) == ("9", " 9", 10, "9")
    assert repr(Level.LOW) == "Level.LOW"
    with pytest.raises(AttributeError):
        Level.LOW.value = 3
    with pytest.raises(AttributeError):
        del Level.LOW.name


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
NATIVE, STANDARD = jsontext._native(), jsontext._standard()


@given(VALUES)
def test_json_is_what_the_standard_library_makes_of_it(value):
    text = jsontext.dumps(value)
    assert text == json.dumps(value, separators=(",", ":"))
    assert jsontext.dumps_spaced(value) == json.dumps(value)
    assert jsontext.loads(f" {text}\n") == value


@given(VALUES.map(json.dumps), st.integers(0, 200), st.sampled_from('{}[]",:0-.eE tnf\\u\x01\x7f'))
def test_damaged_json_is_refused_by_both_or_read_the_same(text, place, letter):
    for damaged in (text[:place] + letter + text[place:], text[:place] + letter + text[place + 1 :], text[:place]):
        assert _outcome(NATIVE[0], damaged) == _outcome(STANDARD[0], damaged)


def _outcome(read, text):
    try:
        return repr(read(text))
    except ValueError:
        return None


@pytest.mark.parametrize("read", [NATIVE[0], STANDARD[0]])
@pytest.mark.parametrize(
    "text", ["", "{", '{"a":1,"a":2}', "NaN", "[Infinity]", "-Infinity", "1 2", "[1,]", "\ufeff1", "1" * 5000]
)
def test_what_is_no_json(read, text):
    with pytest.raises(ValueError, match="."):
        read(text)


@pytest.mark.parametrize("write", [NATIVE[1], STANDARD[1]])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", object()])
def test_what_has_no_form_in_json(write, value):
    with pytest.raises((ValueError, TypeError)):
        write(value, ",", ":")


def test_a_nested_text_is_refused_in_bounds():
    with pytest.raises(RecursionError):
        jsontext.loads("[" * 100_000)


@pytest.mark.parametrize("suppress", [context.suppress, contextlib.suppress])
def test_suppress(suppress):
    with suppress(KeyError, OSError):
        raise FileNotFoundError
    with pytest.raises(ValueError, match="other"), suppress(KeyError):
        raise ValueError("other")


@pytest.mark.parametrize("stack", [context.ExitStack, contextlib.ExitStack])
def test_the_end_of_a_block(stack):
    said = []

    def fail():
        raise OSError("the end fails")

    with pytest.raises(OSError, match="the end fails"), stack() as undo:
        undo.callback(said.append, "first")
        undo.callback(fail)
        undo.callback(said.append, "last")
        said.append("inside")
    assert said == ["inside", "last", "first"]
