# SPDX-License-Identifier: GPL-2.0-or-later
"""Save images of HVM guests: what is written for xl, what is read, what goes to the device model, what is refused."""

import json
import os
import struct
import tempfile

import pytest
from saveimages import emulator, hvm_image, hvm_parts, image, libxc, pages, parts, record, vcpu
from test_devicemodel import PLAIN
from test_saved import GRANTS

from xenvm.boundary.images import Image
from xenvm.boundary.machine import STATE_LIMIT_BYTES
from xenvm.helpers import saved
from xenvm.helpers.stream import main as stream
from xenvm.helpers.stream.records import ImageError

STATE = b"QEVM state of a device model"


def inspect(content, *, hvm=True):
    """Return what an image is said to be, and the state that its device model begins with."""
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as state:
        file.write(content)
        file.flush()
        told, _ = stream.inspect(file.fileno(), 131072, *((state.fileno(),) if hvm else ()))
        state.seek(0)
        return told, state.read()


def fed(content):
    readable, writable = os.pipe()
    with tempfile.TemporaryFile() as file, os.fdopen(readable, "rb") as pipe:
        file.write(content)
        file.flush()
        at = content.index(b"\xff" * 8)
        stream.feed(file.fileno(), writable, at, Image(131072, 1, 4, 17, ""), hvm=True)
        os.close(writable)
        return pipe.read()


@pytest.mark.parametrize("sealed", [False, True])
def test_a_good_image(sealed):
    assert inspect(hvm_image(sealed=sealed)) == (Image(131072, 1, 4, 17, ""), STATE)


def test_what_is_fed_ends_before_the_state_of_the_device_model():
    assert fed(hvm_image()) == libxc(hvm_parts(), kind=2)


@pytest.mark.parametrize("length", [4, 7, 8, 9, (3 << 20) + 5])
def test_a_state_of_any_length_comes_whole(length):
    state = b"QEVM" + os.urandom(length - 4)
    assert inspect(hvm_image(after=emulator(state) + record(0)))[1] == state


def test_pages_may_lie_where_a_machine_has_them():
    """Below 4 GiB a guest of 128 MiB has pages of its firmware and its rings."""
    assert inspect(hvm_image(libxc(hvm_parts(more=pages([(1 << 20) - 1], [bytes(4096)])), kind=2)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (image(), "guest of the type pv, this VM is hvm"),
        (hvm_image(libxc()), "memory in the image is of a guest of the type pv, this VM is hvm"),
        (hvm_image(libxc(hvm_parts(more=parts()["map"]), kind=2)), "0x3 is not of this type of guest"),
        (hvm_image(libxc(hvm_parts(more=vcpu(4)), kind=2)), "0x4 is not of this type of guest"),
        (hvm_image(libxc(hvm_parts(params=b""), kind=2)), "lacks the parameters of the machine"),
        (hvm_image(libxc(hvm_parts(context=b""), kind=2)), "lacks the state of the machine"),
        (hvm_image(libxc(hvm_parts(static=b""), kind=2)), "memory comes before its map|comes too early"),
        (hvm_image(libxc(hvm_parts(more=pages([1 | 1 << 60], [bytes(4096)])), kind=2)), "impossible type 1"),
        (hvm_image(libxc(hvm_parts(more=pages([1 << 40], [bytes(4096)])), kind=2)), "has the number"),
        (hvm_image(libxc(hvm_parts(params=record(0xA, struct.pack("<IIQQ", 2, 0, 1, 2))), kind=2)), "another length"),
        (hvm_image(after=record(0)), "lacks the state of the device model"),
        (hvm_image(after=record(2, b"nodes\0") + emulator() + record(0)), "older than those of this host"),
        (hvm_image(after=emulator(which=(1, 0)) + record(0)), "another device model than QEMU"),
        (hvm_image(after=emulator(b"VMQE state") + record(0)), "has no beginning"),
        (hvm_image(after=emulator(b"QEV") + record(0)), "has 11 bytes"),
        (hvm_image(after=emulator()), "cut off"),
        (hvm_image(after=emulator()[:-5]), "cut off"),
        (hvm_image(after=emulator() + emulator() + record(0)), "something else follows"),
        (hvm_image(after=emulator() + record(0) + b"\0"), "something follows"),
        (hvm_image(after=struct.pack("<II", 3, STATE_LIMIT_BYTES + 9) + struct.pack("<II", 2, 0)), "bytes"),
        (hvm_image(after=emulator()[:-1] + b"\1" + record(0)), "more than zeros"),
    ],
)
def test_what_is_refused_and_in_which_words(content, words):
    with pytest.raises(ImageError, match=words) as caught:
        inspect(content)
    assert caught.value.message.isprintable()


def test_a_vm_without_a_machine_refuses_it():
    with pytest.raises(ImageError, match="guest of the type hvm, this VM is pv"):
        inspect(hvm_image(), hvm=False)


def written(**changes):
    grants = GRANTS.but(machine=(PLAIN.but(**changes),))
    return json.loads(saved.config(grants))


def test_the_config_makes_xl_start_a_device_model_that_can_take_up_the_state():
    told = written()
    assert told["c_info"]["type"] == "hvm"
    build = told["b_info"]
    assert (build["video_memkb"], build["device_model_version"]) == (8192, "qemu_xen")
    assert build["type.hvm"]["vga"] == {"kind": "cirrus"}
    assert build["type.hvm"]["vnc"] == {"enable": "True", "listen": "127.0.0.1"}
    assert build["type.hvm"]["serial"] == "pty"
    assert build["type.hvm"]["boot"] == "dc"
    assert told["nics"][0]["model"] == "e1000"
    assert "model" not in told["nics"][1]
    assert told["disks"][-1]["format"] == "empty"


def test_what_is_off_is_said_to_be():
    told = written(acpi=False, apic=False, hpet=0, vpt_align=0, timer_mode=2, vnc_port=-1, serial="none", boot="")
    build = told["b_info"]
    assert (build["acpi"], build["apic"], build["timer_mode"]) == ("False", "False", "no_missed_ticks_pending")
    machine = build["type.hvm"]
    assert (machine["hpet"], machine["vpt_align"]) == ("False", "False")
    assert machine["vga"] == {"kind": "none"}
    assert machine["vnc"] == {"enable": "False"}
    assert not {"serial", "boot", "usb"} & machine.keys()


def test_a_serial_port_over_tcp_is_named():
    changes = {"serial": "tcp", "serial_host": "127.0.0.1", "serial_port": 4555}
    assert written(**changes)["b_info"]["type.hvm"]["serial"] == "tcp:127.0.0.1:4555"
