"""CRC-32 as S3 uses it: of a whole from that of its parts, and as text."""

from __future__ import annotations

import base64
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def _times(left: int, right: int) -> int:
    """Product of two polynomials over GF(2), modulo CRC-32's; the highest bit is the constant term."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = (left << 1) & 0xFFFFFFFF
        right = (right >> 1) ^ (_POLYNOMIAL if right & 1 else 0)
    return product


@lru_cache(maxsize=64)
def _shift(length: int) -> int:
    """x to the power of 8 * length: what `length` further bytes multiply a CRC-32 with."""
    power, square, exponent = _ONE, _ONE >> 1, 8 * length
    while exponent:
        if exponent & 1:
            power = _times(square, power)
        square = _times(square, square)
        exponent >>= 1
    return power


def combine(first: int, other: int, second_length: int) -> int:
    """CRC-32 of two byte strings in a row, from that of each; or of the second one, from that of the first and of both.

    So what runs along a stream of bytes is computed once, and tells that of every stretch of it.

    Args:
        first: of the first string.
        other: of the second one, or of both.
        second_length: bytes of the second one.
    """
    return _times(_shift(second_length), first) ^ other


def text(crc: int) -> str:
    """A CRC-32 as S3 writes it: base64 of its four bytes, the highest first."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
