# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure with several of the scripts beside this one in dom0: `all.py ROUNDS NAME...`; each prints its table."""

import re
import subprocess
import sys
import time
from pathlib import Path

TITLES = {
    "measure": "Starting, rebooting, commands, ending; an idle monitor",
    "devices": "Disks and network cards",
    "images": "Saving and restoring",
    "crowd": "Many at once",
    "hvm": "HVM guests",
}


def release() -> str:
    """Return the version of the hypervisor."""
    told = subprocess.run(("xl", "info"), check=True, capture_output=True, text=True).stdout
    return " ".join(re.findall(r"^xen_version\s*: (\S+)", told, re.MULTILINE))


def main() -> None:
    """Print the tables."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").count("processor\t")
    for name in sys.argv[2:]:
        day = time.strftime("%d %B %Y", time.gmtime())
        print(f"\n## {TITLES[name]}\n\nXen {release()}, dom0 with {cpus} processor(s), {day}, `{name}`.\n", flush=True)
        subprocess.run((sys.executable, str(Path(__file__).with_name(f"{name}.py")), sys.argv[1]), check=True)


main()
