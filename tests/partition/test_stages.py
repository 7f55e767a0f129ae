"""The stage cut is the best one, and says so when there is none."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partition.errors import ConfigError
from partition.stages import cut_stages


@given(
    layers=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    embed=st.integers(0, 80),
    head=st.integers(0, 80),
    data=st.data(),
)
def test_no_cut_has_a_smaller_largest_stage(layers, embed, head, data):
    num_stages = data.draw(st.integers(1, len(layers)))

    def weights(cut):
        sums = [sum(layers[first:end]) for first, end in cut]
        sums[0] += embed
        sums[-1] += head
        return sums

    cuts = []
    for edges in itertools.combinations(range(1, len(layers)), num_stages - 1):
        cuts.append(tuple(itertools.pairwise((0, *edges, len(layers)))))
    best = min((max(weights(cut)), sum(w * w for w in weights(cut))) for cut in cuts)
    found = cut_stages(layers, embed_bytes=embed, head_bytes=head, num_stages=num_stages)
    assert found in cuts
    assert (max(weights(found)), sum(w * w for w in weights(found))) == best


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"pipeline is 4.*3 layers"):
        cut_stages([1, 1, 1], embed_bytes=0, head_bytes=0, num_stages=4)
