"""What a client asks for, checked where it is made."""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from colm import checks
from colm.errors import InvalidRequest
from colm.sampling import TOKEN_IDS, SamplingParams

AttentionMode = Literal["dense", "sparse"]
"""What a prompt's tokens attend to at the prefill: everything before them, or what a plan made for the prompt lists."""
ATTENTION_MODES: tuple[AttentionMode, ...] = get_args(AttentionMode)

ANSWER_KEY = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """A request without its document. None leaves the choice to the cluster, which also checks its own limits.

    Raises:
        InvalidRequest: names the field, its value and the limit.
    """

    model: str = ""
    """Empty: the model the cluster serves."""
    prompt: str = ""
    """The instruction that follows the document."""
    chat: bool | None = None
    """Wrap in the model's chat template. None: if the model has one."""
    num_chains: int | None = None
    """Scale of the answer, 1..n. None: all chains."""
    max_new_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    timeout_s: float | None = None
    """Seconds until the client no longer needs the answer."""
    attention: AttentionMode = "dense"
    """Of the prompt, at the prefill."""
    answer_key: str = ""
    """Under it the client may take the answer up again, should the call break: 32 hex digits, made at random."""
    answer_token_ids: tuple[int, ...] = ()
    """The answer so far, behind which it goes on."""

    def __post_init__(self) -> None:
        checks.utf8("model", self.model)
        checks.utf8("prompt", self.prompt)
        if self.chat is not None:
            checks.flag("chat", self.chat)
        if self.num_chains is not None:
            limit = "must be an integer from 1 to the model's number of chains"
            checks.integer("num_chains", self.num_chains, range(1 << 32), limit)
        if self.max_new_tokens is not None:
            limit = "must be an integer from 1 to the cluster's limit"
            checks.integer("max_new_tokens", self.max_new_tokens, range(-1 << 63, 1 << 63), limit)
        if not isinstance(self.sampling, SamplingParams):
            raise InvalidRequest("sampling", self.sampling, "must be a SamplingParams")
        if self.timeout_s is not None:
            checks.number("timeout_s", self.timeout_s, "must be a finite number of seconds")
        if self.answer_key and not ANSWER_KEY.fullmatch(self.answer_key):
            raise InvalidRequest("answer_key", self.answer_key, "must be 32 lower-case hex digits, made at random")
        for token_id in self.answer_token_ids:
            checks.integer("answer_token_ids", token_id, TOKEN_IDS, "each must be an integer from 0 to 2^32 - 1")
        checks.choice("attention", self.attention, ATTENTION_MODES)
