"""Ask the databases of known vulnerabilities about what is installed and about what is built.

PyPI's database, by pip-audit, is asked about the packages of ``requirements/*.txt`` for this version of Python; Go's
own, by govulncheck, about the collector, which is built first. An answer that is missing is no good news: it says so.

Exit code: 0 when nothing is known, 1 when something is, 2 when it could not be found out for everything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GOVULNCHECK = "golang.org/x/vuln/cmd/govulncheck@v1.1.4"
_GOVULNCHECK_FOUND = 3
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 2


class Verdict(NamedTuple):
    """What is known about one thing: an exit code, and a sentence."""

    code: int
    text: str


def judge_packages(name: str, answer: str) -> Verdict:
    """What pip-audit's JSON says of a lock. It counts packages that the index does not tell about as audited."""
    try:
        packages = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return Verdict(UNKNOWN, f"{name}: no answer; is the database of vulnerabilities within reach?")
    found = [f"{item['name']} {item['version']}: {_describe(item)}" for item in packages if item.get("vulns")]
    untold = sum("skip_reason" in item for item in packages)
    if found:
        return Verdict(VULNERABLE, "\n  ".join([f"{name}: {len(found)} packages are vulnerable", *found]))
    if untold or not packages:
        return Verdict(UNKNOWN, f"{name}: the index knows nothing about {untold} of {len(packages)} packages")
    return Verdict(CLEAN, f"{name}: nothing is known about its {len(packages)} packages")


def _describe(package: dict[str, list[dict[str, list[str]]]]) -> str:
    return ", ".join(
        f"{item['id']} (fixed in {' or '.join(item['fix_versions']) or 'none'})" for item in package["vulns"]
    )


def audit_packages() -> Iterator[Verdict]:
    """A verdict on each lock."""
    program = shutil.which(os.environ.get("PIP_AUDIT", "pip-audit"))
    if program is None:
        yield Verdict(UNKNOWN, "requirements: there is no pip-audit here")
        return
    options = ["--require-hashes", "--disable-pip", "--progress-spinner=off", "--format=json"]
    for lock in sorted((ROOT / "requirements").glob("*.txt")):
        told = subprocess.run([program, *options, "-r", str(lock)], capture_output=True, text=True, check=False)
        yield judge_packages(f"requirements/{lock.name}", told.stdout)


def audit_programs() -> Iterator[Verdict]:
    """A verdict on the collector."""
    go = os.environ.get("GO") or shutil.which("go") or "/usr/local/go/bin/go"
    if not os.access(go, os.X_OK):
        yield Verdict(UNKNOWN, "the collector: there is no Go here")
        return
    built = subprocess.run([ROOT / "collector" / "build.sh"], stdout=subprocess.PIPE, text=True, check=False)
    if built.returncode:
        yield Verdict(UNKNOWN, "the collector: it could not be built")
        return
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run([go, "install", GOVULNCHECK], env=os.environ | {"GOBIN": folder}, check=False).returncode:
            yield Verdict(UNKNOWN, "the collector: govulncheck could not be built")
            return
        command = [f"{folder}/govulncheck", "-mode=binary", built.stdout.splitlines()[-1]]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if told.returncode == _GOVULNCHECK_FOUND:
        yield Verdict(VULNERABLE, f"the collector is vulnerable\n{told.stdout}")
    elif told.returncode:
        yield Verdict(UNKNOWN, "the collector: no answer; is Go's database of vulnerabilities within reach?")
    else:
        yield Verdict(CLEAN, "the collector: nothing is known")


CHECKS = {"python": audit_packages, "go": audit_programs}


def main() -> int:
    """Audit what is asked for, and say what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*CHECKS, []], help="python, go; both when nothing is named")
    codes = set()
    for what in parser.parse_args().what or CHECKS:
        for verdict in CHECKS[what]():
            sys.stderr.write(f"audit: {verdict.text}\n")
            codes.add(verdict.code)
    return next((code for code in (VULNERABLE, UNKNOWN) if code in codes), CLEAN)


if __name__ == "__main__":
    sys.exit(main())
