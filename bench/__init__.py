"""Benchmarks: each module is one, run as `python -m bench.<name>`; `harness` is how they run."""

import colm  # noqa: F401  (makes OpenMP's threads sleep between operations; spinning threads disturb the next one)
