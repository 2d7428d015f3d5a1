"""A record of `bench.autoscaling` as a figure: the queue above, the replicas below, over the phases of the load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_GROUND: Final = "#fbfbf9"
_QUEUE, _WANTED, _PRESENT = "#1f5fa8", "#b3531d", "#222222"


def write_plot(path: Path, record: Mapping[str, Any]) -> None:
    """Draw it, as the path's suffix says, on a light ground of its own."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    seen, scaling = record["seen"], record["scaling"]
    at_s = [each["at_s"] for each in seen]
    with mpl.rc_context({"svg.hashsalt": "colm", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(8.4, 5.0), facecolor=_GROUND, layout="constrained")
        queue, replicas = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        queue.plot(at_s, [each["queued_s"] for each in seen], color=_QUEUE, label="queue")
        queue.set_ylabel("queued prefill work, s")
        queue.set_ylim(bottom=0)
        replicas.step(
            at_s, [each["num_wanted"] for each in seen], where="post", color=_WANTED, linestyle="--", label="wanted"
        )
        replicas.step(at_s, [each["num_present"] for each in seen], where="post", color=_PRESENT, label="present")
        replicas.plot(at_s, [each["demand"] for each in seen], color=_QUEUE, linewidth=0.8, label="demand")
        replicas.set_ylabel("prefill replicas")
        replicas.set_ylim(0, scaling["max_replicas"] + 1)
        replicas.set_yticks(range(scaling["max_replicas"] + 2))
        replicas.set_xlabel("seconds")
        began_s = 0.0
        for seconds, load in record["phases"]:
            for axis in (queue, replicas):
                axis.axvspan(began_s, began_s + seconds, color=_QUEUE, alpha=0.12 if load > 1 else 0.03, linewidth=0)
            middle_s, top = began_s + seconds / 2, queue.get_xaxis_transform()
            queue.text(middle_s, 0.96, f"load {load:g}", transform=top, ha="center", va="top", fontsize=8)
            began_s += seconds
        for axis in (queue, replicas):
            axis.grid(visible=True, color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.set_facecolor(_GROUND)
        replicas.legend(loc="upper right", ncols=3, frameon=False, fontsize=8)
        conditions = (
            f"{record['model']}, prompts of {record['prompt_tokens']} tokens; {record['cpu']}; target_queue_s = "
            f"{scaling['target_queue_s']:g}, scale_up_s = {scaling['scale_up_s']:g}, scale_down_s = "
            f"{scaling['scale_down_s']:g}"
        )
        figure.supxlabel(conditions, fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor=_GROUND, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
