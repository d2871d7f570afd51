"""What ``/metrics`` shows, in Prometheus' words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0)
_SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The counters of one proxy process, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._calls: dict[tuple[str, str], Counter] = {}
        self.calls = Counter(
            "lightning_calls",
            "Calls forwarded, by wire and status",
            ("wire", "status"),
            registry=registry,
        )
        self.call_seconds = Histogram(
            "lightning_call_seconds", "Length of captured calls", buckets=_SLOW, registry=registry
        )
        self.spans = Counter(
            "lightning_spans",
            "Spans committed",
            ("wire", "fidelity"),
            registry=registry,
        )
        self.commit_seconds = Histogram(
            "lightning_commit_seconds",
            "From the end of an answer to its committed span",
            buckets=_FAST,
            registry=registry,
        )
        self.capture_faults = Counter(
            "lightning_capture_faults",
            "Capture trouble that no agent saw",
            ("kind",),
            registry=registry,
        )
        self.upstream_errors = Counter(
            "lightning_upstream_errors",
            "Calls that ended in an error, by class",
            ("error_class",),
            registry=registry,
        )
        self.findings = Counter(
            "lightning_findings",
            "What was found wrong in calls beside their error, by class",
            ("error_class",),
            registry=registry,
        )
        self.redacted = Counter(
            "lightning_redacted_spans",
            "Spans of which something was taken out, by rule",
            ("rule",),
            registry=registry,
        )
        self.rewards = Counter("lightning_rewards", "Rewards committed", registry=registry)
        self.swap_seconds = Histogram(
            "lightning_swap_seconds", "Length of weight changes", buckets=_SLOW, registry=registry
        )

    def count_call(self, wire: str, status: str, seconds: float) -> None:
        """One captured call. The labels' children are kept: looking them up costs more than counting."""
        child = self._calls.get((wire, status))
        if child is None:
            child = self._calls[wire, status] = self.calls.labels(wire, status)
        child.inc()
        self.call_seconds.observe(seconds)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a number that is read when somebody looks."""
        Gauge(f"lightning_{name}", text, registry=self._registry).set_function(value)

    def watch_each(self, name: str, text: str, label: str, values: Mapping[str, Callable[[], float]]) -> None:
        """Show several numbers of one name, told apart by a label, that are read when somebody looks."""
        gauge = Gauge(f"lightning_{name}", text, (label,), registry=self._registry)
        for of, value in values.items():
            gauge.labels(of).set_function(value)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
