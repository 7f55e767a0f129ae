"""A scrape's text as samples: what this project itself writes, and nothing more of the format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

Labels = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Scraped:
    """at_s: when it came, of one clock. samples: by name, (labels, value)."""

    at_s: float
    samples: Mapping[str, tuple[tuple[Labels, float], ...]] = field(default_factory=dict)

    def values(self, name: str, **labels: str) -> list[float]:
        """Of all samples with these labels, whatever others they have."""
        return [value for found, value in self.samples.get(name, ()) if labels.items() <= found.items()]

    def sum(self, name: str, **labels: str) -> float:
        return math.fsum(self.values(name, **labels))

    def labels(self, name: str, **labels: str) -> list[Labels]:
        """Of the samples that are 1: how infos and phases are written."""
        return [found for found, value in self.samples.get(name, ()) if value == 1 and labels.items() <= found.items()]

    def buckets(self, name: str) -> list[tuple[float, float]]:
        """(upper bound, values up to it) of a histogram, ascending."""
        return sorted((float(found["le"]), value) for found, value in self.samples.get(f"{name}_bucket", ()))


def read_scrape(text: str, at_s: float) -> Scraped:
    """ValueError for a text that is no scrape."""
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, float(sample.value)))
    return Scraped(at_s=at_s, samples={name: tuple(samples) for name, samples in found.items()})
