"""Metrics that Prometheus reads; docs/metrics.md lists them all."""
