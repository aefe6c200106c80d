"""Look up the digests of the images that are pulled: those the Dockerfile stands on, and docker-compose.yml's.

Each is printed as its variable, ready for ``docker build --build-arg`` and for ``.env``; with ``--write`` it is pinned
where it is named. A digest comes from the image's registry, or not at all: exit code 2 when one cannot be had.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILES = ("Dockerfile", "docker-compose.yml")
NAMED = re.compile(r"(?:^ARG |\$\{)(?P<variable>\w+_IMAGE)(?:=|:-)(?P<image>[^\s}]+)", re.MULTILINE)
"""Where an image is named: as a build argument's default, or as a variable's."""
HUB = "registry-1.docker.io"
ACCEPTED = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in ("oci.image.index.v1", "docker.distribution.manifest.list.v2", "oci.image.manifest.v1")
)
SECONDS = 20.0
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


class LookupFailedError(Exception):
    """The digest is not known. The message is a sentence."""


class Image(NamedTuple):
    """An image's name, taken apart."""

    registry: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, name: str) -> Image:
        """Of ``[registry/]repository:tag[@digest]``; without a registry it is one of Docker's."""
        path, _, tag = name.partition("@")[0].rpartition(":")
        first, slash, rest = path.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost"):
            return cls(first, rest, tag)
        return cls(HUB, path if slash else f"library/{path}", tag)


def digest_of(image: Image, scheme: str = "https") -> str:
    """Ask the image's registry.

    Raises:
        LookupFailedError: it cannot be reached, or does not say.
    """
    url = f"{scheme}://{image.registry}/v2/{image.repository}/manifests/{image.tag}"
    try:
        found = _head(url, {}).get("Docker-Content-Digest", "")
    except (OSError, ValueError) as error:  # urllib's errors are OSErrors
        raise LookupFailedError(f"{image.registry} cannot be asked ({getattr(error, 'reason', error)})") from None
    if not _DIGEST.fullmatch(found):
        raise LookupFailedError(f"{image.registry} tells no digest")
    return found


def _head(url: str, headers: Mapping[str, str]) -> Message:
    request = urllib.request.Request(url, method="HEAD", headers={"Accept": ACCEPTED, **headers})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.headers  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        if error.code != 401 or headers:
            raise
        # Whoever wants to read a public image is given a token for it, without saying who he is.
        return _head(url, {"Authorization": f"Bearer {_token(error.headers.get('WWW-Authenticate', ''))}"})


def _token(challenge: str) -> str:
    asked = dict(_CHALLENGE.findall(challenge))
    query = urllib.parse.urlencode({key: asked[key] for key in ("service", "scope") if key in asked})
    realm = asked.get("realm", "")
    if not realm.startswith(("https://", "http://127.0.0.1:")):
        raise ValueError("it names no place to get a token from")
    with urllib.request.urlopen(f"{realm}?{query}", timeout=SECONDS) as answer:
        content = json.load(answer)
    return str(content.get("token") or content.get("access_token"))


def main() -> int:
    """Look all of them up, and print or pin what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="pin the digests in " + " and ".join(FILES))
    write, missing = parser.parse_args().write, 0
    for file in (ROOT / name for name in FILES):
        text = file.read_text(encoding="utf-8")
        for found in NAMED.finditer(text):
            name = found["image"].partition("@")[0]
            try:
                pinned = f"{name}@{digest_of(Image.parse(name))}"
            except LookupFailedError as error:
                sys.stderr.write(f"digests: {name}: {error}\n")
                missing += 1
                continue
            sys.stdout.write(f"{found['variable']}={pinned}\n")
            text = text.replace(found["image"], pinned)
        if write:
            file.write_text(text, encoding="utf-8")
    if missing:
        sys.stderr.write(f"digests: {missing} are not known; none was made up\n")
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
