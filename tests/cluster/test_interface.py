"""Which address a machine talks by, without asking anybody."""

from __future__ import annotations

import psutil
import pytest

from dist_infer.interface import interface_of, own_address
from partition.errors import ClusterError, ConfigError


def test_by_itself_it_is_the_one_that_routes_to_the_other() -> None:
    assert own_address(None, towards="127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize("wanted", ["lo", "127.0.0.0/8", "127.0.0.1/32"])
def test_an_interface_or_a_network_may_be_named(wanted: str) -> None:
    """Names differ between machines, networks do not."""
    assert own_address(wanted, towards="10.255.255.1") == "127.0.0.1"


def test_what_is_not_there_is_refused_with_what_is() -> None:
    for wanted in ("eth99", "203.0.113.0/24"):
        with pytest.raises(ConfigError, match=rf"cluster\.interface: {wanted}, but .* has lo 127\.0\.0\.1"):
            own_address(wanted, towards="127.0.0.1")
    with pytest.raises(ConfigError, match="no network"):
        own_address("10.0.0.0/99", towards="127.0.0.1")


def test_no_route_is_an_error_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="no route to 300"):
        own_address(None, towards="300.1.1.1")
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    with pytest.raises(ClusterError, match=r"address 127\.0\.0\.1"):
        interface_of("127.0.0.1")
