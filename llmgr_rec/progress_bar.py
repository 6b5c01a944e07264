"""A progress bar on a terminal; where there is none, lines of the log."""

import logging
import time
from typing import Any

from tqdm import tqdm

from llmgr_rec.durations import in_words

# Seconds between two lines.
LOG_LINE_SECONDS = 30.0

logger = logging.getLogger(__name__)


class ProgressBar(tqdm):
    """A bar of tqdm that logs the progress of long work if it is disabled.

    Args:
        log_lines: Whether to log.
        **options: Those of tqdm.
    """

    def __init__(self, *, log_lines: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._logs = log_lines and bool(self.disable)
        self._title, self._unit = options.get("desc"), options.get("unit")
        self._first = self.n
        self._began = self._last = time.monotonic()

    def update(self, n: float | None = 1) -> bool | None:
        """Counts units that are done, and shows or logs it."""
        if not self._logs:
            return super().update(n)
        self.n += n or 0
        now = time.monotonic()
        if now - self._last >= LOG_LINE_SECONDS:
            self._last = now
            self._log(now - self._began)
        return None

    def _log(self, seconds: float) -> None:
        done, total = self.n - self._first, self.total
        if not total or not done:
            logger.info("%s: %d %ss", self._title, self.n, self._unit)
            return
        left = in_words(seconds / done * max(total - self.n, 0))
        logger.info("%s: %d of %d %ss, %s left", self._title, self.n, total, self._unit, left)
