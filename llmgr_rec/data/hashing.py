"""Stateless pseudo-random numbers: hashes of row, seed and epoch, equal on all ranks and in all worker processes."""

import numpy as np
from numpy.typing import NDArray


def hash_ints(numbers: NDArray[np.int64], *salts: int) -> NDArray[np.uint64]:
    """Hashes integers to 64 pseudo-random bits (splitmix64; Steele et al., OOPSLA 2014).

    Args:
        numbers: Integers, hashed element by element.
        salts: Seed, epoch and the like; different salts give independent hashes.

    Returns:
        Hashes, uint64, of the shape of `numbers`.
    """
    mixed = numbers.astype(np.uint64)
    for salt in (0, *salts):
        mixed = mixed + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) % (1 << 64))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
