# SPDX-License-Identifier: GPL-2.0-or-later
"""Choices: named values of a fixed set, which are texts or numbers at the same time. Imports nothing.

What enum.StrEnum and enum.IntEnum offer, as far as xenvm uses it, without the eight modules that `enum` brings with it
and the work of building each enumeration: together half as much as the start of the bare interpreter. Type checkers
see the enumerations of the standard library.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enum import IntEnum as IntChoice
    from enum import StrEnum as StrChoice
else:

    class _Kind(type):
        """The type of a set of choices: iterates over its members in order, finds one by value or name."""

        def __init__(cls, name, bases, namespace):  # noqa: ANN001, ANN204
            super().__init__(name, bases, namespace)
            cls.__members__ = {}
            cls._by_value = {}
            base = cls.__mro__[-2]  # str or int, the last one before object
            for word, value in namespace.items():
                if not word.startswith("_") and isinstance(value, base):  # the rest are methods and properties
                    member = base.__new__(cls, value)
                    member.__dict__.update(name=word, value=value)
                    cls.__members__[word] = cls._by_value[value] = member
                    setattr(cls, word, member)

        def __call__(cls, value):  # noqa: ANN001, ANN204
            """Return the member of this value; raise ValueError when there is none."""
            try:
                return cls._by_value[value]
            except (KeyError, TypeError):
                raise ValueError(f"{value!r} is not a valid {cls.__name__}") from None

        def __getitem__(cls, name):  # noqa: ANN001, ANN204
            return cls.__members__[name]

        def __iter__(cls):  # noqa: ANN204
            return iter(cls.__members__.values())

        def __len__(cls) -> int:
            return len(cls.__members__)

    class _Member:
        def __setattr__(self, name, _value=None):  # noqa: ANN001, ANN204
            raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

        __delattr__ = __setattr__

        def __repr__(self) -> str:
            return f"{type(self).__name__}.{self.name}"

        def __reduce__(self):  # noqa: ANN204 - a copy is the same member
            return type(self), (self.value,)

    class StrChoice(_Member, str, metaclass=_Kind):  # noqa: SLOT000 - it has a name and a value
        """A text out of a fixed set."""

        __str__ = str.__str__

    class IntChoice(_Member, int, metaclass=_Kind):
        """A number out of a fixed set."""

        __str__ = int.__repr__


__all__ = ["IntChoice", "StrChoice"]
