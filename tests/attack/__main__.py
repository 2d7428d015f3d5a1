"""`make attack`: live attacks on a local cluster. All must be held off, with an honest client served meanwhile."""

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.cli.output import note
from cluster.options import load_config
from cluster.state import ClusterState
from tests.attack.attacks import ATTACKS, Target
from tests.attack.runner import HONEST_S, Result, run


def main() -> int:
    """Attack, print a table, and exit with 1 if an attack was not held off."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--state-dir", type=Path, help="attack this cluster of yours; by default one is started")
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct-9-3"), help="for that one")
    parser.add_argument("--only", default=",".join(ATTACKS), help=f"some of: {', '.join(ATTACKS)} (default all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - ATTACKS.keys()):
        parser.error(f"--only={','.join(unknown)} is unknown; choose of: {', '.join(ATTACKS)}")
    if options.state_dir is not None:
        results = _attack(ClusterState.require(options.state_dir), names)
    else:
        from cluster.lifecycle import up
        from cluster.teardown import down

        with tempfile.TemporaryDirectory(prefix="colm-attack-") as folder:
            state_dir = Path(folder) / "state"
            try:
                state = up(load_config(None, {"model.path": options.model, "gateway.port": 0}), state_dir, note)
                results = _attack(state, names)
            finally:
                down(state_dir, note)
    Console().print(_table(results))
    if options.json:
        print(json.dumps({"attacks": [asdict(result) for result in results]}))  # noqa: T201
    return 0 if all(result.is_held_off for result in results) else 1


def _attack(state: ClusterState, names: list[str]) -> list[Result]:
    target = Target(address=state.gateway_address, security=state.security, pid=state.ray_pid)
    attacks = {name: ATTACKS[name] for name in names}
    return asyncio.run(run(attacks, target, lambda result: note(f"{result.name}: {result.outcome}")))


def _table(results: list[Result]) -> Table:
    table = Table("attack", "held off", "what came of it", "honest requests", "slowest", title="attacks")
    for result in results:
        slowest = f"{result.slowest_honest_s:.2f} s" + ("" if result.is_timely else f", over {HONEST_S:g} s")
        word = "yes" if result.is_held_off else "NO"
        table.add_row(result.name, word, result.outcome, str(result.num_honest), slowest)
    return table


if __name__ == "__main__":
    sys.exit(main())
