"""Durations in words."""


def in_words(seconds: float) -> str:
    """A duration in the unit that suits it.

    Args:
        seconds: The duration.

    >>> [in_words(seconds) for seconds in (0.0123, 6.34, 95, 99.9, 1800, 12345, 400000)]
    ['about 12 ms', 'about 6.3 s', 'about 95 s', 'about 2 min', 'about 30 min', 'about 3.4 h', 'about 111 h']
    """
    if seconds < 1:
        return f"about {1000 * seconds:.0f} ms"
    if seconds < 99.5:
        return f"about {seconds:.2g} s"
    if seconds < 6000:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.3g} h" if seconds >= 36_000 else f"about {seconds / 3600:.2g} h"
