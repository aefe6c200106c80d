"""An S3 endpoint that keeps nothing but checksums: `python s3_sink.py [SECONDS [lenient]]` prints its port and serves
until its input ends. SECONDS are waited before each part is read. A lenient one takes uploads without checksums, too.

It takes multipart uploads of any size, checks every part's CRC-32, the whole's, and the size, as S3 does, and answers
HEAD with what it computed.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import zlib
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

ZEROS = bytes(1024 * 1024)


def over_zeros(crc: int, length: int) -> int:
    """CRC-32 of a string followed by `length` zeros, from that of the string."""
    for start in range(0, length, len(ZEROS)):
        crc = zlib.crc32(memoryview(ZEROS)[: min(len(ZEROS), length - start)], crc)
    return crc


def join(first: int, second: int, second_length: int) -> int:
    """CRC-32 of two strings in a row, computed in another way than the package does."""
    return over_zeros(first, second_length) ^ over_zeros(0, second_length) ^ second


def text(crc: int) -> str:
    return b64encode(crc.to_bytes(4, "big")).decode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    lock = threading.Lock()
    delay = 0.0
    lenient = False
    parts: dict[int, tuple[int, int]] = {}  # noqa: RUF012 - one upload at a time
    stored: dict[str, str] = {}  # noqa: RUF012

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        if "uploads" in parse_qs(urlsplit(self.path).query, keep_blank_values=True):
            self.parts.clear()
            self._answer(200, b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>")
            return
        size, crc = 0, 0
        for number in sorted(self.parts):
            part_crc, part_size = self.parts[number]
            size, crc = size + part_size, join(crc, part_crc, part_size)
        asked = (self.headers.get("x-amz-checksum-crc32"), self.headers.get("x-amz-mp-object-size"))
        complete = asked == (text(crc), str(size)) and self.headers.get("x-amz-checksum-type") == "FULL_OBJECT"
        if not complete and not (self.lenient and asked == (None, None)):
            self._error("BadDigest")
            return
        self.stored.update(size=str(size), crc=text(crc))
        self._answer(200, b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>")

    def do_PUT(self) -> None:
        time.sleep(self.delay)
        length = left = int(self.headers.get("Content-Length") or 0)
        buffer, crc = memoryview(bytearray(256 * 1024)), 0
        while left:
            got = self.rfile.readinto(buffer[: min(left, len(buffer))])
            if not got:
                return
            crc, left = zlib.crc32(buffer[:got], crc), left - got
        given = self.headers.get("x-amz-checksum-crc32")
        if given != text(crc) and not (self.lenient and given is None):
            self._error("BadDigest")
            return
        match = re.search(r"partNumber=(\d+)", self.path)
        assert match is not None
        with self.lock:
            self.parts[int(match[1])] = (crc, length)
        self._answer(200, b"", ETag=f'"{crc:08x}"')

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", self.stored["size"])
        self.send_header("x-amz-checksum-crc32", self.stored["crc"])
        self.send_header("x-amz-checksum-type", "FULL_OBJECT")
        self.end_headers()

    def do_DELETE(self) -> None:
        self._answer(204, b"")

    def _error(self, code: str) -> None:
        self._answer(400, f"<Error><Code>{code}</Code></Error>".encode())

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def main() -> None:
    Handler.delay = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    Handler.lenient = sys.argv[2:] == ["lenient"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
