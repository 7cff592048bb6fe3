# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands xenvm-cmd knows by name: the one table behind its help and its manual page.

A monitor may know more, and other names for these; xenvm-cmd passes on what it does not find here.
"""


class Verb:
    """One command: its arguments as written in the help, and the parameter that a single bare word stands for.

    `switch` is a parameter whose own name is enough to turn it on.
    """

    __slots__ = ("arguments", "bare", "name", "summary", "switch")

    def __init__(self, name: str, arguments: str, summary: str, *, bare: str = "", switch: str = "") -> None:
        self.name = name
        self.arguments = arguments
        self.summary = summary
        self.bare = bare
        self.switch = switch

    @property
    def usage(self) -> str:
        """The command as one types it."""
        return f"{self.name} {self.arguments}".rstrip()


VERBS = (
    Verb("help", "", "print this table; needs no monitor"),
    Verb("list", "", "print one line for each monitor; takes no UUID"),
    Verb("start", "[paused=true]", "build the domain and run it, or leave it paused"),
    Verb("pause", "", "stop the virtual CPUs"),
    Verb("unpause", "", "let the virtual CPUs run again"),
    Verb("shutdown", "[timeout=S] [force=true]", "ask the guest to power off; force ends it at once, or after timeout"),
    Verb("restart", "[timeout=S] [force=true]", "ask the guest to reboot; force as with shutdown"),
    Verb("destroy", "", "end the domain at once, as if its power were cut"),
    Verb(
        "suspend",
        "FILE [live=true] [timeout=S]",
        "write the guest into an image, then end its domain; live (HVM) writes most of it while the guest still runs; "
        "timeout is how long the guest may take to suspend",
        bare="file",
    ),
    Verb(
        "checkpoint",
        "FILE [live=true] [timeout=S]",
        "write the guest into an image and let it run on; live and timeout as with suspend",
        bare="file",
    ),
    Verb(
        "restore",
        "FILE [paused=true] [delete=true] [foreign=true]",
        "bring the guest back from an image, of xenvm or of `xl save`; delete removes the file then; foreign takes the "
        "image of another VM",
        bare="file",
    ),
    Verb("cancel", "", "end a suspend, checkpoint or restore that runs; a guest that was being saved runs on"),
    Verb("quit", "", "end the monitor and leave the domain as it is"),
    Verb("status", "", "print the state, and why or what failed last; exit status 3 when the VM does not run"),
    Verb("domid", "", "print the domain's present number, which a reboot changes"),
    Verb("get", "FIELD", "print one field of the VM", bare="field"),
    Verb("disk-list", "", "print the guest's disks: name, state, mode, source"),
    Verb(
        "disk-add",
        "PATH:TYPE:DEVICE:MODE:DEVTYPE[:share=true]",
        "give the running guest a disk, opened with your own rights; also as path= device= type= mode= devtype= share=",
        bare="spec",
    ),
    Verb(
        "disk-del",
        "DEVICE [force=true] [timeout=S]",
        "take a disk away; force also when the guest holds on to it",
        bare="device",
    ),
    Verb(
        "cd-insert",
        "device=D path=P [type=T]",
        "put a disc into a drive: a PV guest sees a new read-only disk, an HVM guest a disc in its drive",
    ),
    Verb("cd-eject", "DEVICE [force=true] [timeout=S]", "take the disc out of a drive", bare="device"),
    Verb("get-vnc", "", "print the TCP port of an HVM guest's screen"),
    Verb(
        "trigger",
        "WORD",
        "press the power or the sleep button of an HVM guest, reset it, or send an nmi; s3resume wakes it",
        bare="params",
    ),
    Verb(
        "s3suspend", "[timeout=S]", "ask an HVM guest with PV drivers to fall asleep (ACPI S3), and wait until it has"
    ),
    Verb("s3resume", "", "wake an HVM guest that sleeps"),
    Verb("get-acpi-state", "", "print the ACPI sleep state of an HVM guest: 0 awake, 3 asleep in memory"),
    Verb("get-stubdomid", "", "print the domain of the device model: there is none, it runs in dom0"),
    Verb("nic-list", "", "print the guest's network cards: id, state, address, bridge"),
    Verb("nic-add", "[id=N] [bridge=B] [mac=M]", "give the running guest a network card"),
    Verb("nic-del", "ID [force=true] [timeout=S]", "take a network card away", bare="id"),
    Verb("nic-network-switch", "ID bridge=B", "move a network card to another bridge", bare="id"),
    Verb(
        "doctor",
        "[clean]",
        "list what is missing or left over for the VM's devices, also of one that is off, exit status 1 when there is "
        "any; or remove what is left over",
        switch="clean",
    ),
    Verb("read-config", "", "read the config file of the VM again"),
    Verb("events", "", "print each event as one JSON object a line, until the monitor ends"),
    Verb("wait", "STATE [timeout=S]", "return when the VM reaches the state", bare="state"),
    Verb(
        "console", "[--log]", "connect to the guest's console, Ctrl-] leaves; with --log, print what was logged of it"
    ),
)

BARE_WORD = {verb.name: verb.bare for verb in VERBS if verb.bare}
SWITCH = {verb.name: verb.switch for verb in VERBS if verb.switch}


def manual() -> str:
    """Return the command table of the manual page, in Markdown."""
    rows = [f"| `{verb.usage}` | {verb.summary} |" for verb in VERBS]
    return "\n".join(["| Command | What it does |", "|---|---|", *rows]) + "\n"
