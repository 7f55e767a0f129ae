"""FAULTS T15 to T17: reads that fail, come up short or never end under a model that serves. strace does it for real."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_now_and_then_an_input_output_error_changes_no_token(serving, injected):
    """T15: the reader tries again, and counts it."""
    serving.open(offload={"verify": "always"})
    with injected(serving.process.pid, "error=EIO:when=5+5") as strace:
        answer = serving.generate()
    assert answer["tokens"] == [tokens[: serving.max_tokens] for tokens in serving.golden]
    assert answer["num_read_retries"] > 0
    assert strace.num_injected >= answer["num_read_retries"]  # reads ahead for the next pass may meet one too


def test_a_disk_that_stays_broken_ends_the_run_and_gives_nothing_out(serving, injected):
    """T15: every request ends with the file's name; nothing computed from a bad unit is answered; then all is well."""
    serving.open()
    with injected(serving.process.pid, "error=EIO:when=40+") as strace:
        answer = serving.generate()
        refused = serving.generate()
    assert strace.num_injected >= 3
    assert (answer["error"], answer["exit_code"]) == ("ClusterError", 4)
    assert "Input/output error" in answer["text"]
    assert str(serving.directory) in answer["text"]
    assert all(len(tokens) < serving.max_tokens for tokens in answer["tokens"])
    serving.assert_prefix_of_golden(answer["tokens"])
    assert "takes no requests" in refused["text"]
    serving.open()
    assert serving.generate()["tokens"] == [tokens[: serving.max_tokens] for tokens in serving.golden]


def test_a_read_that_claims_bytes_it_did_not_bring(serving, injected):
    """T16: a short direct read goes on from an aligned byte; slots are NaN before each read, so a hole would show."""
    serving.open(offload={"verify": "always"})
    with injected(serving.process.pid, "retval=100:when=4+4") as strace:
        answer = serving.generate()
    assert strace.num_injected > 0
    assert answer["tokens"] == [tokens[: serving.max_tokens] for tokens in serving.golden]


@pytest.mark.parametrize("verify", ["always", "never"])
def test_short_reads_with_garbage_behind_them_are_completed(serving, verify):
    """T16: a third of the reads' bytes are garbage at first. All blobs' checksums hold, and so do all tokens."""
    serving.open(offload={"verify": verify})
    serving.process.short_reads.touch()
    answer = serving.generate(8)
    num_short = serving.process.short_reads.stat().st_size
    assert num_short > 8 * len(serving.streamed)
    assert answer["tokens"] == [tokens[:8] for tokens in serving.golden]
    assert (answer["num_verified"] > 0) == (verify == "always")


def test_a_read_that_never_ends_meets_its_deadline(serving, injected):
    """T17: the request ends with the file's name, and closing does not wait for the disk for ever."""
    serving.open(engine={"step_timeout": "2 s"})
    with injected(serving.process.pid, "delay_enter=8000000:when=30+"):
        answer = serving.generate()
    assert answer["exit_code"] == 4
    assert "was not done after 2 s" in answer["text"] or "did not finish within 2 s" in answer["text"]
    serving.assert_prefix_of_golden(answer["tokens"])
    serving.open()
    assert serving.generate()["tokens"] == [tokens[: serving.max_tokens] for tokens in serving.golden]
