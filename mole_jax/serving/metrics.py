"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mole_jax.serving.schedule import Scheduler

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, scheduler: Scheduler):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mole_jax_requests",
            "Requests for an answer by HTTP status; 499: the client went",
            ["status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("mole_jax_prompt_tokens", "Tokens of prompts, pictures' too", registry=registry)
        self.new_tokens = Counter("mole_jax_new_tokens", "Tokens of answers", registry=registry)
        self.first_token = Histogram(
            "mole_jax_first_token_seconds", "From a request to its first token", buckets=_SECONDS, registry=registry
        )
        self.whole = Histogram(
            "mole_jax_request_seconds", "From a request to the end of its answer", buckets=_SECONDS, registry=registry
        )
        for name, what, read in (
            ("slots", "Slots that there are", lambda: scheduler.slots.count),
            ("slots_in_use", "Slots with an answer under way", lambda: scheduler.running),
            ("requests_waiting", "Requests that wait for a slot", lambda: scheduler.waiting),
        ):
            Gauge(f"mole_jax_{name}", what, registry=registry).set_function(read)
