"""The text of a scrape, made by ``prometheus_client``, but no line of it twice for as long as it stays the same.

What is told is read anew for every page; only its text is kept. So no page can be out of date: a line belongs to a
sample, with its value and exemplar, and another value is another line.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeAlias

from prometheus_client import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

MAX_FORMATS = 4
"""Formats of which lines are kept, the last ones asked for: whoever asks names the version, and could name any."""

_Key: TypeAlias = "tuple[Hashable, ...]"


class Renderer:
    """Makes pages. Not thread-safe."""

    def __init__(self) -> None:
        self._formats: dict[str, _Format] = {}

    def render(self, collector: Collector, accept_header: str | None) -> tuple[str, bytes]:
        """The page of a scrape, as the scraper wants it: OpenMetrics with exemplars, or Prometheus' classic text.

        Args:
            collector: what to show.
            accept_header: the request's ``Accept``, if it has one.

        Returns:
            The content type, which says all that tells formats apart, and the page.
        """
        encoder, content_type = _chosen(accept_header or "")
        format_ = self._formats.pop(content_type, None) or _Format(encoder)
        self._formats[content_type] = format_
        if len(self._formats) > MAX_FORMATS:
            del self._formats[next(iter(self._formats))]
        return content_type, format_.page(collector.collect())


class _Format:
    """Lines and heads of one format. Both text formats have a line for every sample, in order, and heads with ``#``."""

    def __init__(self, encode: Callable[[Collector], bytes]) -> None:
        self._encode = encode
        self._heads: dict[str, str] = {}
        self._lines: dict[_Key, str] = {}
        self._end = self._text([])

    def page(self, families: Iterable[Family]) -> bytes:
        told = [(family, [_key(sample) for sample in family.samples]) for family in families]
        self._learn(told)
        parts: list[str] = []
        for family, keys in told:
            parts.append(self._heads[family.name])
            parts.extend(map(self._lines.__getitem__, keys))
        parts.append(self._end)
        if len(self._lines) > 2 * len(parts):
            self._lines = {key: self._lines[key] for _, keys in told for key in keys}
        return "".join(parts).encode("utf-8")

    def _learn(self, told: list[tuple[Family, list[_Key]]]) -> None:
        """Have the text made of what has none yet."""
        new: list[_Key] = []
        families: list[Family] = []
        for family, keys in told:
            if family.name not in self._heads:
                self._heads[family.name] = self._text([_like(family, [])]).removesuffix(self._end)
            unknown = {key: sample for key, sample in zip(keys, family.samples, strict=True) if key not in self._lines}
            if unknown:
                new.extend(unknown)
                families.append(_like(family, list(unknown.values())))
        if new:
            lines = (line for line in self._text(families).split("\n") if line and not line.startswith("#"))
            self._lines.update((key, f"{line}\n") for key, line in zip(new, lines, strict=True))

    def _text(self, families: list[Family]) -> str:
        return self._encode(_Given(families)).decode("utf-8")


def _chosen(accept_header: str) -> tuple[Callable[[Collector], bytes], str]:
    try:
        return choose_encoder(accept_header)
    except (TypeError, ValueError):  # of a version that is no number; whoever asks so gets what everybody can read
        return choose_encoder("")


class _Given(Collector):
    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Family]:
        return iter(self._families)


def _like(family: Family, samples: list[Sample]) -> Family:
    other = Family(family.name, family.documentation, family.type, family.unit)
    other.samples = samples
    return other


def _key(sample: Sample) -> _Key:
    """All that is in a line."""
    name, labels, value, timestamp, exemplar = sample[:5]
    seen = (*exemplar.labels.items(), exemplar.value, exemplar.timestamp) if exemplar is not None else None
    return (name, value, timestamp, seen, *labels, *labels.values())
