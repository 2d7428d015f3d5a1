"""Of pages that requests share on a decode node, and of prefills that serve several."""

from tests.mutation.mutant import Mutant

_CACHE = "tests/unit/test_shared_pages.py::"
_REUSE = "tests/fault/test_prefix_reuse.py::"
_MIXED = (
    "tests/numerics/test_answers_over_shared_pages.py::"
    "test_answers_over_shared_pages_draft_and_change_their_scale_beside_the_one_that_brought_them"
)

MUTANTS = (
    Mutant(
        "found pages count as room",
        "decode_node/prefix_cache.py",
        " + sum(map(self._num_idle, found))",
        "",
        _CACHE + "test_what_was_found_is_not_counted_as_room",
    ),
    Mutant(
        "a block in use is free once nobody keeps it",
        "decode_node/page_pool.py",
        "        self._kept.remove(block)\n        if self.is_idle(block):\n",
        "        self._kept.remove(block)\n        if True:\n",
        _CACHE + "test_who_comes_while_a_prompt_is_on_its_way_shares_its_pages_and_waits",
    ),
    Mutant(
        "a stub is shared and not copied",
        "decode_node/shared_prefill.py",
        "                if reservation.copied_by is None:\n                    self._store.copy_page(*copy)\n",
        "                if reservation.copied_by is None:\n                    pass\n",
        _REUSE + "test_the_same_prompt_again_asks_no_prefill_node",
    ),
    Mutant(
        "clients share pages",
        "decode_node/prompt_blocks.py",
        "attention, codec, cache_salt.hex())",
        "attention, codec)",
        _REUSE + "test_clients_share_nothing",
    ),
    Mutant(
        "a page in which a prompt ends is not copied where it is on its way",
        "decode_node/shared_prefill.py",
        "                for copy in prefill.copies:\n                    self._store.copy_page(*copy)\n",
        "                pass\n",
        _MIXED,
    ),
    Mutant(
        "blocks that did not come are found",
        "decode_node/prefix_cache.py",
        "        for entry in self._coming.pop(lease, ()):\n            self._forget(entry)\n",
        "        self.arrived(lease)\n",
        _MIXED,
    ),
    Mutant(
        "a prefill ends with the request that began it",
        "decode_node/shared_prefill.py",
        "            if not self._num_users and not self._task.done():\n",
        "            if not self._task.done():\n",
        _REUSE + "test_a_prefill_goes_on_for_those_who_share_it_when_the_first_has_gone",
    ),
)
