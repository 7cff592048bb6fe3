# SPDX-License-Identifier: GPL-2.0-or-later
"""The image and the storage worker on a real kernel: nbd and dm-crypt devices that go by themselves. Without a guest."""

import contextlib
import json
import os
import pwd
import socket
import struct
from pathlib import Path

import pytest
from conftest import kill, run, until

from xenvm.boundary.messages import Done, Failed, Hello
from xenvm.boundary.privileges import Role
from xenvm.boundary.workers import Connect, Decrypt, Serve, Served
from xenvm.broker import strays
from xenvm.broker.children import Child
from xenvm.broker.servers import end_server, server_text
from xenvm.helpers.storage import nbd

pytestmark = pytest.mark.long

WAIT_S = 120
MIB = 1 << 20
SIZE = 16 * MIB
UUID = "11111111-2222-4333-8444-555555555555"
LABEL = f"xenvm-{UUID}-51712"
KEY = bytes(range(1, 65))
CAP_SYS_ADMIN = 21  # linux/capability.h


@pytest.fixture(scope="module", autouse=True)
def tools():
    """What the workers stand on."""
    for program, package in (("qemu-img", "qemu-utils"), ("cryptsetup", "cryptsetup-bin"), ("dmsetup", "dmsetup")):
        if run("sh", "-c", f"command -v {program}").returncode:
            pytest.fail(f"{program} is absent: install the Debian package {package}")
    if not Path("/usr/bin/qemu-storage-daemon").exists():
        pytest.fail("qemu-storage-daemon is absent: install qemu-utils and qemu-system-common")
    try:
        pwd.getpwnam("xenvm-image")
    except KeyError:
        pytest.fail("the user xenvm-image is absent: scripts/install-host makes it")
    done = run("modprobe", "nbd", "max_part=0")
    assert done.returncode == 0, done.stderr


class Bench:
    """Everything a test opens or starts, taken away at its end."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.open, self.pids, self.mappings, self.loops = set(), set(), set(), set()
        self.log = self.keep(os.open(self.directory / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))

    def keep(self, descriptor):
        self.open.add(descriptor)
        return descriptor

    def close(self, descriptor):
        self.open.discard(descriptor)
        os.close(descriptor)

    def end(self):
        for descriptor in list(self.open):
            with contextlib.suppress(OSError):
                self.close(descriptor)
        for pid in self.pids:
            kill(pid)
        for name in self.mappings:
            run("cryptsetup", "close", name)
        for device in self.loops:
            run("losetup", "--detach", device)

    # -- the workers

    def ask(self, role, message, descriptors):
        """Ask a new worker; return its proof, its answer and what came with it."""
        child = Child(role, self.log, {}, "-")
        try:
            hello, _ = child.channel.receive(deadline_s=WAIT_S)
            assert isinstance(hello, Hello), hello
            child.channel.send(message, descriptors)
            answer, came = child.channel.receive(deadline_s=WAIT_S)
            for descriptor in came:
                self.keep(descriptor)
        finally:
            child.end(grace_ms=WAIT_S * 1000)
        return json.loads(hello.proof), answer, came

    def serve(self, path, kind, *, read_only=False):
        """Have an image served; return the answer and the connection."""
        name = str(self.directory / "socket")
        listening, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        listening.bind(name)
        listening.listen(1)
        client.connect(name)
        os.unlink(name)
        image = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        with listening:
            descriptors = [image, listening.fileno(), client.fileno()]
            _, answer, _ = self.ask(Role.IMAGE, Serve(kind, read_only, LABEL), descriptors)
        os.close(image)
        assert isinstance(answer, Served), answer
        self.pids.add(answer.pid)
        return answer, client

    def device(self, path, kind, *, read_only=False):
        """Make a kernel device of an image; return the server's pid, the open device and its path."""
        served, client = self.serve(path, kind, read_only=read_only)
        with client:
            message = Connect(served.size_bytes, served.flags, read_only, LABEL)
            proof, answer, came = self.ask(Role.STORAGE, message, [client.fileno()])
        assert isinstance(answer, Done), answer
        assert (
            int(proof["capabilities"]["CapEff"], 16) == int(proof["capabilities"]["CapBnd"], 16) == 1 << CAP_SYS_ADMIN
        )
        return served.pid, came[0], answer.text

    def decrypt(self, device, *, name="xenvm-test-crypt", cipher="aes-xts-plain", bits=256, key=KEY, read_only=False):
        (self.directory / "key").write_bytes(key)
        key_file = os.open(self.directory / "key", os.O_RDONLY)
        descriptors = [device, key_file]
        try:
            self.mappings.add(name)
            return self.ask(Role.STORAGE, Decrypt(name, cipher, bits, read_only), descriptors)[1:]
        finally:
            os.close(key_file)

    # -- what they work on

    def image(self, form, options=()):
        path = self.directory / f"image.{form}"
        done = run("qemu-img", "create", "-q", "-f", form, *options, str(path), str(SIZE))
        assert done.returncode == 0, done.stderr
        path.chmod(0o600)
        return path

    def loop(self, path, *, read_only=False):
        """Open a loop device over a file that goes with its last opener."""
        more = ["--read-only"] if read_only else []
        done = run("losetup", "--find", "--show", *more, str(path))
        assert done.returncode == 0, done.stderr
        device = done.stdout.strip()
        self.loops.add(device)
        descriptor = self.keep(os.open(device, os.O_RDONLY if read_only else os.O_RDWR))
        assert run("losetup", "--detach", device).returncode == 0  # marks it, while it is open
        return descriptor, device

    def stop(self, pid):
        """End a server as the broker does: it flushes when it is asked to end, and one that does not end is killed."""
        end_server(server_text(pid))
        until(lambda: not words_of(pid), "the server has ended")


@pytest.fixture
def bench(tmp_path):
    one = Bench(tmp_path)
    yield one
    one.end()


def raw(path, form):
    done = run("qemu-img", "convert", "-f", form, "-O", "raw", str(path), f"{path}.raw")
    assert done.returncode == 0, done.stderr
    return Path(f"{path}.raw").read_bytes()


def sys_of(device):
    return Path("/sys/block") / Path(device).name


def free(device):
    """Whether an nbd device has no connection: it has a pid file as long as it has one, drivers/block/nbd.c."""
    return not (sys_of(device) / "pid").exists()


def mapped():
    """The names of all mappings; one that is just going away has none any more."""
    found = []
    for path in Path("/sys/block").glob("dm-*/dm/name"):
        with contextlib.suppress(OSError):
            found.append(path.read_text().strip())
    return sorted(found)


def loops_over(path):
    return run("losetup", "--associated", str(path)).stdout


def read_at(device, offset, length):
    """Read past the page cache's opinion of the time before."""
    os.posix_fadvise(device, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(device, length, offset)


FORMATS = [
    ("qcow", "qcow", ()),
    ("qcow", "qcow2", ()),
    ("vhd", "vpc", ("-o", "force_size=on")),
    ("vhd", "vpc", ("-o", "subformat=fixed,force_size=on")),
]
PATTERN = bytes(range(256)) * 256


@pytest.mark.parametrize(("kind", "form", "options"), FORMATS)
def test_an_image_becomes_a_block_device(bench, kind, form, options):
    path = bench.image(form, options)
    pid, device, node = bench.device(path, kind)
    assert node.startswith("/dev/nbd")
    assert os.lseek(device, 0, os.SEEK_END) == SIZE
    assert (sys_of(node) / "queue/logical_block_size").read_text() == "512\n"
    assert not [entry for entry in sys_of(node).iterdir() if entry.name.startswith("nbd")]  # no partitions
    assert os.pwrite(device, PATTERN, 3 * MIB + 512) == len(PATTERN)
    assert os.pwrite(device, PATTERN[:512], SIZE - 512) == 512
    os.fsync(device)
    assert read_at(device, 3 * MIB, 1024) == bytes(512) + PATTERN[:512]
    bench.close(device)
    until(lambda: free(node), "the nbd device is free")
    bench.stop(pid)
    expected = bytearray(SIZE)
    expected[3 * MIB + 512 : 3 * MIB + 512 + len(PATTERN)] = PATTERN
    expected[-512:] = PATTERN[:512]
    assert raw(path, form) == expected


def test_an_image_for_reading_only(bench):
    path = bench.image("qcow2")
    before = path.read_bytes()
    pid, device, node = bench.device(path, "qcow", read_only=True)
    assert (sys_of(node) / "ro").read_text() == "1\n"
    assert os.pread(device, 512, 0) == bytes(512)
    with pytest.raises(OSError):
        os.write(bench.keep(os.open(node, os.O_RDWR)), bytes(512))
    for descriptor in list(bench.open - {bench.log}):
        bench.close(descriptor)
    until(lambda: free(node), "the nbd device is free")
    bench.stop(pid)
    assert path.read_bytes() == before


def test_the_device_lives_as_long_as_its_last_opener(bench):
    pid, device, node = bench.device(bench.image("qcow2"), "qcow")
    other = bench.keep(os.open(node, os.O_RDWR))
    bench.close(device)
    run("udevadm", "settle", "--timeout=60")
    assert not free(node)
    assert os.pwrite(other, PATTERN[:4096], 0) == 4096
    os.fsync(other)
    bench.close(other)
    until(lambda: free(node), "the nbd device is free")
    bench.stop(pid)


def test_several_devices_at_once_and_again(bench):
    """udev opens and closes each new device, which must not take it away before it is handed over."""
    for _ in range(3):
        made = []
        for number in range(3):
            path = bench.directory / f"{number}.qcow2"
            assert run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)).returncode == 0
            made.append(bench.device(path, "qcow"))
        assert len({node for _, _, node in made}) == 3
        run("udevadm", "settle", "--timeout=60")
        for number, (_, device, _) in enumerate(made):
            assert os.pwrite(device, bytes([number + 1]) * 512, 0) == 512
            os.fsync(device)
        for number, (_, device, _) in enumerate(made):
            assert read_at(device, 0, 512) == bytes([number + 1]) * 512
        for pid, device, node in made:
            bench.close(device)
            until(lambda one=node: free(one), "the nbd device is free")
            bench.stop(pid)


def test_a_server_that_dies(bench):
    pid, device, node = bench.device(bench.image("qcow2"), "qcow")
    kill(pid)
    with pytest.raises(OSError):
        os.pread(device, 4096, 8 * MIB)
    bench.close(device)
    until(lambda: free(node), "the nbd device is free")


def test_a_device_that_nobody_arranged_the_end_of_is_found_and_removed(bench):
    """As after SIGKILL of the worker: connected, with the label, and open nowhere."""
    served, client = bench.serve(bench.image("qcow2"), "qcow")
    kernel = nbd.Kernel()
    wanted = nbd.connect_attributes(served.size_bytes, served.flags, client.fileno(), LABEL)
    (index,) = struct.unpack("=I", kernel._ask(kernel._family, nbd.NBD_CMD_CONNECT, wanted)[nbd.NBD_ATTR_INDEX])
    node = f"/dev/nbd{index}"
    client.close()
    assert not free(node)
    assert strays.find(UUID, {51712}, ()).nbds == ()
    found = strays.find(UUID, (), ())
    assert found.nbds == (index,)
    assert [text.split()[0] for text in found.servers] == [str(served.pid)]
    strays.clear(found, UUID, bench.log)
    until(lambda: free(node), "the nbd device is free")
    assert strays.find(UUID, (), ()) == strays.Strays((), (), ())


def test_a_connection_that_is_none(bench):
    ours, theirs = socket.socketpair()
    with theirs, ours:
        ours.close()
        _, answer, _ = bench.ask(Role.STORAGE, Connect(SIZE, 1, False, LABEL), [theirs.fileno()])
        if isinstance(answer, Done):  # the kernel takes any stream socket; the device then has errors, and goes
            node = answer.text
            for descriptor in list(bench.open - {bench.log}):
                bench.close(descriptor)
            until(lambda: free(node), "the nbd device is free")
    with (bench.directory / "file").open("wb") as file:
        _, answer, _ = bench.ask(Role.STORAGE, Connect(SIZE, 1, False, LABEL), [file.fileno()])
    assert isinstance(answer, Failed), answer
    assert "the kernel makes no block device of the image" in answer.fault.message


# -- encryption -----------------------------------------------------------------------------------------------------


def by_hand(bench, path, cipher, bits, *, write=None):
    """Do with cryptsetup what the worker does: read the whole device, or write to its beginning."""
    (bench.directory / "key").write_bytes(KEY)
    _, device = bench.loop(path)
    name = "xenvm-test-hand"
    bench.mappings.add(name)
    words = ["open", "--type", "plain", "--cipher", cipher, "--key-size", str(bits)]
    done = run("cryptsetup", *words, "--key-file", str(bench.directory / "key"), device, name)
    assert done.returncode == 0, done.stderr
    if write is not None:
        with open(f"/dev/mapper/{name}", "r+b") as mapping:
            mapping.write(write)
            mapping.flush()
            os.fsync(mapping.fileno())
    with open(f"/dev/mapper/{name}", "rb") as mapping:
        content = mapping.read()
    done = run("cryptsetup", "close", name)
    assert done.returncode == 0, done.stderr
    for descriptor in list(bench.open - {bench.log}):
        bench.close(descriptor)
    until(lambda: not loops_over(path), "the loop device is gone")
    return content


@pytest.fixture
def plain(bench):
    path = bench.directory / "disk"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize(
    ("cipher", "bits"), [("aes-xts-plain", 256), ("aes-xts-plain64", 512), ("aes-cbc-plain", 128), ("aes", 256)]
)
def test_encryption_is_that_of_cryptsetup(bench, plain, cipher, bits):
    below, loop = bench.loop(plain)
    answer, came = bench.decrypt(below, cipher=cipher, bits=bits)
    assert isinstance(answer, Done), answer
    assert answer.text.startswith("/dev/dm-")
    device = came[0]
    assert os.lseek(device, 0, os.SEEK_END) == SIZE
    assert (sys_of(answer.text) / "dm/name").read_text() == "xenvm-test-crypt\n"
    assert (sys_of(answer.text) / "dm/uuid").read_text() == "CRYPT-PLAIN-xenvm-test-crypt\n"
    assert "type:    PLAIN" in run("cryptsetup", "status", "xenvm-test-crypt").stdout
    assert os.pwrite(device, PATTERN, MIB) == len(PATTERN)
    os.fsync(device)
    bench.close(below)
    run("udevadm", "settle", "--timeout=60")
    assert mapped() == ["xenvm-test-crypt"]  # it stands on its own opener
    assert loops_over(plain)
    assert PATTERN[:512] not in plain.read_bytes()
    bench.close(device)
    until(lambda: mapped() == [], "the mapping is gone")
    until(lambda: not loops_over(plain), "the loop device is gone")
    assert not Path("/dev/mapper/xenvm-test-crypt").exists()
    assert loop
    assert by_hand(bench, plain, cipher, bits)[MIB : MIB + len(PATTERN)] == PATTERN


def test_what_cryptsetup_wrote_is_read(bench, plain):
    by_hand(bench, plain, "aes-xts-plain64", 256, write=PATTERN)
    below, _ = bench.loop(plain, read_only=True)
    answer, came = bench.decrypt(below, cipher="aes-xts-plain64", read_only=True)
    assert isinstance(answer, Done), answer
    assert (sys_of(answer.text) / "ro").read_text() == "1\n"
    assert os.pread(came[0], len(PATTERN), 0) == PATTERN
    bench.close(below)
    bench.close(came[0])
    until(lambda: mapped() == [] and not loops_over(plain), "nothing is left")


def test_the_mapping_lives_as_long_as_its_last_opener(bench, plain):
    below, _ = bench.loop(plain)
    answer, came = bench.decrypt(below)
    assert isinstance(answer, Done), answer
    other = bench.keep(os.open(answer.text, os.O_RDWR))
    bench.close(below)
    bench.close(came[0])
    run("udevadm", "settle", "--timeout=60")
    assert mapped() == ["xenvm-test-crypt"]
    assert os.pwrite(other, PATTERN, 0) == len(PATTERN)
    os.fsync(other)
    bench.close(other)
    until(lambda: mapped() == [] and not loops_over(plain), "nothing is left")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cipher": "no-such-cipher"}, "refuses the cipher no-such-cipher with a key of 256 bits"),
        ({"bits": 200}, "refuses the cipher aes-xts-plain with a key of 200 bits"),
        ({"key": KEY[:31]}, "the key file has 31 bytes; a key of 256 bits takes 32"),
        ({"name": "xenvm-test-taken"}, "a mapping xenvm-test-taken exists already"),
    ],
)
def test_what_cannot_be_decrypted_leaves_nothing(bench, plain, changes, message):
    bench.mappings.add("xenvm-test-taken")
    assert run("dmsetup", "create", "xenvm-test-taken", "--table", "0 8 zero").returncode == 0
    before = mapped()
    below, _ = bench.loop(plain)
    answer, _ = bench.decrypt(below, **changes)
    assert isinstance(answer, Failed), answer
    assert message in answer.fault.message
    assert KEY[:8].hex() not in answer.fault.message + answer.fault.hint + (bench.directory / "log").read_text()
    bench.close(below)
    until(lambda: mapped() == before and not loops_over(plain), "nothing is left")
    until(lambda: run("dmsetup", "remove", "xenvm-test-taken").returncode == 0, "dmsetup remove")


def test_a_device_in_use_is_not_decrypted(bench, plain):
    below, device = bench.loop(plain)
    other = bench.keep(os.open(device, os.O_RDWR | os.O_EXCL))
    answer, _ = bench.decrypt(below)
    assert isinstance(answer, Failed), answer
    assert "is in use" in answer.fault.message
    bench.close(other)
    bench.close(below)
    until(lambda: mapped() == [] and not loops_over(plain), "nothing is left")


def words_of(pid):
    """The command line of a process, empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
