"""Who owns which block of the KV cache. Ids only: the tensors are the ranks'."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

from partition.errors import ConfigError


class KVBlockManager:
    """Hands out block ids [0, num_blocks), in runs of consecutive ids where it can. A block may have several owners.

    Consecutive blocks let attention on a CPU take a view of the cache in place of a gathered copy. So an owner's next
    block is the one after its last, else the lowest run that is long enough, else the longest runs there are.
    Used by the engine's thread alone.
    """

    def __init__(self, *, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ConfigError(f"the KV cache needs at least 1 block of 1 token, not {num_blocks} of {block_tokens}")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free_runs: list[tuple[int, int]] = [(0, num_blocks)]  # half-open, sorted, never touching each other
        self._num_free = num_blocks
        self._owned: dict[str, list[int]] = {}
        self._num_more_owners: dict[int, int] = {}  # of blocks with more than one

    @property
    def num_free(self) -> int:
        return self._num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_tokens)

    def can_allocate(self, count: int) -> bool:
        return count <= self._num_free

    def allocate(self, owner: str, count: int) -> list[int]:
        """`count` more blocks for the owner, in the order of its tokens. RuntimeError when `can_allocate` is false."""
        if not self.can_allocate(count):
            raise RuntimeError(f"{count} KV blocks asked for {owner!r}, {self._num_free} free: ask can_allocate first")
        owned = self._owned.setdefault(owner, [])
        taken: list[int] = []
        if owned:
            index = bisect_left(self._free_runs, (owned[-1] + 1,))
            if index < len(self._free_runs) and self._free_runs[index][0] == owned[-1] + 1:
                taken += self._take(index, count)
        while len(taken) < count:
            taken += self._take(self._best_run(count - len(taken)), count - len(taken))
        owned += taken
        return taken

    def share(self, owner: str, origin: str, count: int) -> list[int]:
        """The first `count` blocks of `origin`, now those of an owner without any, too. Nobody may write there."""
        blocks = self._owned.get(origin, [])[:count]
        if owner in self._owned or len(blocks) < count:
            raise RuntimeError(f"{count} KV blocks of {origin!r} ({len(blocks)} there) cannot be shared by {owner!r}")
        for block in blocks:
            self._num_more_owners[block] = self._num_more_owners.get(block, 0) + 1
        self._owned[owner] = list(blocks)
        return blocks

    def free(self, owner: str) -> None:
        """All blocks of the owner, but for those that others own, too; nothing when it has none."""
        for block in sorted(self._owned.pop(owner, ())):
            more = self._num_more_owners.pop(block, 0)
            if more == 0:
                self._give_back(block)
            elif more > 1:
                self._num_more_owners[block] = more - 1

    def integrity(self) -> None:
        """Raises RuntimeError unless every block is either free or owned, by as many as are known to own it."""
        if not self._owned and self._free_runs == [(0, self.num_blocks)] and self._num_free == self.num_blocks:
            return  # idle: the common case, at no cost
        free = [block for start, end in self._free_runs for block in range(start, end)]
        used = [block for blocks in self._owned.values() for block in set(blocks)]
        more = {block: count - 1 for block, count in Counter(used).items() if count > 1}
        if more != self._num_more_owners or any(len(set(blocks)) != len(blocks) for blocks in self._owned.values()):
            raise RuntimeError(f"KV blocks: {more} have more owners than one, {self._num_more_owners} counted")
        if len(free) != self._num_free:
            raise RuntimeError(f"KV blocks: {len(free)} in the free runs, {self._num_free} counted")
        if sorted([*free, *set(used)]) != list(range(self.num_blocks)):
            raise RuntimeError(f"KV blocks: {len(free)} free + {len(set(used))} used != {self.num_blocks}")

    def owners(self) -> dict[str, tuple[int, ...]]:
        """A copy, for integrity checks."""
        return {owner: tuple(blocks) for owner, blocks in self._owned.items()}

    def _best_run(self, count: int) -> int:
        longest = 0
        for index, (start, end) in enumerate(self._free_runs):
            if end - start >= count:
                return index
            if end - start > self._free_runs[longest][1] - self._free_runs[longest][0]:
                longest = index
        return longest

    def _take(self, index: int, count: int) -> range:
        start, end = self._free_runs[index]
        cut = min(start + count, end)
        if cut == end:
            del self._free_runs[index]
        else:
            self._free_runs[index] = (cut, end)
        self._num_free -= cut - start
        return range(start, cut)

    def _give_back(self, block: int) -> None:
        start, end = block, block + 1
        index = bisect_left(self._free_runs, (start,))
        if index < len(self._free_runs) and self._free_runs[index][0] == end:
            end = self._free_runs.pop(index)[1]
        if index > 0 and self._free_runs[index - 1][1] == start:
            start = self._free_runs.pop(index - 1)[0]
        insort(self._free_runs, (start, end))
        self._num_free += 1
