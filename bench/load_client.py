"""`make load-client`: guidellm, a load client that others wrote, against the cluster's OpenAI protocol.

A cluster is brought up, asked over TLS with its token as `colm env` gives them, and taken down. guidellm asks chats at
one number of requests at once after another, then text completions, all streamed. No request may fail, each answer must
have the tokens that were asked for, and its counts must be the cluster's: of each request's `usage`, and of the
metrics. A text of N tokens by guidellm's own reckoning must be one of N tokens here.

Its table stands on stderr; the last line of stdout is one JSON object.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.harness.environment import environment
from bench.harness.suite import positive
from bench.head_of_line.clusters import running
from cluster.cli.output import interruptible, note
from cluster.scrape import Scrape, Window, scrape
from cluster.state import ClusterState
from colm.client import Client
from colm.errors import ColmError

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What guidellm saw with so many requests at once."""

    path: str
    streams: int
    finished: int
    failed: int
    """Errors, and requests that it broke off."""
    prompt_tokens: tuple[int, ...]
    """Of each finished request, as its `usage` says."""
    new_tokens: tuple[int, ...]
    ttft_ms: float
    """Median time to the first token."""
    tpot_ms: float
    """Median time per output token."""
    output_tokens_per_s: float
    error: str
    """The first one's words; empty without one."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.load_client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--guidellm", type=Path, default=Path("build/loadclient/bin/guidellm"), metavar="FILE", help="the program")
    model = Path("models/SmolLM2-135M-Instruct-9-3")
    add("--model", type=Path, default=model, metavar="DIR", help=f"checkpoint that is served; {model}")
    add("--state-dir", type=Path, metavar="DIR", help="of a cluster that runs; without, one is started and stopped")
    add("--streams", type=positive, nargs="+", default=[1, 2, 4], metavar="N", help="requests at once; 1 2 4")
    add("--requests", type=positive, default=8, help="at each number of them; 8")
    add("--prompt-tokens", type=positive, default=128, help="of each text; 128")
    add("--output-tokens", type=positive, default=16, help="of each answer; 16")
    return parser


def main() -> None:
    """Ask, print, and exit with 1 if something is not as it must be."""
    options = parser().parse_args()
    try:
        with interruptible("interrupted"), running(options.model, options.state_dir) as state:
            steps, problems = measure(state, options)
    except ColmError as err:
        note(f"error: {err}")
        raise SystemExit(1) from err
    for problem in problems:
        note(f"error: {problem}")
    record = {"command": shlex.join(["python", "-m", "bench.load_client", *sys.argv[1:]]), **environment()}
    print(json.dumps(record | {"steps": [asdict(step) for step in steps], "problems": problems}))  # noqa: T201
    raise SystemExit(bool(problems))


def measure(state: ClusterState, options: argparse.Namespace) -> tuple[list[Step], list[str]]:
    """Ask for chats at each number of streams, then for completions one at a time.

    Returns:
        What guidellm saw, and what is not as it must be.
    """
    problems, found = [], []
    for path, streams in ((CHAT, options.streams), (COMPLETIONS, [1])):
        before = _gateway(state)
        steps = ask(state, path, streams, options)
        problems += wrong(steps, options, Window(before, _gateway(state)))
        found += steps
    return found, problems


def ask(state: ClusterState, path: str, streams: Sequence[int], options: argparse.Namespace) -> list[Step]:
    """Run guidellm once.

    Raises:
        ColmError: it ended with an error of its own.
    """
    with tempfile.TemporaryDirectory(prefix="colm-load-") as folder:
        plan, report = Path(folder) / "plan.json", Path(folder) / "report.json"
        # In a file, since everybody on a machine may read its processes' arguments.
        plan.touch(mode=0o600)
        plan.write_text(json.dumps(scenario(state, path, streams, options, report)), encoding="utf-8")
        environ = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"SSL_CERT_FILE": state.ca_file} if state.ca_file else {})
        command = [str(options.guidellm.absolute()), "run", "--config", str(plan), "--disable-progress"]
        try:
            status = subprocess.run(command, env=environ, cwd=folder, stdout=sys.stderr, check=False).returncode
        except OSError as err:
            raise ColmError(
                f"--guidellm={options.guidellm} cannot be run: {err}; `make load-client` installs it"
            ) from err
        if status or not report.exists():
            raise ColmError(f"guidellm ended with {status}, as it says above")
        return [step(path, each) for each in json.loads(report.read_text())["benchmarks"]]


def scenario(
    state: ClusterState, path: str, streams: Sequence[int], options: argparse.Namespace, report: Path
) -> dict[str, Any]:
    """What guidellm is to do, as its `--config` reads it."""
    lengths = {"prompt_tokens": options.prompt_tokens, "output_tokens": options.output_tokens}
    backend = {"target": state.base_url, "request_format": path, "api_key": state.client_token, "verify": True}
    return {
        "spec": {
            "backend": {"kind": "openai_http", **backend},
            "profile": {"kind": "concurrent", "streams": [1]},
            "constraints": [{"kind": "max_requests", "count": options.requests}],
            "tokenizer": {"kind": "huggingface_auto", "model": str(options.model.absolute())},
            "data": [{"kind": "synthetic_text", **lengths}],
            "outputs": [{"kind": "json", "path": str(report)}, {"kind": "console"}],
        },
        "benchmarks": [{"profile.streams": each} for each in streams],
    }


def step(path: str, benchmark: dict[str, Any]) -> Step:
    """One benchmark of guidellm's report."""
    metrics, requests = benchmark["metrics"], benchmark["requests"]
    totals, lost = metrics["request_totals"], [*requests["errored"], *requests["incomplete"]]

    def median(name: str) -> float:
        return float(metrics[name]["successful"]["median"])

    return Step(
        path=path,
        streams=benchmark["config"]["strategy"]["streams"],
        finished=totals["successful"],
        failed=totals["errored"] + totals["incomplete"],
        prompt_tokens=tuple(each["prompt_tokens"] for each in requests["successful"]),
        new_tokens=tuple(each["output_tokens"] for each in requests["successful"]),
        ttft_ms=median("time_to_first_token_ms"),
        tpot_ms=median("time_per_output_token_ms"),
        output_tokens_per_s=float(metrics["output_tokens_per_second"]["successful"]["mean"]),
        error=str(lost[0]["info"]["error"]) if lost else "",
    )


def wrong(steps: Sequence[Step], options: argparse.Namespace, counted: Window) -> list[str]:
    """What is not as it must be, in words.

    Args:
        steps: of one run of guidellm.
        options: what was asked.
        counted: by the gateway meanwhile.
    """
    problems = []
    for each in steps:
        label = f"{each.path} with {each.streams} at once"
        if each.failed or each.finished != options.requests:
            problems.append(f"{label}: {each.finished} of {options.requests} finished: {each.error or 'no error'}")
        if set(each.new_tokens) - {options.output_tokens}:
            problems.append(f"{label}: answers of {sorted(set(each.new_tokens))} tokens, not {options.output_tokens}")
        # A chat has its template around the text, whose tokens guidellm does not know.
        if each.path == COMPLETIONS and set(each.prompt_tokens) - {options.prompt_tokens}:
            problems.append(f"{label}: texts of {sorted(set(each.prompt_tokens))} tokens, not {options.prompt_tokens}")
    for metric, seen in (
        ("colm_prompt_tokens_total", sum(sum(each.prompt_tokens) for each in steps)),
        ("colm_new_tokens_total", sum(sum(each.new_tokens) for each in steps)),
    ):
        if (ours := counted.increase(metric)) != seen:
            problems.append(f"{steps[0].path}: {metric} grew by {ours}, and guidellm counts {seen}")
    return problems


def _gateway(state: ClusterState) -> Scrape:
    with Client(state.gateway_address, state.security) as client:
        address = client.cluster_status().metrics_address
    found = scrape(address)
    if found is None:
        raise ColmError(f"the gateway's metrics cannot be read at {address!r}; metrics.port in colm.toml says where")
    return found


if __name__ == "__main__":
    main()
