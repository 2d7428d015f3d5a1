"""Groups of rows for the paper's tables on this machine."""

from bench.prefill.plan import Group, Row
from tests.tiny import tiny_config

TINY = tiny_config()
FAMILY = ("llama-3.2-1b", "llama-3.2-1b-16-16-air", "llama-3.2-1b-8-8-8-8-air")


def group(num_tokens: int, *peers: str) -> Group:
    return Group(rows=tuple(Row(name, "dense") for name in FAMILY), num_tokens=num_tokens, peers=peers)
