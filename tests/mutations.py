"""Damage to files as storage, copies and editors do it, reproducible by a seed."""

import json
import random
from collections.abc import Callable
from typing import Any

# What a JSON value is replaced with.
OTHER_VALUES: list[Any] = [None, True, -1, 0, 10**30, 1.5, "", "x", "../x", [], [0], [[]], {}, {"x": 1}]


def mutate(content: bytes, seed: int) -> bytes:
    """A damaged copy of the content of a file.

    Args:
        content: The content; of JSON files, values are changed as well.
        seed: Which damage. The kinds of damage follow each other.
    """
    rng = random.Random(seed)
    kinds: list[Callable[[bytes, random.Random], bytes]] = [_flip_bit, _other_bytes, _truncate, _cut_out]
    if content.lstrip().startswith(b"{"):
        kinds += [_other_value, _swap_values, _remove_value]
    return kinds[seed % len(kinds)](content, rng)


def _flip_bit(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _other_bytes(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    length = rng.randrange(1, 17)
    return content[:start] + rng.randbytes(length) + content[start + length :]


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _cut_out(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randrange(1, 65) :]


def _other_value(content: bytes, rng: random.Random) -> bytes:
    values = json.loads(content)
    owner, key = rng.choice(_places(values))
    owner[key] = rng.choice(OTHER_VALUES)
    return json.dumps(values).encode()


def _swap_values(content: bytes, rng: random.Random) -> bytes:
    values = json.loads(content)
    (owner, key), (other, other_key) = rng.choice(_places(values)), rng.choice(_places(values))
    owner[key], other[other_key] = json.loads(json.dumps([other[other_key], owner[key]]))
    return json.dumps(values).encode()


def _remove_value(content: bytes, rng: random.Random) -> bytes:
    values = json.loads(content)
    owner, key = rng.choice(_places(values))
    del owner[key]
    return json.dumps(values).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each container in a JSON value with each of its keys."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    inner = [place for key in keys if isinstance(value[key], dict | list) for place in _places(value[key])]
    return [(value, key) for key in keys] + inner
