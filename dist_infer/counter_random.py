"""Random numbers as pure functions of a counter: no generator, no state, the same on every rank and after a restart."""

from __future__ import annotations

SEED_BITS = 63
_MASK = (1 << 64) - 1
_SEED_MASK = (1 << SEED_BITS) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), from the pair."""
    state = _mixed(seed * 0x9E3779B97F4A7C15 + position * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15)
    return (state >> 11) / float(1 << 53)


def sample_seed(seed: int, index: int) -> int:
    """The seed, in [0, 2^63), of answer `index` to a request with this signed 64-bit seed; answer 0 has that itself.

    Mixed twice, so that no two answers' counters run in step with each other.
    """
    if index == 0:
        return seed & _SEED_MASK
    return _mixed(_mixed((seed & _SEED_MASK) + 0xA0761D6478BD642F) + index * 0x9E3779B97F4A7C15) & _SEED_MASK


def _mixed(state: int) -> int:
    """The output function of splitmix64 (Steele et al., 2014)."""
    state &= _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
