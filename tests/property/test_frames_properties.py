# SPDX-License-Identifier: GPL-2.0-or-later
"""Every message survives its frame; whatever else arrives is refused, and costs neither descriptors nor memory."""

import inspect
import json
import os
import random
import re
import socket
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenvm import forms
from xenvm.boundary import checks, devices, images, machine, messages, processors, workers
from xenvm.boundary.frames import BODY_LIMIT_BYTES, HEADER, MAGIC, VERSION, Channel, decode, encode
from xenvm.boundary.messages import KINDS, flag
from xenvm.errors import ProtocolError

MUTATED_FRAMES = 90_000
MUTATED_DATAGRAMS = 20_000
GROWTH_LIMIT_BYTES = 8 << 20
HOSTILE = [
    *(None, True, False, 0, -1, 1, 2**31, 2**64, -(10**40), 1.5, 1e308, float("nan"), float("inf")),
    *("", "\0", "\ud800", "x" * 70000, "../../etc/passwd", "-1", [], {}, [[]], {"": {}}, [0] * 9000),
]


# The forms of texts once more, as regular expressions.
PATTERNS = {
    forms.uuid: r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    forms.printable: r"[\x20-\x7e]*",
    checks.NAME: r"[A-Za-z0-9._+-]{1,64}",
    processors._mask: r"([01xks]{32})?",
    devices.is_mac: r"[0-9a-f]{2}(:[0-9a-f]{2}){5}",
    devices.is_bridge: r"[!-.0-9;-~]{0,15}",
    devices.is_server: r"([1-9][0-9]{0,9} [0-9]{1,20})?",
    messages.is_directory: r"(/(?!\.{1,2}(/|\Z))[^/\0]+)+",
    messages.is_file_name: r"((?!\.{1,2}\Z)[^/\0]+)?",
    workers.is_digest: r"[0-9a-f]{64}",
    images.is_uuid_or_none: r"([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?",
    machine.WORD: r"[A-Za-z0-9_.-]{1,64}",
    machine.IPV4: r"[0-9.]{0,15}",
    machine.BOOT: r"[acdn]{0,4}",
    machine.KEYMAP: r"[A-Za-z0-9_-]{0,32}",
    machine.is_tty: r"(/dev/pts/[0-9]{1,6})?",
    devices.is_cipher: r"([A-Za-z0-9][A-Za-z0-9_()-]{0,63})?",
}


def fitting(form):
    """Return a strategy for the texts of a form."""
    if isinstance(getattr(form, "__self__", None), frozenset):  # forms.one_of
        return st.sampled_from(sorted(form.__self__))
    return st.from_regex(re.compile(PATTERNS[form], re.ASCII), fullmatch=True)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_form_is_its_regular_expression(data):
    form = data.draw(st.sampled_from(list(PATTERNS)), "form")
    pattern = re.compile(PATTERNS[form], re.ASCII)
    good = data.draw(fitting(form), "good")
    assert form(good)
    place = data.draw(st.integers(0, len(good)), "place")
    letter = data.draw(st.sampled_from("0aAfg:-/ _.\n\u0660\u212a\u00e9"), "letter")
    for text in (good[:place] + letter + good[place:], good[:place] + letter + good[place + 1 :], good[:place]):
        assert form(text) == bool(pattern.fullmatch(text))


def values(check):
    """Return a strategy for what `check` accepts, from the bounds it was made with."""
    if check is flag:
        return st.booleans()
    if inspect.ismethod(check):
        return records(check.__self__)
    bounds = inspect.getclosurevars(check).nonlocals
    made_by = check.__qualname__.split(".")[0]
    if made_by == "number":
        return st.integers(bounds["low"], bounds["high"])
    if made_by == "string":
        if bounds["form"] is not None:
            return fitting(bounds["form"]).filter(lambda text: len(text) <= bounds["limit"])
        return st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=bounds["limit"])
    if made_by == "choice":
        return st.sampled_from(list(bounds["kind"]))
    if made_by == "array":
        return st.lists(values(bounds["item"]), max_size=min(bounds["limit"], 4)).map(tuple)
    assert made_by == "table"
    return st.dictionaries(values(bounds["key"]), values(bounds["value"]), max_size=min(bounds["limit"], 4))


def records(kind):
    return st.builds(kind, **{name: values(check) for name, check in kind.CHECKS.items()})


MESSAGES = {kind: records(kind) for kind in KINDS.values()}


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_message_round_trips(kind, data):
    message = data.draw(MESSAGES[kind])
    descriptors = data.draw(st.integers(0, kind.DESCRIPTORS))
    frame = encode(message, descriptors)
    assert len(frame) <= HEADER.size + BODY_LIMIT_BYTES
    again = decode(frame, descriptors)
    assert again == message
    assert type(again) is kind
    assert encode(again, descriptors) == frame


@settings(max_examples=300, deadline=None)
@given(frame=st.binary(max_size=200), kind=st.integers(0, 12), count=st.integers(0, 5))
def test_arbitrary_bytes_are_refused(frame, kind, count):
    with pytest.raises(ProtocolError):
        decode(frame, count)
    with pytest.raises(ProtocolError):
        decode(HEADER.pack(MAGIC, VERSION, kind, count, len(frame)) + frame, count)


def examples():
    """Return a few whole frames of every kind, always the same ones."""
    found = []

    @settings(max_examples=12, deadline=None, database=None, derandomize=True)
    @given(st.tuples(*MESSAGES.values()))
    def collect(messages):
        found.extend(encode(message) for message in messages)

    collect()
    return [frame for frame in found if len(frame) < 4000]


def places(value, trail=()):
    """Yield the way to every value inside a JSON value."""
    yield trail
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield from places(member, (*trail, key))


def mutated_body(body, chance):
    """Change one value somewhere in the body, or take one away, or add one."""
    parsed = json.loads(body)
    trail = chance.choice(list(places(parsed)))
    if not trail:
        return json.dumps(chance.choice(HOSTILE)).encode("ascii")
    holder = parsed
    for key in trail[:-1]:
        holder = holder[key]
    action = chance.randrange(4)
    if action == 0:
        del holder[trail[-1]]
    elif action == 1 and isinstance(holder, dict):
        holder[chance.choice(["path", "domid", "", "KIND", "__class__"])] = 1
    elif action == 2 and isinstance(holder[trail[-1]], int):
        holder[trail[-1]] += chance.choice([-1, 1, 256, 2**31, 2**63])
    else:
        holder[trail[-1]] = chance.choice(HOSTILE)
    return json.dumps(parsed).encode("ascii")


def mutate(frame, chance):
    """Return the frame with one fault: in its body, its header, or any of its bytes."""
    body = frame[HEADER.size :]
    action = chance.randrange(8)
    if action <= 2:
        body = mutated_body(body, chance)
        return frame[:6] + HEADER.pack(MAGIC, 1, 1, 0, len(body))[6:] + body
    if action == 3:
        return HEADER.pack(MAGIC, VERSION, chance.randrange(256), 0, len(body)) + body
    if action == 4:
        return frame[: chance.randrange(len(frame))]
    if action == 5:
        place = chance.randrange(HEADER.size)
        return frame[:place] + chance.randbytes(1) + frame[place + 1 :]
    changed = bytearray(body)
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(changed) + 1)
        changed[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    return HEADER.pack(MAGIC, VERSION, frame[5], 0, len(changed)) + bytes(changed)


def refused(frame, count=0):
    """Tell whether decoding refuses; what it accepts must be a message that could have been sent."""
    try:
        message = decode(frame, count)
    except ProtocolError:
        return True
    assert decode(encode(message, count), count) == message
    return False


def resources():
    process = psutil.Process()
    return process.num_fds(), process.memory_info().rss


def assert_nothing_stays(before, after):
    assert after[0] == before[0], "descriptors leaked"
    assert after[1] - before[1] < GROWTH_LIMIT_BYTES, f"{(after[1] - before[1]) >> 20} MiB more"


def test_mutated_frames_are_refused_or_good_messages():
    chance, frames = random.Random(1), examples()
    assert {frame[5] for frame in frames} == set(KINDS)
    for _ in range(3000):
        refused(mutate(chance.choice(frames), chance))
    before, begun = resources(), time.monotonic()
    count = sum(refused(mutate(chance.choice(frames), chance)) for _ in range(MUTATED_FRAMES))
    print(f"\n{MUTATED_FRAMES} mutated frames, {count} refused, {time.monotonic() - begun:.1f} s")
    assert MUTATED_FRAMES // 2 < count < MUTATED_FRAMES
    assert_nothing_stays(before, resources())


def through(raw, channel, frame, passed):
    """Send a datagram through a real socket; tell whether the channel refused it."""
    socket.send_fds(raw, [frame], passed)
    try:
        received = channel.receive(deadline_s=10)
    except ProtocolError:
        return True
    if received is None:
        assert not frame
        return True
    message, descriptors = received
    assert len(descriptors) == len(passed) <= message.DESCRIPTORS
    for descriptor in descriptors:
        os.close(descriptor)
    return False


def test_mutated_datagrams_leave_no_descriptor_behind():
    chance, frames = random.Random(2), examples()
    null = os.open("/dev/null", os.O_RDONLY)
    raw, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    channel = Channel(theirs)

    def one():
        count = chance.choice([0, 0, 0, 1, 1, 2, 4, 5, 9])
        frame = chance.choice(frames)
        if chance.random() < 0.7:
            frame = mutate(frame, chance)
        if len(frame) >= HEADER.size and chance.random() < 0.5:  # the header tells the truth about descriptors
            frame = frame[:6] + count.to_bytes(2, "big") + frame[8:]
        return through(raw, channel, frame, [null] * count)

    for _ in range(500):
        one()
    before, begun = resources(), time.monotonic()
    count = sum(one() for _ in range(MUTATED_DATAGRAMS))
    print(f"\n{MUTATED_DATAGRAMS} datagrams, {count} refused, {time.monotonic() - begun:.1f} s")
    assert MUTATED_DATAGRAMS // 2 < count < MUTATED_DATAGRAMS
    assert_nothing_stays(before, resources())
    raw.close()
    channel.close()
    os.close(null)
