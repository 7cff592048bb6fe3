# SPDX-License-Identifier: GPL-2.0-or-later
"""What processes of a monitor use of `contextlib`, without the modules that it brings. Imports nothing."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import ExitStack, suppress
else:

    class suppress:  # noqa: N801 - the name it has in the standard library
        """Let errors of these kinds pass: the rest of the block is left out."""

        def __init__(self, *kinds) -> None:  # noqa: ANN002
            self._kinds = kinds

        def __enter__(self) -> None:
            pass

        def __exit__(self, kind, _error, _traceback) -> bool:  # noqa: ANN001
            return kind is not None and issubclass(kind, self._kinds)

    class ExitStack:
        """Calls what was asked for at the end of the block, the last first; none is left out when another one fails."""

        def __init__(self) -> None:
            self._calls = []

        def callback(self, call, *arguments) -> None:  # noqa: ANN001, ANN002
            """Call this at the end."""
            self._calls.append((call, arguments))

        def __enter__(self):  # noqa: ANN204
            return self

        def __exit__(self, *_error: object) -> None:
            while self._calls:
                call, arguments = self._calls.pop()
                try:
                    call(*arguments)
                except BaseException:
                    self.__exit__()
                    raise


__all__ = ["ExitStack", "suppress"]
