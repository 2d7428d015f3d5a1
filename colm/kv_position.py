"""A place in the one order in which keys and values travel: layer by layer and, within a layer, in token order."""

from typing import NamedTuple


class KvPosition(NamedTuple):
    """Everything before it: all tokens of the layers before `layer`, and the first `token` tokens of `layer`.

    Positions compare in the order of travel. A transfer of L layers ends at (L, 0).
    """

    layer: int
    token: int

    def after(self, num_tile_tokens: int, num_tokens: int) -> "KvPosition":
        """Where a tile ends that begins here; `num_tokens` are those of the prompt."""
        token = self.token + num_tile_tokens
        return KvPosition(self.layer + 1, 0) if token == num_tokens else KvPosition(self.layer, token)

    def at_least(self, first_token: int) -> "KvPosition":
        """Where its layer's next tile begins, if no layer has any before a token."""
        return KvPosition(self.layer, max(self.token, first_token))


KV_START = KvPosition(0, 0)
