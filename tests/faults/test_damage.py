"""FAULTS T13, T18: the store's files change under a model that serves. A typed error or the right answer, no SIGBUS."""

from __future__ import annotations

import os

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_a_file_cut_off_while_serving_is_a_typed_error(serving):
    """T18: no SIGBUS (the process goes on), no output from what is not there; with the file back all is well."""
    serving.open()
    blob = serving.blob(serving.streamed[-2])
    content = blob.read_bytes()
    answer = serving.generate_and(lambda: os.truncate(blob, 100))
    assert (answer["error"], answer["exit_code"]) == ("ClusterError", 4)
    assert str(blob) in answer["text"]
    serving.assert_prefix_of_golden(answer["tokens"])
    blob.write_bytes(content)
    serving.open()
    assert serving.generate()["tokens"] == [tokens[: serving.max_tokens] for tokens in serving.golden]


def test_a_file_replaced_while_serving_is_not_mixed_in(serving):
    """T18: who has the old file open goes on with it; who starts later finds the new one damaged."""
    serving.open()
    blob = serving.blob(serving.streamed[-2])
    other = blob.with_name("other")
    other.write_bytes(os.urandom(blob.stat().st_size))
    answer = serving.generate_and(lambda: other.rename(blob))
    assert answer["tokens"] == serving.golden
    serving.open()
    assert "is damaged: its checksum is" in serving.generate()["text"]


@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_file_written_over_while_serving_is_a_typed_error(serving, verify):
    """T18: same size, other bytes, in place; also where later reads are not compared with the checksum."""
    serving.open(offload={"verify": verify})
    blob = serving.blob(serving.streamed[-2])

    def write_over():
        with open(blob, "r+b") as file:
            file.write(os.urandom(blob.stat().st_size))

    answer = serving.generate_and(write_over)
    assert answer["exit_code"] == 4
    assert f"{blob} was written to while it is in use" in answer["text"]
    serving.assert_prefix_of_golden(answer["tokens"])


def test_a_flipped_bit_under_an_old_time_is_found_by_always(serving):
    """T13: as a failing disk changes bits, without a new time of the last write."""
    serving.open(offload={"verify": "always"})
    blob = serving.blob(serving.streamed[-2])

    def flip():
        before = blob.stat()
        with open(blob, "r+b") as file:
            file.seek(-5000, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))

    answer = serving.generate_and(flip)
    assert answer["exit_code"] == 4
    assert f"unit '{serving.streamed[-2]}' in {blob} is damaged" in answer["text"]
    serving.assert_prefix_of_golden(answer["tokens"])
