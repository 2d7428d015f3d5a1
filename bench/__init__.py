"""What is measured: each module is one benchmark, run as `python -m bench.<name>`; `harness` is how they run."""

import colm  # noqa: F401  (has OpenMP's threads sleep between two operations, or they would disturb the next one's)
