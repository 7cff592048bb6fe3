# SPDX-License-Identifier: GPL-2.0-or-later
"""What a look at all domains of a host says, as one line of text: a builder makes it, brokers look theirs up. No I/O.

The first word is the time (CLOCK_MONOTONIC, ns) just before the look began; each other one is a domain that runs or is
paused, with its uuid. What has shut down, is dying or is gone is not in it.
"""

from __future__ import annotations

from xenvm.boundary.messages import DomainState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from xenvm.boundary.messages import Domain

DOMAINS_LIMIT: Final = 1500  # the text has to fit into a frame; of one that is not in it, the monitor looks itself
LETTERS: Final = {DomainState.RUNNING: "r", DomainState.PAUSED: "p"}
DIGITS_LIMIT: Final = 19


def _word(domid: int, letter: str, uuid: str) -> str:
    return f"{domid}{letter}{uuid.replace('-', '')}"


def text(begun_ns: int, domains: Iterable[tuple[Domain, str]]) -> str:
    """Return the line for a look that began at `begun_ns` and has shown these domains with their uuids."""
    living = [_word(domain.domid, LETTERS[domain.state], uuid) for domain, uuid in domains if domain.state in LETTERS]
    return " ".join([str(begun_ns), *living[:DOMAINS_LIMIT]])


def told(untrusted_text: str, domid: int, uuid: str, since_ns: int, now_ns: int) -> DomainState | None:
    """Return how a domain was in a look that began after `since_ns`: running or paused, absent for all else.

    Return None when the text does not tell: it is of an older look, of one yet to come, or not of this form.
    """
    begun, *words = untrusted_text.split(" ")
    if not (begun.isascii() and begun.isdecimal() and len(begun) <= DIGITS_LIMIT and since_ns < int(begun) <= now_ns):
        return None
    found = [state for state, letter in LETTERS.items() if _word(domid, letter, uuid) in words]
    return found[0] if len(found) == 1 else DomainState.ABSENT
