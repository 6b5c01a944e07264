"""Loads the models of a run again when its bundles change, while those before go on answering."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from llmgr_rec.errors import UserError
from llmgr_rec.serving.served_models import ServedModels, bundle_version, served_bundles
from llmgr_rec.serving.service_metrics import ServiceMetrics

logger = logging.getLogger(__name__)


class ModelWatch:
    """Holds the models that answer, and looks for new ones.

    Args:
        run: A run, or a bundle.
        load: Loads its models.
        metrics: Shows what is loaded.

    Attributes:
        models: The models that answer now. A request takes them once, so that a reload does not disturb it.

    Raises:
        UserError: The models cannot be loaded.
    """

    def __init__(self, run: Path, load: Callable[[], ServedModels], metrics: ServiceMetrics) -> None:
        self._run, self._load, self._metrics = run, load, metrics
        self._seen = self._versions()
        self.models = load()
        metrics.show(self.models)

    async def follow(self, every_s: float) -> None:
        """Looks for new models for ever.

        Args:
            every_s: Seconds between two looks.
        """
        while True:
            await asyncio.sleep(every_s)
            await self.look()

    async def look(self) -> None:
        """Loads the models if the bundles have changed. Those that cannot be loaded are refused once, in the log."""
        try:
            versions = await asyncio.to_thread(self._versions)
        except (UserError, OSError):
            # A bundle that is being replaced is absent for a moment.
            return
        if versions == self._seen:
            return
        self._seen = versions
        try:
            self.models = models = await asyncio.to_thread(self._load)
        except Exception as error:
            self._metrics.reloads.labels("refused").inc()
            has_cause = not isinstance(error, UserError)
            logger.error("new models are not loaded, those before go on answering: %s", error, exc_info=has_cause)
            return
        self._metrics.show(models)
        self._metrics.reloads.labels("loaded").inc()
        logger.info("loaded new models: %s", ", ".join(f"{one.name} {one.version}" for one in models.models.values()))

    def _versions(self) -> dict[str, str]:
        """Version of each bundle by its folder."""
        return {str(bundle.resolve()): bundle_version(bundle) for bundle in served_bundles(self._run).values()}
