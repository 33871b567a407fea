"""Metrics for Prometheus: counted as things happen, or read from the service when it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .jobs import Job
from .service import Service

# Seconds: from a small image on a GPU to a large one on a CPU behind a queue.
JOB_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
HTTP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
# Methods by name in a label; others, which a client makes up, are one.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Metrics:
    """The metrics of one service, in a registry of its own."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._jobs = Counter("zimage_jobs", "Jobs that ended.", ("model", "state", "code"), registry=self._registry)
        self._images = Counter("zimage_images", "Images that were drawn.", ("model",), registry=self._registry)
        self._seconds = Histogram(
            "zimage_stage_seconds",
            "Seconds of finished jobs by stage; queue is the time before the first.",
            ("model", "stage"),
            buckets=JOB_BUCKETS,
            registry=self._registry,
        )
        self._flagged = Counter(
            "zimage_safety_flagged", "Jobs that the safety filter found unsafe.", ("model", "action"),
            registry=self._registry,
        )  # fmt: skip
        self._http = Histogram(
            "zimage_http_seconds",
            "Seconds of HTTP requests, to the end of their answers.",
            ("method", "route", "status"),
            buckets=HTTP_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(Live(service))

    def job_ended(self, job: Job) -> None:
        """Count a job that has ended."""
        code = "ok" if job.error is None else job.error["code"]
        self._jobs.labels(job.model, job.state, code).inc()
        if job.safety is not None and job.safety["action"] != "none":
            self._flagged.labels(job.model, job.safety["action"]).inc()
        if job.state != "done":
            return
        self._images.labels(job.model).inc(len(job.sizes))
        self._seconds.labels(job.model, "queue").observe((job.started or job.created) - job.created)
        for stage, seconds in job.timings.items():
            self._seconds.labels(job.model, stage).observe(seconds)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered; see `logs.OnAnswer`."""
        self._http.labels(method if method in METHODS else "other", route, str(status)).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class Live(Collector):
    """Metrics that are read from the service when it is asked."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`."""
        service = self._service
        running = sum(len(worker.running) for worker in service.workers)
        yield GaugeMetricFamily("zimage_queue_jobs", "Jobs that wait.", value=len(service.queue))
        yield GaugeMetricFamily("zimage_running_jobs", "Jobs that workers have.", value=running)
        yield GaugeMetricFamily("zimage_ready", "1 while a worker takes jobs.", value=int(service.is_ready))
        full = int(service.store.is_disk_full)
        yield GaugeMetricFamily("zimage_disk_full", "1 while the record cannot be written.", value=full)
        alive = GaugeMetricFamily("zimage_worker_up", "1 while a worker takes jobs.", labels=["device"])
        deaths = CounterMetricFamily("zimage_worker_deaths", "Deaths of workers.", labels=["device"])
        models = GaugeMetricFamily("zimage_model_loaded", "1 per model that a worker has.", labels=["device", "model"])
        memory = GaugeMetricFamily("zimage_device_memory_bytes", "Device memory by use.", labels=["device", "use"])
        caches = CounterMetricFamily("zimage_cache", "Uses of a worker's caches.", labels=["device", "cache", "result"])
        for worker in service.workers:
            device = "none" if worker.device is None else str(worker.device)
            alive.add_metric([device], int(worker.is_ready))
            deaths.add_metric([device], worker.deaths)
            for model in worker.models:
                models.add_metric([device, model], 1)
            for use, size in worker.memory.items():
                memory.add_metric([device, use], size)
            for (cache, result), count in worker.caches.items():
                caches.add_metric([device, cache, result], count)
        yield from (alive, deaths, models, memory, caches)
