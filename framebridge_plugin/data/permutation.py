"""A shuffle of millions of rows that needs no memory: any position of it is computed on its own."""

from __future__ import annotations

from framebridge_plugin.randomness import derive_seed

_ROUNDS = 4
_LEAST_BITS = 8
_MASK_64 = (1 << 64) - 1


class KeyedPermutation:
    """A permutation of 0 ... size - 1 that is a function of a key, such as `(seed, epoch)`.

    A Feistel network of four rounds permutes the smallest range of 4^k numbers that holds `size` (at least 256, since
    networks of few bits are not uniform); a number outside `size` is permuted again until it falls inside (cycle
    walking).
    """

    def __init__(self, size: int, *key: int | str) -> None:
        self.size = size
        self._half_bits = max((size - 1).bit_length() + 1, _LEAST_BITS) // 2
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = [derive_seed("permutation", *key, number) for number in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of a permutation of {self.size}")
        value = self._permute(position)
        while value >= self.size:
            value = self._permute(value)
        return value

    def index(self, value: int) -> int:
        """The position of an element."""
        if not 0 <= value < self.size:
            raise ValueError(f"{value} is not in a permutation of {self.size}")
        position = self._permute_back(value)
        while position >= self.size:
            position = self._permute_back(position)
        return position

    def _permute(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return left << self._half_bits | right

    def _permute_back(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in reversed(self._round_keys):
            left, right = right ^ (_mix(left ^ key) & self._half_mask), left
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """Spreads every bit of a number over all 64 (the finaliser of MurmurHash3, public domain)."""
    value &= _MASK_64
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & _MASK_64
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 & _MASK_64
    return value ^ value >> 33
