# SPDX-License-Identifier: GPL-2.0-or-later
"""Drive one target by coverage for some seconds: `run.py TARGET SECONDS DIRECTORY`, with atheris installed.

What it finds interesting stays in DIRECTORY/TARGET for the next time; a fault is written to DIRECTORY and shown.
"""

import sys
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

with atheris.instrument_imports(include=["xenvm"]):
    from targets import CORPUS, TARGETS


def main():
    name, seconds, directory = sys.argv[1:]
    found = Path(directory) / name
    found.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(CORPUS[name]):
        (found / f"seed-{number}").write_bytes(seed)
    longest = max(65536, *(2 * len(seed) for seed in CORPUS[name]))
    words = [f"-max_total_time={seconds}", f"-max_len={longest}", "-rss_limit_mb=1024", "-timeout=20"]
    atheris.Setup([sys.argv[0], *words, f"-artifact_prefix={directory}/{name}-fault-", str(found)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
