"""Two hosts with a Ray cluster across them; each has its own copy of a checkpoint and a disk of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces.cluster import Cluster, give_model
from namespaces.hosts import Hosts


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts"), 2) as made:
        yield made


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", vocab_size=640)


@pytest.fixture(scope="session")
def cluster(hosts: Hosts, tiny_model: Path) -> Cluster:
    give_model(hosts, tiny_model)
    made = Cluster(hosts)
    made.start()
    return made
