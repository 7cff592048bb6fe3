# SPDX-License-Identifier: GPL-2.0-or-later
"""The real stream worker, confined, with images good and bad. Needs root."""

import os
import tempfile

import pytest
from saveimages import image, libxc, pages, parts

from xenvm.boundary.images import Image, Inspect
from xenvm.boundary.messages import Failed, Hello
from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child

WAIT_S = 60
PAGE = bytes(range(256)) * 16


@pytest.fixture
def worker(users):
    child = Child(Role.STREAM, 2, {}, "test")
    hello, _ = child.channel.receive(deadline_s=WAIT_S)
    assert isinstance(hello, Hello)
    assert hello.role == "stream"
    assert '"openat"' not in hello.proof or "refused" in hello.proof or "EPERM" in hello.proof
    yield child
    child.end()


def inspect(worker, content):
    """Have a file inspected; return the answer, and the end of the pipe that a builder would read."""
    readable, writable = os.pipe()
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        worker.channel.send(Inspect(), (file.fileno(), writable))
    os.close(writable)
    return worker.channel.receive(deadline_s=WAIT_S)[0], readable


def whole(readable):
    with os.fdopen(readable, "rb") as pipe:
        return pipe.read()


@pytest.mark.parametrize("sealed", [False, True])
def test_a_good_image_is_told_and_fed(worker, sealed):
    many = {f"more{number}": pages(list(range(1024)), [PAGE] * 1024) for number in range(8)}
    made = parts()
    stream = libxc({name: made[name] for name in list(made)[:6]} | many | {name: made[name] for name in list(made)[6:]})
    told, readable = inspect(worker, image(stream, sealed=sealed))
    assert told == Image(131072, 1, 4, 17, "")
    assert whole(readable) == stream


def test_a_bad_image_is_refused_in_words_and_not_a_byte_is_fed(worker):
    told, readable = inspect(worker, image()[:-100])
    assert isinstance(told, Failed)
    assert "is cut off" in told.fault.message
    assert whole(readable) == b""


def test_a_builder_that_goes_away_ends_the_worker(worker):
    stream = libxc(parts(more=pages(list(range(1024)), [PAGE] * 1024)))
    told, readable = inspect(worker, image(stream))
    assert isinstance(told, Image)
    os.close(readable)
    worker.end(grace_ms=10000)
    assert worker.status is not None
    assert os.WIFEXITED(worker.status)


def test_an_image_that_eats_memory_is_refused(worker):
    told, readable = inspect(worker, image(text=b"[" * (1 << 20)))
    assert isinstance(told, Failed)
    os.close(readable)
