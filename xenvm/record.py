# SPDX-License-Identifier: GPL-2.0-or-later
"""Immutable values with named fields. Imports nothing.

What dataclasses offer, as far as xenvm's processes need it, without their 20 ms at every process start (they bring
`inspect` with them and compile code for each class). Type checkers see a frozen dataclass.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import MappingProxyType as MappingProxyType  # noqa: PLC0414 - for those who import it from here
    from typing import ClassVar, Self, dataclass_transform
else:
    MappingProxyType = type(type.__dict__)  # as `types` has it, without that module

    def dataclass_transform(**_options):  # noqa: ANN003, ANN201 - a type checker never sees it
        """Stand in for typing.dataclass_transform, which only a type checker reads."""
        return lambda kind: kind


@dataclass_transform(frozen_default=True)
class Record:
    """Base of a value type: the annotated names of a subclass are its fields, in order, class attributes defaults."""

    if TYPE_CHECKING:
        FIELDS: ClassVar[tuple[str, ...]]
        _kw_only: ClassVar[bool]
    else:  # without annotations, which typing.get_type_hints could not resolve
        FIELDS = ()
        _kw_only = False

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        cls._kw_only = kw_only
        own = (name for name, kind in cls.__dict__.get("__annotations__", {}).items() if "ClassVar" not in str(kind))
        cls.FIELDS = (*cls.FIELDS, *own)

    def __init__(self, *values: object, **named: object) -> None:
        """Take fields in order or by name; raise TypeError when one is missing, doubled or unknown."""
        given = dict(zip(self.FIELDS, values, strict=False))
        if len(values) > (0 if self._kw_only else len(self.FIELDS)) or named.keys() & given.keys():
            raise TypeError(f"{type(self).__name__}: too many values")
        given |= named
        if given.keys() - set(self.FIELDS):
            raise TypeError(f"{type(self).__name__}: unknown fields {sorted(given.keys() - set(self.FIELDS))}")
        for name in self.FIELDS:
            if name not in given:
                if not hasattr(type(self), name):
                    raise TypeError(f"{type(self).__name__}: field {name} is missing")
                given[name] = getattr(type(self), name)
        self.__dict__.update(given)

    def __setattr__(self, name: str, _value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def _values(self) -> tuple[object, ...]:
        return tuple(self.__dict__[name] for name in self.FIELDS)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self.FIELDS)
        return f"{type(self).__name__}({inside})"

    def but(self, **changes: object) -> Self:
        """Return a copy with some fields changed."""
        return type(self)(**{**self.__dict__, **changes})
