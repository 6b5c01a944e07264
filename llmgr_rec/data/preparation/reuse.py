"""A data set that was prepared before from the same files with the same settings."""

from dataclasses import asdict

from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.preparation.source import Source
from llmgr_rec.result_cache import CachedResult

# Settings that change where and how fast a data set is made, but nothing in it.
_WITHOUT_EFFECT = {"output", "interactions", "sessions", "items", "memory_gb", "threads", "temp_folder", "spark_master"}


def cached_data_set(settings: PrepareSettings, clicks: Source, items: Source | None) -> CachedResult:
    """The data set of some settings and inputs in the cache of results.

    Args:
        settings: Settings of this run.
        clicks: The interactions or sessions.
        items: The items, if there is an item file.
    """
    sources = {"interactions" if settings.interactions else "sessions": clicks, "items": items}
    inputs = {
        "settings": {name: value for name, value in asdict(settings).items() if name not in _WITHOUT_EFFECT},
        "sources": {
            name: [len(source.files), source.types, source.partitions, source.description, source.domains]
            for name, source in sources.items()
            if source
        },
    }
    files = [file for source in sources.values() if source for file in source.files]
    paths = [str(path) for path in (settings.interactions, settings.sessions, settings.items) if path is not None]
    return CachedResult("data set", inputs, files, ("duckdb", "pyarrow", "numpy"), paths=paths)
