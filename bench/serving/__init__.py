"""Open-loop load on a running cluster, and on one process that does both, under the same arrivals."""
