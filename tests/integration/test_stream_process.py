# SPDX-License-Identifier: GPL-2.0-or-later
"""The real stream worker, confined, with images good and bad. Needs root."""

import json
import os
import tempfile

import pytest
from saveimages import config, image, libxc, pages, parts

from xenvm.boundary.images import Image, Inspect, Room, Write, Writing, Written
from xenvm.boundary.messages import Failed, Hello
from xenvm.boundary.privileges import Role
from xenvm.broker.children import Child
from xenvm.helpers import saved

WAIT_S = 60
PAGE = bytes(range(256)) * 16


@pytest.fixture
def worker(users):
    child = Child(Role.STREAM, 2, {}, "test")
    hello, _ = child.channel.receive(deadline_s=WAIT_S)
    assert isinstance(hello, Hello)
    assert hello.role == "stream"
    proof = json.loads(hello.proof)
    assert (proof["seccomp"], proof["no_new_privs"], set(proof["capabilities"].values())) == (2, True, {"0"})
    assert proof["probes"]["open /"] == "EPERM"  # of its filter: it opens nothing, not even what everybody may
    yield child
    child.end()


def inspect(worker, content):
    """Have a file inspected; return the answer, and the end of the pipe that a builder would read."""
    readable, writable = os.pipe()
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        worker.channel.send(Inspect(131072), (file.fileno(), writable))
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


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_an_image_is_written_and_comes_back(users, compression):
    many = {f"more{number}": pages(list(range(1024)), [PAGE] * 512 + [bytes(4096)] * 512) for number in range(8)}
    made = parts()
    stream = libxc({name: made[name] for name in list(made)[:6]} | many | {name: made[name] for name in list(made)[6:]})
    text = json.dumps(config()).encode()[:-1] + b"," + saved.UNSEALED + b"}"
    with tempfile.TemporaryFile() as file:
        readable, writable = os.pipe()
        writer = Child(Role.STREAM, 2, {}, "test")
        writer.channel.receive(deadline_s=WAIT_S)
        writer.channel.send(Write(131072, compression), (file.fileno(), readable))
        os.close(readable)
        writer.channel.send(Room(131072))
        assert writer.channel.receive(deadline_s=WAIT_S)[0] == Writing()
        with os.fdopen(writable, "wb") as pipe:
            pipe.write(image(stream, text=text))
        assert writer.channel.receive(deadline_s=WAIT_S)[0] == Written(os.fstat(file.fileno()).st_size)
        writer.end(grace_ms=10000)
        assert writer.how() == "ended with status 0"
        file.seek(0)
        content = file.read()
        used = os.fstat(file.fileno()).st_blocks * 512
    assert used < {"none": 0.55, "zstd": 0.1}[compression] * len(stream)
    reader = Child(Role.STREAM, 2, {}, "test")
    reader.channel.receive(deadline_s=WAIT_S)
    told, readable = inspect(reader, content)
    assert told == Image(131072, 1, 4, 17, "")
    assert whole(readable) == stream
    reader.end(grace_ms=10000)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_no_room_is_said_before_anything_comes_through_the_pipe(worker, compression):
    readable, writable = os.pipe()
    with tempfile.TemporaryFile() as file:
        worker.channel.send(Write(2**42, compression), (file.fileno(), readable))
        worker.channel.send(Room(2**42))
        told = worker.channel.receive(deadline_s=WAIT_S)[0]
        assert os.fstat(file.fileno()).st_size == 0
    assert isinstance(told, Failed)
    assert "are free" in told.fault.message
    os.close(readable)
    os.close(writable)


def test_an_image_that_eats_memory_is_refused(worker):
    told, readable = inspect(worker, image(text=b"[" * (1 << 20)))
    assert isinstance(told, Failed)
    os.close(readable)
