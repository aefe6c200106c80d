"""Which values are model ids, and how they are spelled."""

from __future__ import annotations

import uuid

import pytest

from flip_observability.utils import Utils, canonical_uuid, is_string_empty, is_valid_uuid, printable

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"


@pytest.mark.parametrize(
    "spelling",
    [
        MODEL,
        MODEL.upper(),
        MODEL.replace("-", ""),
        "{" + MODEL.upper() + "}",
        f"urn:uuid:{MODEL}",
        uuid.UUID(MODEL),
    ],
)
def test_every_spelling_of_a_uuid_is_accepted_and_made_canonical(spelling: object) -> None:
    assert is_valid_uuid(spelling)
    assert canonical_uuid(spelling) == MODEL


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        None,
        0,
        b"",
        [],
        "../x",
        "simulate_job",
        MODEL + "0",
        MODEL[:-1],
        "x" * 10_240,
        MODEL * 300,
        Unprintable(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_no_uuid_and_raises_nothing(value: object) -> None:
    assert not is_valid_uuid(value)
    assert canonical_uuid(value) is None


@pytest.mark.parametrize("value", ["", " ", "\t\n", None, 7])
def test_an_empty_string(value: object) -> None:
    assert is_string_empty(value)


@pytest.mark.parametrize("value", ["a", " a "])
def test_a_string_that_is_not_empty(value: str) -> None:
    assert not is_string_empty(value)


def test_the_functions_are_also_static_methods_of_utils() -> None:
    assert Utils.is_valid_uuid(MODEL)
    assert Utils().canonical_uuid(MODEL.upper()) == MODEL
    assert Utils.is_string_empty("")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("AccessDenied", "AccessDenied"),
        ("größe", "größe"),
        ("a\nb\x1b[2J", "a\\nb\\x1b[2J"),
        ("\u202eevil\ud800", "\\u202eevil\\ud800"),
        ("x" * 50, "x" * 20 + "…"),
    ],
)
def test_a_foreign_text_is_a_part_of_one_line(text: str, shown: str) -> None:
    assert printable(text, 20) == shown
