"""Where processes listen, and who reaches it."""

from collections.abc import Iterable, Iterator

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    head = psutil.Process(pid)
    return [head, *head.children(recursive=True)]


def listeners(processes: Iterable[psutil.Process]) -> Iterator[tuple[str, str, int]]:
    """(process, address, port) of each TCP port on which processes listen."""
    for process in processes:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                yield process.name(), connection.laddr.ip, connection.laddr.port


def is_loopback(address: str) -> bool:
    """Whether other machines cannot reach it."""
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"
