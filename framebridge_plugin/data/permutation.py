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
        while (position := self._permuted(position)) >= self.size:
            pass
        return position

    def index(self, value: int) -> int:
        """The position of an element."""
        if not 0 <= value < self.size:
            raise ValueError(f"{value} is not in a permutation of {self.size}")
        while (value := self._permuted(value, backwards=True)) >= self.size:
            pass
        return value

    def _permuted(self, value: int, backwards: bool = False) -> int:
        # Backwards are the same rounds in reverse, with the halves exchanged before and after them.
        step = -1 if backwards else 1
        first, second = (value >> self._half_bits, value & self._half_mask)[::step]
        for key in self._round_keys[::step]:
            first, second = second, first ^ (_mix(second ^ key) & self._half_mask)
        left, right = (first, second)[::step]
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """Spreads every bit of a number over all 64 (the finaliser of MurmurHash3, public domain)."""
    value &= _MASK_64
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & _MASK_64
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 & _MASK_64
    return value ^ value >> 33
