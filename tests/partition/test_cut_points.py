"""Cut points: every array whole in one memory, no hole between the parts, the same parameters on every rank."""

from hypothesis import given
from hypothesis import strategies as st

from partition.blob_spec import BlobArray
from partition.cut_points import cut_points
from partition.layout import blob_layout

WIDTHS = st.lists(
    st.tuples(st.booleans(), st.lists(st.integers(0, 40_000), min_size=3, max_size=3)), min_size=1, max_size=12
)


def blob(parameters, rank):
    """Of each parameter one array, or codes and scales."""
    arrays = []
    for number, (encoded, sizes) in enumerate(parameters):
        for part, size in (("codes", sizes[rank]), ("scales", sizes[rank] // 8)) if encoded else (("", sizes[rank]),):
            arrays.append(BlobArray(parameter=f"p{number}", encoding="int8", part=part, dtype="uint8", shape=(size,)))
    return arrays


@given(parameters=WIDTHS, num_ranks=st.integers(1, 3))
def test_a_cut_parts_no_array_and_loses_no_byte(parameters, num_ranks):
    blobs = [blob(parameters, rank) for rank in range(num_ranks)]
    before = -1
    for cut in cut_points(blobs):
        for rank, arrays in enumerate(blobs):
            offsets, length = blob_layout([array.num_bytes for array in arrays])
            kept, start = cut.kept_bytes[rank], cut.streamed_from[rank]
            assert kept % 4096 == start % 4096 == 0
            assert 0 <= start <= kept <= start + 4096
            assert kept < length
            ends = [offset + array.num_bytes for array, offset in zip(arrays, offsets, strict=True)]
            assert all(end <= kept or offset >= start for offset, end in zip(offsets, ends, strict=True))
        assert sum(cut.streamed_from) > before
        before = sum(cut.streamed_from)


def test_codes_and_scales_are_not_parted():
    arrays = blob([(True, [81_920]), (True, [81_920])], 0)
    (cut,) = cut_points([arrays])
    assert cut.streamed_from == (81_920 + 10_240 - 2048,)  # the page that holds the end of the first one's scales


def test_small_gains_are_no_cuts():
    """Norms between the matrices would only add levels to search."""
    sizes = [100_000, 512, 512, 512, 100_000, 512]
    arrays = blob([(False, [size]) for size in sizes], 0)
    cuts = cut_points([arrays])
    assert [cut.kept_bytes[0] // 100_000 for cut in cuts] == [1]


def test_ranks_keep_the_same_parameters():
    """The first rank's second parameter ends far before the second's: cut by parameter, not by byte."""
    blobs = [blob([(False, [8192, 40_960])] * 3, rank) for rank in range(2)]
    assert [(cut.kept_bytes, cut.streamed_from) for cut in cut_points(blobs)] == [
        ((8192, 40_960), (8192, 40_960)),
        ((16_384, 81_920), (16_384, 81_920)),
    ]
