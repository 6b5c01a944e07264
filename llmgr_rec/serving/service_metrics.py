"""What Prometheus reads of the service."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from llmgr_rec.serving.served_models import ServedModels

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SESSIONS = (1, 2, 4, 8, 16, 32, 64, 128)


class ServiceMetrics:
    """Counters of one service; several may live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "llmgr_requests", "Requests by path and HTTP status.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "llmgr_request_seconds",
            "Time from the head of a request to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_sessions = Histogram(
            "llmgr_batch_sessions",
            "Sessions that were ranked together.",
            ["model"],
            buckets=_SESSIONS,
            registry=self.registry,
        )
        self.reloads = Counter(
            "llmgr_reloads", "Times that new models were loaded or refused.", ["result"], registry=self.registry
        )
        self._models = Gauge(
            "llmgr_model_info",
            "1 for each loaded model, with the version of its bundle.",
            ["model", "stage", "version"],
            registry=self.registry,
        )
        self._items = Gauge("llmgr_items", "Items of the catalog.", registry=self.registry)

    def show(self, models: ServedModels) -> None:
        """Puts the loaded models in place of those before.

        Args:
            models: What was loaded.
        """
        self._models.clear()
        for served in models.models.values():
            self._models.labels(served.name, served.stage, served.version).set(1)
        self._items.set(len(models.default.model.item_ids))

    def text(self) -> bytes:
        """All values in the text format of Prometheus."""
        return generate_latest(self.registry)
