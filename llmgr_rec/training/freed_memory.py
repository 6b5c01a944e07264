"""Memory that was freed: kept for the next step or batch, and returned to the system after the last one."""

import ctypes

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENAS = -1, -3, -8
# The largest value that glibc accepts: larger blocks are mapped one by one.
_LARGEST_FROM_HEAP = 32 << 20
_MOST_KEPT = 128 << 20


def share_freed_memory() -> None:
    """Lets all threads take memory from one heap, so that what a thread has freed is there for the others.

    By default glibc gives each thread a heap of its own, and every thread that reads a file or makes a batch leaves
    some MB in its heap. To be called before there are such threads. Another C library stays as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENAS, 1)


def keep_freed_memory() -> None:
    """Lets glibc keep up to 128 MiB of freed memory, and take blocks of up to 32 MiB from it.

    A step or a batch allocates and frees tensors of many MiB. By default glibc returns them to the system, which then
    clears each page again: a tenth of a step of the default recipe. Another C library stays as it is.
    """
    # None on other systems than Linux, or of another C library.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def return_freed_memory() -> None:
    """Returns freed memory to the system, where the C library can: glibc.

    What a phase leaves, some 100 MB in pieces between small objects that stay, would add to the peak of the next phase,
    whose tensors have other sizes.
    """
    # Not when this module is imported: commands share freed memory before they import other libraries.
    import pyarrow as pa

    # Arrow has an allocator of its own.
    pa.default_memory_pool().release_unused()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
