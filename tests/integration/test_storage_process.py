# SPDX-License-Identifier: GPL-2.0-or-later
"""The real storage worker without the devices it needs: what it is, and that it says what is missing. Needs root."""

import json
import os
import socket

import prctl
import pytest

from xenvm.boundary.confine import confine
from xenvm.boundary.frames import Channel
from xenvm.boundary.messages import Failed, Hello
from xenvm.boundary.privileges import TABLE, Role
from xenvm.boundary.workers import Connect, Decrypt
from xenvm.broker.children import Child
from xenvm.errors import ExitCode
from xenvm.helpers.storage import crypt, nbd
from xenvm.helpers.storage.main import main

WAIT_S = 60


def ask(message, descriptors, tmp_path):
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    child = Child(Role.STORAGE, log, {}, "-")
    os.close(log)
    hello, _ = child.channel.receive(deadline_s=WAIT_S)
    assert isinstance(hello, Hello), hello
    child.channel.send(message, descriptors)
    answer, _ = child.channel.receive(deadline_s=WAIT_S)
    child.end(grace_ms=WAIT_S * 1000)
    assert (tmp_path / "log").read_text() == ""
    return json.loads(hello.proof), answer, child.how()


def test_it_is_root_with_one_capability(tmp_path):
    with (tmp_path / "key").open("wb") as file:
        proof, answer, how = ask(Decrypt("x", "aes", 256, False), [file.fileno(), file.fileno()], tmp_path)
    assert (proof["uid"], proof["seccomp"], proof["no_new_privs"]) == (0, 2, True)
    only = f"{1 << prctl.CAP_SYS_ADMIN:x}"
    assert proof["capabilities"] == {"CapInh": "0", "CapPrm": only, "CapEff": only, "CapBnd": only, "CapAmb": "0"}
    assert isinstance(answer, Failed)
    assert "the key file cannot be read" in answer.fault.message  # it was opened for writing
    assert how == "ended with status 1"


@pytest.mark.parametrize("count", [0, 1])
def test_a_request_without_its_descriptors(count, tmp_path):
    with (tmp_path / "key").open("wb") as file:
        _, answer, _ = ask(Decrypt("x", "aes", 256, False), [file.fileno()] * count, tmp_path)
    assert isinstance(answer, Failed)
    assert "connects, decrypts or releases" in answer.fault.message


def ask_with_module(path, message, descriptors):
    """The same of a worker that looks for the kernel's module at another path: it is forked, all else is as it is."""
    ours, theirs = Channel.pair()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            nbd.MODULE = str(path)
            os.dup2(theirs.fileno(), 3)
            status = main()
        finally:
            os._exit(status)
    theirs.close()
    hello, _ = ours.receive(deadline_s=WAIT_S)
    ours.send(message, descriptors)
    answer, _ = ours.receive(deadline_s=WAIT_S)
    ours.close()
    return json.loads(hello.proof), answer, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("partitions", "words"),
    [(None, "an image needs the kernel's module nbd, which is not loaded"), ("16\n", "(max_part=16)")],
)
def test_without_the_module_as_it_should_be_it_says_how_to_load_it(partitions, words, tmp_path):
    """Whether the module is loaded here or not."""
    module = tmp_path / "nbd"
    if partitions:
        (module / "parameters").mkdir(parents=True)
        (module / "parameters/max_part").write_text(partitions)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        message = Connect(1 << 20, 1, False, "xenvm-test")
        proof, answer, status = ask_with_module(module, message, [ours.fileno()])
    assert proof["seccomp"] == 2
    assert isinstance(answer, Failed)
    assert words in answer.fault.message
    assert "modprobe nbd max_part=0" in answer.fault.hint
    assert status == ExitCode.FAILED


def test_its_filter_lets_it_ask_the_kernel(tmp_path):
    """The calls of both requests below the filter, with a family and a device that every kernel has."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            confine(TABLE[Role.STORAGE], uid=None, gid=None, keep=frozenset({writing}))
            kernel = object.__new__(nbd.Kernel)
            kernel._sequence = 0
            kernel._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, nbd.NETLINK_GENERIC)
            kernel._socket.settimeout(WAIT_S)
            name = nbd.attribute(nbd.CTRL_ATTR_FAMILY_NAME, b"nlctrl\0")
            answer = kernel._ask(nbd.GENL_ID_CTRL, nbd.CTRL_CMD_GETFAMILY, name)
            said = answer[nbd.CTRL_ATTR_FAMILY_ID]
            device = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            for request in (nbd.BLKGETSIZE64, crypt.DM_DEV_CREATE, crypt.DM_TABLE_LOAD, crypt.DM_DEV_SUSPEND):
                try:
                    crypt.fcntl.ioctl(device, request, bytearray(312))
                except OSError as error:
                    said += os.strerror(error.errno).encode() + b";"
        finally:
            os.write(writing, said)
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 4096)
    os.close(reading)
    os.waitpid(child, 0)
    assert said == nbd.GENL_ID_CTRL.to_bytes(2, "little") + b"Inappropriate ioctl for device;" * 4
