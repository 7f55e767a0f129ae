"""Hardware files: what is written is taken, what is not is named as assumed, what is wrong is refused."""

import pytest

from partition.errors import ConfigError
from partition.hardware import load_hardware

GOOD = """
network_per_s: 10 GB
nodes:
  - name: big
    count: 3
    cores: 64
    memory: 512 GiB
    disk_per_s: 6 GB
    flops: 4e12
    memory_per_s: 300 GB
    layer_overhead_s: 0.0004
    devices:
      - {name: H100, count: 8, memory: 80 GiB, link_per_s: 50 GB, flops: 4.0e+14, memory_per_s: 3 TB}
  - {name: small, cores: 2, memory: 8 GiB}
"""


def write(tmp_path, text):
    path = tmp_path / "hardware.yaml"
    path.write_text(text)
    return path


def test_a_good_file(tmp_path):
    facts = load_hardware(write(tmp_path, GOOD))
    assert [node.name for node in facts.nodes] == ["big-0", "big-1", "big-2", "small"]
    big, small = facts.nodes[0], facts.nodes[3]
    assert (big.memory_bytes, big.disk_bytes_per_s, big.flops) == (512 << 30, 6e9, 4e12)
    assert len(big.devices) == 8
    assert (big.devices[0].memory_bytes, big.devices[0].flops) == (80 << 30, 4e14)
    assert (big.layer_overhead_s, small.layer_overhead_s) == (0.0004, None)
    assert big.assumed == ()
    assert small.assumed == ("disk_per_s", "flops", "memory_per_s")
    assert small.memory_source == "hardware.yaml"
    assert facts.network_bytes_per_s == 10e9


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nodes: [{name: a, cores: 2, memroy: 8 GiB}]", "unknown key 'memroy'; did you mean 'memory'"),
        ("nodes: [{name: a, cores: 2}]", "'memory' is missing"),
        ("nodes: [{name: a, memory: 8 GiB}]", "'cores' is missing"),
        ("nodes: [{name: a, cores: 0, memory: 8 GiB}]", "'cores' must be"),
        ("nodes: [{name: a, cores: 2, memory: lots}]", "'lots' is not a size"),
        ("nodes: [{name: a, cores: 2, memory: [8]}]", "memory"),
        ("nodes: [{name: a, cores: 2, memory: 8 GiB, disk_per_s: 0}]", "more than 0"),
        ("nodes: [{name: a, cores: 2, memory: 8 GiB, flops: fast}]", "'flops' must be a number"),
        ("nodes: [{name: a, cores: 2, memory: 8 GiB, layer_overhead_s: -1}]", "'layer_overhead_s' must be a number"),
        ("nodes: [{name: a, cores: 2, cores: 3, memory: 8 GiB}]", "'cores' is there twice"),
        ("nodes: [{name: a, cores: 2, memory: 1 GiB}, {name: a, cores: 2, memory: 1 GiB}]", "same name"),
        ("nodes: []", "at least one node"),
        ("nodes: {a: 1}", "must be a list"),
        ("- 1", "expected keys"),
        ("nodes: [", "not YAML"),
        ("nodes: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        load_hardware(write(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_hardware(tmp_path / "none.yaml")
