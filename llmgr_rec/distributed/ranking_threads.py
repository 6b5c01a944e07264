"""How many threads rank sessions: no more than shorten the work."""

import os
from dataclasses import replace

from llmgr_rec.config import Config, RuntimeConfig
from llmgr_rec.distributed.process_group import launched_world, usable_cores

# Floating-point operations of a batch for each thread: below, starting and waiting takes longer than a thread saves.
_FLOPS_PER_THREAD = 1 << 29


def ranking_runtime(
    config: Config, threads: int | None, num_items: int, has_language_model: bool, batch_size: int | None = None
) -> RuntimeConfig:
    """The runtime settings of a command that ranks sessions.

    Without a language model, most of the work is the product of a batch with all item vectors. Where it is small, one
    thread is faster than several, and reading and writing have the other cores.

    Args:
        config: Settings of the run.
        threads: Threads of each rank that the user asks for; None takes `runtime.threads_per_rank` or OMP_NUM_THREADS
            where they are given, and otherwise as many as the work is worth.
        num_items: Items of the catalog.
        has_language_model: Whether a language model encodes sessions, for which every core is worth it.
        batch_size: Sessions of a batch; None takes that of the settings.
    """
    runtime = config.runtime
    if threads is None and (runtime.threads_per_rank or has_language_model or "OMP_NUM_THREADS" in os.environ):
        return runtime
    if threads is None:
        flops = 2 * (batch_size or runtime.eval_batch_size) * num_items * config.tables.dim
        cores = usable_cores() // launched_world("cpu").local_size
        threads = max(1, min(cores, flops // _FLOPS_PER_THREAD))
    return replace(runtime, threads_per_rank=threads)
