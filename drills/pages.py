"""Pages of metrics, read."""

from __future__ import annotations


def sum_of(page: str, name: str, **labels: str) -> float:
    """The sum of a metric's series that have these labels, on a page of metrics."""
    total = 0.0
    for line in page.splitlines():
        key, _, value = line.rpartition(" ")
        if key.partition("{")[0] == name and all(f'{label}="{text}"' in key for label, text in labels.items()):
            total += float(value)
    return total
