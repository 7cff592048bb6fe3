# SPDX-License-Identifier: GPL-2.0-or-later
"""From the text of a config file to a Config, or to every error in it at once; nothing is dropped without a word."""

from __future__ import annotations

from types import MappingProxyType

from xenvm.config.check import Draft, Entry, check
from xenvm.config.issue import Issue, ValueRefusedError, format_issue, quoted, suggestion
from xenvm.config.key import REQUIRED
from xenvm.config.keys import KEYS, find, refused, spellings
from xenvm.config.schema import Config
from xenvm.errors import ConfigError
from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Final


__all__ = ["MAX_FILE_BYTES", "Issue", "Line", "ParseResult", "format_issue", "parse_bytes", "parse_text"]

MAX_FILE_BYTES: Final = 256 * 1024
_MAX_SUGGESTIONS: Final = 100
_BYTE_ORDER_MARK: Final = "\ufeff"


class Line(Record):
    """A line of the file: its number, from 1 on, and what stands in it."""

    number: int
    text: str


class ParseResult(Record, kw_only=True):
    """What came of a file: a config without issues, or issues without a config.

    `partial` holds the fields that were understood, `lines` the lines that give each of them: one, or of a repeatable
    key as many as there are values, in their order.
    """

    filename: str
    config: Config | None
    partial: Mapping[str, object]
    issues: tuple[Issue, ...]
    lines: Mapping[str, tuple[Line, ...]]

    def report(self) -> str:
        """Return all issues as shown to the user."""
        return "\n".join(format_issue(self.filename, issue) for issue in self.issues)

    def accepted(self) -> Config:
        """Return the config, or raise ConfigError with all issues."""
        if self.config is None:
            raise ConfigError(self.report(), hint="see xenvm.cfg(5); `xenvm --check FILE` tells whether a file is fine")
        return self.config


def parse_bytes(data: bytes, filename: str) -> ParseResult:
    """Parse the content of a file as it was read."""
    if len(data) > MAX_FILE_BYTES:
        return _too_large(filename)
    # bytes that are not UTF-8 become surrogates, which parse_text reports with their lines
    return parse_text(data.decode("utf-8", "surrogateescape"), filename)


def parse_text(text: str, filename: str) -> ParseResult:
    """Parse a config file; `filename` is for messages only, and nothing is raised whatever the text is."""
    if len(text) > MAX_FILE_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_FILE_BYTES:
        return _too_large(filename)
    reader = _Reader()
    reader.read(text)
    issues = [*reader.issues, *check(reader.draft)]
    issues.sort(key=lambda issue: (issue.line == 0, issue.line))
    partial = _values(reader.draft)
    sound = {name: reader.draft.sound(name) for name in reader.draft.entries}
    lines = {name: tuple(Line(entry.line, entry.text) for entry in entries) for name, entries in sound.items()}
    config = None
    if not issues:
        config = Config(**_with_defaults(partial, hvm=partial.get("hvm") is True))
    return ParseResult(
        filename=filename,
        config=config,
        partial=MappingProxyType(partial),
        issues=tuple(issues),
        lines=MappingProxyType(lines),
    )


def _too_large(filename: str) -> ParseResult:
    issue = Issue(0, "", "", f"the file is larger than {MAX_FILE_BYTES // 1024} KiB", "is this a config file?")
    nothing: Mapping[str, tuple[Line, ...]] = MappingProxyType({})
    return ParseResult(filename=filename, config=None, partial=nothing, issues=(issue,), lines=nothing)


def _values(draft: Draft) -> dict[str, object]:
    """Return field -> value of all sound lines; fields of repeatable keys become tuples."""
    values: dict[str, object] = {}
    for name in draft.entries:
        sound = draft.sound(name)
        if not sound:
            continue
        key = sound[0].key
        if key.repeatable:
            values[name] = tuple(entry.value for entry in sound)
        elif key.second_field and isinstance(sound[0].value, tuple):
            values[name], values[key.second_field] = sound[0].value
        else:
            values[name] = sound[0].value
    return values


def _with_defaults(values: Mapping[str, object], *, hvm: bool) -> dict[str, Any]:
    """Return a value for every field of Config. Typed Any: a test holds each parser against its field's type."""
    complete = dict(values)
    for key in KEYS:
        default = key.default_for(hvm=hvm)
        if key.field in complete or default is REQUIRED:
            continue
        if key.second_field and isinstance(default, tuple):
            complete[key.field], complete[key.second_field] = default
        else:
            complete[key.field] = default
    return complete


class _Reader:
    """Goes through the lines once and keeps what they say and what is wrong with them."""

    def __init__(self) -> None:
        self.draft = Draft()
        self.issues: list[Issue] = []
        self._suggested: dict[str, str] = {}

    def read(self, text: str) -> None:
        """Take in a whole file."""
        if text.startswith(_BYTE_ORDER_MARK):
            text = text.removeprefix(_BYTE_ORDER_MARK)
            self._refuse(1, "", "", "the file begins with a byte order mark", "save it as UTF-8 without one")
        # split at LF alone: splitlines() would also break at characters that are to be refused
        lines = text.split("\n")
        returns = [number for number, line in enumerate(lines, 1) if line.endswith("\r")]
        if returns:
            message = "the line ends in CR LF" + (f", as do {len(returns) - 1} more" if len(returns) > 1 else "")
            shown = lines[returns[0] - 1].removesuffix("\r").strip(" \t")
            self._refuse(returns[0], "", shown, message, "end lines with LF alone, as `sed -i 's/\\r$//' FILE` does")
        for number, line in enumerate(lines, 1):
            self._line(number, line.removesuffix("\r").strip(" \t"))

    def _refuse(self, line: int, key: str, text: str, message: str, hint: str = "") -> None:
        self.issues.append(Issue(line, key, text, message, hint))

    def _line(self, number: int, text: str) -> None:
        if any("\ud800" <= char <= "\udfff" for char in text):
            self._refuse(number, "", text, "the line is not UTF-8", "save the file in the encoding UTF-8")
        if not text or text.startswith("#"):
            return
        spelled, equals, value = text.partition("=")
        spelled, value = spelled.rstrip(" \t"), value.lstrip(" \t")
        if not equals:
            self._no_equals(number, text)
            return
        if not spelled:
            self._refuse(number, "", text, "there is no key before the `=`", "write KEY = VALUE")
            return
        key = find(spelled)
        if key is None:
            self._unknown(number, spelled, text)
            return
        earlier = self.draft.given(key.field)
        if earlier and not key.repeatable:
            message = f"`{spelled}` is already set in line {earlier[0].line}"
            self._refuse(number, key.name, text, message, "keep one of the lines")
            return
        entry = Entry(number, key, text, None, sound=False)
        try:
            entry = Entry(number, key, text, self._value(entry, value))
        except ValueRefusedError as error:
            self.issues.append(entry.issue(error.message, error.hint))
        self.draft.entries.setdefault(key.field, []).append(entry)

    @staticmethod
    def _value(entry: Entry, value: str) -> object:
        for char in value:
            if not char.isprintable():
                hint = "use a blank" if char in "\t\u00a0" else "remove it"
                raise ValueRefusedError(f"the value holds the character U+{ord(char):04X}", hint)
        if not value and entry.key.blank_is_default:
            return entry.key.default
        return entry.key.parse(value)

    def _no_equals(self, number: int, text: str) -> None:
        word, _, rest = text.partition(" ")
        hint = (
            f"write `{word} = {rest.strip(' ') or '...'}`" if find(word) and text.isprintable() else "write KEY = VALUE"
        )
        self._refuse(number, "", text, "the line has no `=`", hint)

    def _unknown(self, number: int, spelled: str, text: str) -> None:
        if known := refused(spelled):
            self._refuse(number, spelled, text, f"the key `{spelled}` is not taken: {known.reason}", known.instead)
            return
        # a file of nothing but unknown keys may be a mistake of another kind; guessing has a price for each key
        if spelled not in self._suggested and len(self._suggested) < _MAX_SUGGESTIONS:
            self._suggested[spelled] = suggestion(spelled.lower(), spellings())
        hint = self._suggested.get(spelled, "") or "xenvm.cfg(5) lists the keys"
        self._refuse(number, spelled, text, f"unknown key {quoted(spelled)}", hint)
