"""The image that our containers are made from: Debian with Python, git and make, and the certificates of this machine.

``python3 -m scripts.base_image`` prints its name. When it is missing it is made: from Debian's own image where one can
be pulled, else with debootstrap (which needs root). The name has the month and a digest of what went in: a new month, a
change of the packages or of the machine's certificates makes another image, and those of other months are removed.
``--rebuild`` makes it again at once, with the packages of today.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.containers import ContainerError, Engine, certificates, find_engine, last_words, working

SUITES = {"bookworm": "Python 3.11", "trixie": "Python 3.13"}
PACKAGES = ("python3", "python3-venv", "git", "make", "ca-certificates")
NAME = "localhost/flip-observability/base"

CONTAINERFILE = """\
ARG BASE
FROM $BASE
ARG PACKAGES
COPY certificates/ /usr/local/share/ca-certificates/host/
RUN dpkg-query --show $PACKAGES >/dev/null 2>&1 || { \\
      apt-get update \\
      && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $PACKAGES \\
      && rm -rf /var/lib/apt/lists/*; \\
    }; \\
    update-ca-certificates
"""

PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def image_name(suite: str, trusted: Sequence[str], today: datetime.date) -> str:
    """The image's name: another one for other contents, and for another month."""
    content = "\0".join((suite, *PACKAGES, CONTAINERFILE, *trusted))
    return f"{NAME}:{suite}-{today:%Y.%m}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def base_image(engine: Engine, suite: str, *, rebuild: bool = False) -> tuple[Engine, str]:
    """The image, made when it is missing or `rebuild` asks for it, and the engine with the settings that it runs under.

    Raises:
        ContainerError: it cannot be made.
    """
    trusted = certificates(os.environ)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    name = image_name(suite, trusted, today)
    if rebuild or engine.start("image", "inspect", name).returncode:
        _say(f"making the image {name} (once)")
        base = _pulled(engine, suite) or _bootstrapped(engine, suite)
        outdated = _outdated(engine, name, f"{suite}-{today:%Y.%m}-")
        _build(working(engine, base), base, name, trusted)
        for image in outdated:
            # One that a container still uses stays; the next month removes it.
            engine.start("image", "rm", image)
    return working(engine, name), name


def _outdated(engine: Engine, name: str, month: str) -> list[str]:
    """Our images that a new one takes the place of: of its name, by id, and of the same suite and other months."""
    suite = month.partition("-")[0]
    listed = engine.start("image", "ls", "--format", "{{.Tag}}", NAME).stdout.split()
    found = [f"{NAME}:{tag}" for tag in listed if tag.startswith(f"{suite}-") and not tag.startswith(month)]
    return found + engine.start("image", "inspect", "--format", "{{.Id}}", name).stdout.split()


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _pulled(engine: Engine, suite: str) -> str | None:
    image = f"docker.io/library/debian:{suite}"
    try:
        done = engine.start("pull", image, timeout=300)
    except subprocess.TimeoutExpired:
        return None
    return None if done.returncode else image


def _bootstrapped(engine: Engine, suite: str) -> str:
    if not shutil.which("debootstrap") or os.geteuid() != 0:
        raise ContainerError(
            f"debian:{suite} cannot be pulled, and the other way, debootstrap, needs the package of that name and root"
        )
    _say(f"debian:{suite} cannot be pulled here; debootstrap makes it, which takes a minute or two")
    base = f"{NAME}-debootstrap:{suite}"
    with tempfile.TemporaryDirectory(prefix="flip-obs-image-") as temporary:
        # The temporary folder itself is closed to others, and this becomes the image's root.
        folder = f"{temporary}/root"
        include = f"--include={','.join(PACKAGES)}"
        command = ["debootstrap", "--variant=minbase", include, suite, folder, *_mirror(suite)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ContainerError(f"debootstrap failed: {last_words(done)}")
        for package in Path(folder, "var/cache/apt/archives").glob("*.deb"):
            package.unlink()
        with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as tar:
            engine.must("import", "-", base, stdin=tar.stdout)
        if tar.returncode:
            raise ContainerError(f"tar failed with exit code {tar.returncode}")
    return base


def _mirror(suite: str) -> list[str]:
    """The mirror that this machine's own apt uses, when it is a Debian; otherwise debootstrap's default."""
    release = Path("/etc/os-release")
    if not release.is_file() or "ID=debian" not in release.read_text(encoding="utf-8").splitlines():
        return []
    command = ["apt-get", "indextargets", "--format", "$(RELEASE) $(SITE)", "Created-By: Packages"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    targets = [(name, site) for name, _, site in (line.partition(" ") for line in listed)]
    # Every suite is on the same mirror; updates and security fixes may be on others.
    sites = [site for name, site in targets if name == suite] or [site for name, site in targets if "-" not in name]
    return sites[:1]


def _build(engine: Engine, base: str, name: str, trusted: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="flip-obs-image-") as folder:
        Path(folder, "Containerfile").write_text(CONTAINERFILE, encoding="utf-8")
        Path(folder, "certificates").mkdir()
        for number, certificate in enumerate(trusted):
            Path(folder, "certificates", f"{number:04}.crt").write_text(certificate, encoding="utf-8")
        given = [f"--build-arg={variable}" for variable in PROXIES if variable in os.environ]
        given += [f"--build-arg=BASE={base}", f"--build-arg=PACKAGES={' '.join(PACKAGES)}"]
        engine.must(
            "build",
            "--no-cache",
            *engine.network,
            *given,
            f"--tag={name}",
            f"--file={folder}/Containerfile",
            folder,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose the image."""
    known = ", ".join(f"{suite} ({python})" for suite, python in SUITES.items())
    parser.add_argument("--suite", choices=SUITES, default="bookworm", metavar="NAME", help=f"of Debian: {known}")
    parser.add_argument("--rebuild", action="store_true", help="make the image again, with the packages of today")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the image's name, for other programs; what is going on goes to stderr."""
    parser = argparse.ArgumentParser(prog="python3 -m scripts.base_image", description="The image of our containers.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        _, name = base_image(find_engine(), arguments.suite, rebuild=arguments.rebuild)
    except ContainerError as error:
        _say(f"base image: {error}")
        return 1
    sys.stdout.write(f"{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
