# SPDX-License-Identifier: GPL-2.0-or-later
"""The xenstore nodes of a domain, with their permissions, and our own dom0-only record of it.

Owner and readers are written as xenstore does: `n0` is dom0 alone, `n0,r7` lets domain 7 read, `n7` gives domain 7
the node. Everything that matters for tearing down is in the record, never in a node that a guest may write.
"""

from __future__ import annotations

from xenvm.boundary.messages import Phase
from xenvm.helpers.store import Store, remove_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from xenvm.boundary.machine import Machine, ModelState
    from xenvm.helpers.builder.hypervisor import Channels, Rings

RECORDS: Final = "/xenvm"
GUEST_OWNED: Final = (  # what a PV guest may write, all below its own directory
    "device/suspend/event-channel",
    "control/shutdown",
    "control/feature-poweroff",
    "control/feature-reboot",
    "control/feature-suspend",
    "control/sysrq",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
)
HVM_OWNED: Final = ("control/feature-s3", "control/feature-s4")
GUEST_READABLE: Final = ("cpu", "memory", "device", "control")
PLATFORM_FEATURES: Final = ("platform-feature-multiprocessor-suspend", "platform-feature-xs_reset_watches")
CONSOLE_LIMIT_BYTES: Final = 1048576  # how much xenconsoled buffers for a guest nobody reads


def domain_path(domid: int) -> str:
    """Return the domain's own directory."""
    return f"/local/domain/{domid}"


def record_path(uuid: str) -> str:
    """Return our record of a VM, readable and writable by dom0 alone."""
    return f"{RECORDS}/{uuid}"


def write_record(store: Store, uuid: str, domid: int, phase: Phase, restored: str = "", *, wakes: bool = False) -> None:
    """Note what we are about to do (BUILDING) or have done (BUILT) for `uuid`, and which image was `restored`.

    With `wakes` the domain is whole and still paused, and whoever finds it so is to let it run.
    """

    def steps() -> None:
        path = record_path(uuid)
        store.make(path)
        store.permissions(path, "n0")
        store.write(f"{path}/domid", str(domid))
        store.write(f"{path}/phase", phase.value)
        if restored:
            store.write(f"{path}/restored", restored)
        if wakes:
            store.write(f"{path}/wakes", "1")

    store.transaction(steps)


def read_record(store: Store, uuid: str) -> tuple[int, Phase]:
    """Return domid and phase of the record; (-1, NONE) without one. A record we cannot read counts as BUILDING."""
    domid = store.read(f"{record_path(uuid)}/domid")
    phase = store.read(f"{record_path(uuid)}/phase")
    if domid is None or phase is None:
        return -1, Phase.NONE
    try:
        return int(domid), Phase(phase.decode("ascii"))
    except ValueError:
        return -1, Phase.BUILDING


def read_restored(store: Store, uuid: str) -> str:
    """Return which image the domain came from, "" for none."""
    value = store.read(f"{record_path(uuid)}/restored") or b""
    return value.decode("ascii", "replace")


def wakes(store: Store, uuid: str) -> bool:
    """Tell whether the domain is still to be let run for the first time."""
    return store.read(f"{record_path(uuid)}/wakes") is not None


def woken(store: Store, uuid: str) -> None:
    """Note that the domain runs."""
    store.remove(f"{record_path(uuid)}/wakes")


def write_skeleton(store: Store, domid: int, uuid: str, name: str, *, hvm: bool = False) -> None:
    """Make the domain's directories, empty of everything an earlier domain of this id may have left."""
    home, vm = domain_path(domid), f"/vm/{uuid}"
    readable, owned = ("n0", f"r{domid}"), (f"n{domid}",)

    def steps() -> None:
        for path in (home, vm):
            store.remove(path)
            store.make(path)
            store.permissions(path, *readable)
        store.write(f"{home}/vm", vm)
        store.write(f"{home}/name", name)
        for node in GUEST_READABLE:
            store.make(f"{home}/{node}")
            store.permissions(f"{home}/{node}", *readable)
        for node in (*GUEST_OWNED, *(HVM_OWNED if hvm else ())):
            store.write(f"{home}/{node}", "")
            store.permissions(f"{home}/{node}", *owned)
        for node in PLATFORM_FEATURES:
            store.write(f"{home}/control/{node}", "1")
        store.write(f"{vm}/uuid", uuid)
        store.write(f"{vm}/name", name)

    store.transaction(steps)


def write_machine(store: Store, domid: int, uuid: str, machine: Machine) -> None:
    """Tell hvmloader what machine to make, and give the device model a directory of its own, with its settings."""
    home, model = domain_path(domid), model_path(domid)
    readable = ("n0", f"r{domid}")
    sleeps = "1" if machine.acpi else "0"
    nodes = {
        "hvmloader/bios": "seabios",
        "hvmloader/allow-memory-relocate": "0",  # QEMU maps the guest's memory where it was built
        "platform/acpi": "1" if machine.acpi else "0",
        "platform/acpi_s3": sleeps,
        "platform/acpi_s4": sleeps,
        "platform/acpi_laptop_slate": "0",
        "platform/device-model": "qemu_xen",
    }
    nodes |= {f"platform/{setting.key}": setting.value for setting in machine.platform}
    nodes |= {f"bios-strings/{text.key}": text.value for text in machine.bios_strings}
    settings = {
        "xen_extended_power_mgmt": machine.power_management,
        "oem_features": machine.oem_features,
        "inject-sci": machine.inject_sci,
    }

    def steps() -> None:
        for directory in ("hvmloader", "platform", "bios-strings"):
            store.make(f"{home}/{directory}")
            store.permissions(f"{home}/{directory}", *readable)
        for node, value in nodes.items():
            store.write(f"{home}/{node}", value)
        store.write(f"/vm/{uuid}/rtc/timeoffset", str(machine.timeoffset_s))
        store.remove(model)
        store.make(model)
        store.permissions(model, "n0")
        for setting, number in settings.items():
            if number:
                store.write(f"{model}/{setting}", str(number))

    store.transaction(steps)


def write_model(store: Store, uuid: str, domid: int, model: ModelState, vnc_host: str) -> None:
    """Note the device model in our record, and for xl where serial port and screen are."""

    def steps() -> None:
        path = f"{record_path(uuid)}/model"
        store.make(path)
        store.permissions(path, "n0")
        for node, value in (("server", model.server), ("tty", model.tty), ("vnc-port", str(model.vnc_port))):
            store.write(f"{path}/{node}", value)
        if model.tty:
            store.write(f"{domain_path(domid)}/serial/0/tty", model.tty)
        if model.vnc_port:
            store.write(f"{domain_path(domid)}/console/vnc-listen", vnc_host)
            store.write(f"{domain_path(domid)}/console/vnc-port", str(model.vnc_port))

    store.transaction(steps)


def read_model(store: Store, uuid: str) -> tuple[str, str, str]:
    """Return what our record says of the device model: server, terminal, VNC port; each "" without one."""

    def word(node: str) -> str:
        return (store.read(f"{record_path(uuid)}/model/{node}") or b"").decode("ascii", "replace")

    return word("server"), word("tty"), word("vnc-port")


def model_path(domid: int) -> str:
    """Return the directory of the domain's device model."""
    return f"/local/domain/0/device-model/{domid}"


def has_model(store: Store, domid: int) -> bool:
    """Tell whether the domain is one with a device model: that has a directory before it is started."""
    return store.read(model_path(domid)) is not None


def write_built(
    store: Store,
    domid: int,
    *,
    memory_kib: int,
    max_kib: int,
    video_kib: int = 0,
    vcpus: int,
    rings: Rings,
    channels: Channels,
) -> None:
    """Publish what the guest needs to boot: memory, ports, ring frames, vcpus and its console."""
    home = domain_path(domid)
    readable, owned = ("n0", f"r{domid}"), (f"n{domid}", "r0")

    def steps() -> None:
        for node, value in (
            ("memory/static-max", max_kib),
            ("memory/target", memory_kib - video_kib),
            ("memory/videoram", video_kib),
            ("domid", domid),
            ("store/port", channels.store_port),
            ("store/ring-ref", rings.store_frame),
        ):
            store.write(f"{home}/{node}", str(value))
        for name, address, length in rings.modules:
            store.write(f"{home}/hvmloader/{name}/address", f"{address:#x}")
            store.write(f"{home}/hvmloader/{name}/length", f"{length:#x}")
        for vcpu in range(vcpus):
            store.write(f"{home}/cpu/{vcpu}/availability", "online")
        back = f"/local/domain/0/backend/console/{domid}/0"
        store.remove(back)
        store.make(back)
        store.permissions(back, *readable)
        for node, word in (
            ("frontend", f"{home}/console"),
            ("frontend-id", str(domid)),
            ("online", "1"),
            ("state", "1"),
            ("protocol", "vt100"),
        ):
            store.write(f"{back}/{node}", word)
        console = f"{home}/console"
        store.make(console)
        store.permissions(console, *readable)
        for node, word, who in (
            ("backend", back, readable),
            ("backend-id", "0", owned),
            ("limit", str(CONSOLE_LIMIT_BYTES), readable),
            ("type", "xenconsoled", readable),
            ("output", "pty", readable),
            ("tty", "", readable),
            ("port", str(channels.console_port), readable),
            ("ring-ref", str(rings.console_frame), readable),
        ):
            store.write(f"{console}/{node}", word)
            store.permissions(f"{console}/{node}", *who)

    store.transaction(steps)


def withdraw(store: Store, domid: int) -> bool:
    """Take a request back that the guest has not acknowledged, else it would obey at some later time; tell whether."""
    path = f"{domain_path(domid)}/control/shutdown"
    taken = [False]

    def steps() -> None:
        untrusted_value = store.read(path)
        taken[0] = bool(untrusted_value)
        if untrusted_value:
            store.write(path, "")

    store.transaction(steps)
    return taken[0]


def remove_domain(store: Store, domid: int) -> None:
    """Remove every node we made for `domid`; also right when some or all are gone."""
    remove_all(
        store,
        (
            domain_path(domid),
            model_path(domid),
            f"/local/domain/0/backend/console/{domid}",
            f"/local/domain/0/error/backend/console/{domid}",
        ),
    )


def remove_vm(store: Store, uuid: str) -> None:
    """Remove the nodes that belong to the uuid, the record last, and the parents that are empty then."""
    remove_all(store, (f"/vm/{uuid}", record_path(uuid)))
    for parent in (
        RECORDS,
        "/vm",
        "/local/domain/0/device-model",
        "/local/domain/0/backend/console",
        "/local/domain/0/backend",
    ):
        store.remove_if_empty(parent)
