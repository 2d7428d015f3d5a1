"""What is measured: each module is one benchmark, run as `python -m bench.<name>`."""
