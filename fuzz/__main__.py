"""Feed what reads hostile input, led by what code an input reaches: ``make fuzz ARGS="--seconds 600 archive"``.

Each target runs in a process of its own, since the fuzzer ends the process that it runs in. What it found interesting
is kept in a folder and used again the next time; an input that breaks a promise is written there, too, and named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

KEPT = Path(".fuzz")
SECONDS = 60
ONE = "--one"
"""The first argument of the process of one target, which loads our code by the fuzzer and not before."""
MAX_BYTES = 4_096
"""Of one input: what is longer reaches no other code."""


def feed(name: str, seconds: float, folder: Path) -> NoReturn:
    """Feed one target in this process, and end it."""
    import atheris

    with atheris.instrument_imports(include=["flip_observability"]):
        from fuzz.targets import TARGETS

    target = TARGETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (folder / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds:.0f}", f"-max_len={MAX_BYTES}", f"-artifact_prefix={folder}-"]
    atheris.Setup([sys.argv[0], *options, "-verbosity=1", "-print_final_stats=1", str(folder)], target.run)
    atheris.Fuzz()
    sys.exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Feed the targets one by one. Returns 1 when a promise was broken, 2 without a fuzzer or such a target."""
    if arguments is None and sys.argv[1:2] == [ONE]:
        feed(sys.argv[2], float(sys.argv[3]), KEPT / sys.argv[2])
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="make fuzz", description="Feed what reads hostile input.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for each target; {SECONDS} when not said")
    told = parser.parse_args(arguments)
    if find_spec("atheris") is None:
        parser.error("the fuzzer atheris is not installed: it has wheels for Linux on x86-64 alone")
    unknown = sorted(set(told.targets) - set(TARGETS))
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}")
    if not 1 <= told.seconds <= 86_400:
        parser.error("--seconds: from 1 to 86400")
    broken = []
    for name in told.targets or TARGETS:
        print(f"== {name}, {told.seconds:.0f} s", flush=True)
        command = [sys.executable, "-m", "fuzz", ONE, name, str(told.seconds)]
        if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
            broken.append(name)
    print(f"broken: {', '.join(broken)}; the inputs are in {KEPT}" if broken else "no promise was broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
