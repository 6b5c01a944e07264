"""Random-looking numbers that are a function of what they are for: no generator, no state, the same on every rank."""

import numpy as np
from numpy.typing import NDArray


def hash_ints(numbers: NDArray[np.int64], *salts: int) -> NDArray[np.uint64]:
    """Mixes integers into 64 bits that look random (splitmix64; Steele et al., OOPSLA 2014).

    Args:
        numbers: What is hashed, each by itself.
        salts: Seed, epoch and the like: others give other numbers.
    """
    mixed = numbers.astype(np.uint64)
    for salt in (0, *salts):
        mixed = mixed + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) % (1 << 64))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
