"""Damage to bytes, to JSON and to values: each drawn from a seeded generator, so that it can be made again."""

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

INTEGERS = (0, 1, -1, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 10**400)
FLOATS = (0.0, -0.0, -1.0, 0.5, 1e-300, 1e-45, 1e38, 1e300, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "x",
    "\0",
    "../../x",
    "/dev/zero",
    "\ud800",
    "é" * 1000,
    "a" * 100_000,
    "{{",
    "%s",
    "<|im_end|>",
    "1",
    "nan",
)
# What no JSON library writes: integers of thousands of digits, and nesting that ends in a parser's stack.
RAW = ("1" * 5000, "[" * 100_000, "{" + '"a":{' * 10_000, "1e999999", "0" * 40, "\\", "//", "tru")
_PLACE = "raw text goes here"


def value(rng: random.Random) -> Any:
    """A value that a field rarely has."""
    pick = rng.choice
    kinds: list[Any] = [
        pick(INTEGERS),
        pick(FLOATS),
        pick(TEXTS),
        None,
        True,
        False,
        [],
        {},
        [[]],
        [pick(INTEGERS)] * 3,
    ]
    return pick([*kinds, {pick(TEXTS): pick(INTEGERS)}, [pick(TEXTS)], rng.getrandbits(64), rng.uniform(-1e6, 1e6)])


def data(rng: random.Random, whole: bytes, first_bytes: int | None = None) -> bytes:
    """Bytes, changed in one place to four, or cut off.

    Args:
        rng: the case's own.
        whole: what is changed.
        first_bytes: most changes lie in these.
    """
    changed = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        end = len(changed) if first_bytes is None or rng.random() < 0.1 else min(first_bytes, len(changed))
        at = rng.randrange(max(1, end))
        match rng.randrange(8):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at : at + 1] = bytes([(changed[at] if at < len(changed) else 0) ^ 1 << rng.randrange(8)])
            case 2:
                number = (rng.choice(INTEGERS) % 2**64).to_bytes(8, "little")
                changed[at : at + 8] = number
            case 3:
                changed[at : at + 4] = (rng.choice(INTEGERS) % 2**32).to_bytes(4, "little")
            case 4:
                del changed[at : at + rng.randint(1, 64)]
            case 5:
                changed[at:at] = changed[at : at + rng.randint(1, 64)]
            case 6:
                changed[at:at] = rng.randbytes(rng.randint(1, 16))
            case 7:
                del changed[at:]
    return bytes(changed)


def tree(rng: random.Random, body: Any) -> Any:
    """JSON values, changed in one place to three."""
    changed = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return value(rng)
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1:
                other_holder, other_key = rng.choice(places)
                holder[key] = copy.deepcopy(other_holder[other_key])
            case 2:
                holder[key] = [holder[key]]
            case 3 if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = value(rng)
            case _:
                holder[key] = value(rng)
    return changed


def text(rng: random.Random, body: Any) -> bytes:
    """JSON text of a changed body, sometimes with what no library would write, sometimes changed as bytes."""
    written = json.dumps(tree(rng, body))
    match rng.randrange(10):
        case 0:
            places = list(_places(changed := copy.deepcopy(body)))
            holder, key = rng.choice(places)
            holder[key] = _PLACE
            written = json.dumps(changed).replace(json.dumps(_PLACE), rng.choice(RAW))
        case 1:
            return data(rng, json.dumps(body).encode())
    return written.encode()


def replace_file(rng: random.Random, path: Path) -> None:
    """Put something in place of a file that no reader expects there, or nothing."""
    path.unlink()
    match rng.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path)
        case 4:
            path.write_bytes(b"")
        case 5:
            with path.open("wb") as file:
                file.truncate(1 << 34)


def _places(body: Any) -> Any:
    """(container, key) of every value inside."""
    waiting = [body]
    while waiting:
        holder = waiting.pop()
        keys: Any = (
            holder.keys() if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        )
        for key in keys:
            yield holder, key
            waiting.append(holder[key])
