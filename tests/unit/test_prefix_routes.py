"""A prompt goes to the node that got its beginning before, unless that is gone or much busier than another."""

import numpy as np
import pytest

from colm import prefix_routes
from colm.prefix_routes import BLOCK_TOKENS, MAX_MORE_REQUESTS, PrefixRoutes

DOCUMENT = np.arange(3 * BLOCK_TOKENS) % 97
ONE, OTHER = np.append(DOCUMENT, [1, 2]), np.append(DOCUMENT, [3])


def nodes(*loads: int) -> dict[str, int]:
    return {f"node-{number}": load for number, load in enumerate(loads)}


@pytest.fixture
def routes() -> PrefixRoutes:
    routes = PrefixRoutes()
    routes.note(routes.keys(ONE, b"a"), "node-1")
    return routes


def test_a_prompt_that_begins_alike_goes_where_the_first_went(routes: PrefixRoutes) -> None:
    assert routes.find(routes.keys(OTHER, b"a"), nodes(0, 0)) == "node-1"
    assert routes.find(routes.keys(OTHER[1:], b"a"), nodes(0, 0)) is None


def test_the_longest_beginning_counts(routes: PrefixRoutes) -> None:
    routes.note(routes.keys(OTHER[:BLOCK_TOKENS], b"a"), "node-0")
    assert routes.find(routes.keys(OTHER, b"a"), nodes(0, 0)) == "node-1"
    assert routes.find(routes.keys(OTHER[: BLOCK_TOKENS + 1], b"a"), nodes(0, 0)) == "node-0"


def test_another_client_is_sent_nowhere(routes: PrefixRoutes) -> None:
    """Its pages are not shared, so it has nothing to find there."""
    assert routes.find(routes.keys(ONE, b"b"), nodes(0, 0)) is None


@pytest.mark.parametrize("least", [0, 3])
def test_a_node_that_is_much_busier_than_another_is_left_alone(routes: PrefixRoutes, least: int) -> None:
    most = 2 * least + MAX_MORE_REQUESTS
    assert routes.find(routes.keys(ONE, b"a"), nodes(least, most)) == "node-1"
    assert routes.find(routes.keys(ONE, b"a"), nodes(least, most + 1)) is None


def test_a_node_that_is_gone_is_not_named(routes: PrefixRoutes) -> None:
    assert routes.find(routes.keys(ONE, b"a"), nodes(0)) is None


def test_the_oldest_are_forgotten_and_their_ends_first(routes: PrefixRoutes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_routes, "MAX_BLOCKS", 3)
    routes.note(routes.keys(np.array([5]), b"a"), "node-0")
    assert routes.find(routes.keys(ONE, b"a")[2:], nodes(0, 0)) is None
    assert routes.find(routes.keys(ONE, b"a"), nodes(0, 0)) == "node-1"
