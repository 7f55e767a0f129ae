"""The keys that choose nodes and interfaces: refused where they would do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from dist_infer import load_config
from dist_infer.errors import ConfigError


def cluster(**keys: Any) -> Any:
    return load_config({"model": {"path": "/m"}, "cluster": keys}).cluster


def test_nodes_are_chosen_by_labels_and_resources() -> None:
    found = cluster(
        executor="ray", address="auto", node_labels={"zone": "a"}, node_resources={"llm": 1}, interface="eth1"
    )
    assert (found.node_labels, found.node_resources, found.interface) == ({"zone": "a"}, {"llm": 1}, "eth1")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"interface": "eth1"}, "needs cluster.executor: ray"),
        ({"executor": "ray", "node_labels": {"zone": "a"}}, "set cluster.address"),
        ({"executor": "ray", "node_resources": {"llm": 1}}, "set cluster.address"),
        ({"executor": "ray", "address": "auto", "node_resources": {"CPU": 4}}, "takes its CPU or GPU anyway"),
        ({"executor": "ray", "address": "auto", "node_resources": {"llm": 0}}, "greater than 0"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cluster(**keys)
