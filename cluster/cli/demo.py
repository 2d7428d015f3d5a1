"""The demo: a cluster reads a chapter of the Python manual and answers a question about it."""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import typer

from cluster.cli.answer_view import AnswerView
from cluster.cli.output import note
from cluster.interrupts import Interrupts
from cluster.lifecycle import up
from cluster.options import load_config
from cluster.teardown import down
from colm.checkpoint import Checkpoint
from colm.client import Client
from colm.errors import ConfigError
from colm.text.tokenizer import Tokenizer

QUESTION = "In a few sentences, explain what the with statement of Python does and why it is useful."
# A small model attends best to what it read last, so the topic asked about ends the document.
_LAST_TOPICS = ("context-managers", "with")
_FILL_TOPICS = ("exceptions", "try", "while", "for", "if", "assignment", "function", "import", "class")
_TARGET_DOCUMENT_TOKENS = 6400


def manual_chapter(tokenizer: Tokenizer) -> str:
    """Join topics of Python's language reference, which every Python ships, up to about 6,400 tokens."""
    last = "\n\n".join(topics[name] for name in _LAST_TOPICS)
    room = _TARGET_DOCUMENT_TOKENS - len(tokenizer.encode(last))
    parts: list[str] = []
    for paragraph in "\n\n".join(topics[name] for name in _FILL_TOPICS).split("\n\n"):
        room -= len(tokenizer.encode(paragraph + "\n\n"))
        if room < 0:
            break
        parts.append(paragraph)
    return "\n\n".join([*parts, last])


def run_demo(model: Path, max_new_tokens: int, weights: str | None = None) -> dict[str, object]:
    """Bring up a cluster of one prefill and one decode replica, ask, and take it down.

    Returns:
        What was measured; the demo's JSON line.

    Raises:
        ColmError: what went wrong.
    """
    checkpoint = Checkpoint.open(model)
    tokenizer = Tokenizer.load(checkpoint)
    if tokenizer is None:
        raise ConfigError(f"--model={model} has no tokenizer; the demo needs a model that reads text")
    document = manual_chapter(tokenizer)
    with tempfile.TemporaryDirectory(prefix="colm-demo-") as folder, Interrupts() as interrupts:
        state_dir = Path(folder)
        config = load_config(None, {"model.path": model, "gateway.port": 0, "decode.weights": weights})
        state = up(config, state_dir, note)
        try:
            note(f"document: {len(document.encode()):,} bytes of Python's language reference")
            typer.echo(f"> {QUESTION}\n")
            view = AnswerView(stream_text=True)
            with Client(state.gateway_address, state.security) as client, view:
                for event in client.generate(document, QUESTION, max_new_tokens=max_new_tokens):
                    view.see(event)
            typer.echo()
            view.print_summary()
        finally:
            interrupts.deaf = True
            down(state_dir, note)
    return {"chains": list(checkpoint.config.chains), **view.record()}
