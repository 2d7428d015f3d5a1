"""What a client asks for, checked where it is made."""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from colm import checks
from colm.errors import InvalidRequest
from colm.sampling import TOKEN_IDS, SamplingParams
from colm.scale import ScaleWish

AttentionMode = Literal["dense", "sparse"]
"""What a prompt's tokens attend to at the prefill: everything before them, or what a plan made for the prompt lists."""
ATTENTION_MODES: tuple[AttentionMode, ...] = get_args(AttentionMode)
KvCodec = Literal["raw", "int8"]
"""How a prompt's keys and values travel: as they are, or in int8 with a scale a token and kv head, half the bytes."""
KV_CODECS: tuple[KvCodec, ...] = get_args(KvCodec)


ChatRole = Literal["system", "user", "assistant"]
CHAT_ROLES: tuple[ChatRole, ...] = get_args(ChatRole)
MAX_HISTORY = 256
"""Messages before the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatMessage:
    """What somebody has said in a conversation.

    Raises:
        InvalidRequest: names the field, its value and the limit.
    """

    role: ChatRole
    content: str

    def __post_init__(self) -> None:
        checks.choice("history.role", self.role, CHAT_ROLES)
        checks.utf8("history.content", self.content)


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
    history: tuple[ChatMessage, ...] = ()
    """The conversation before the user's message, which document and prompt are; needs the chat template."""
    chat: bool | None = None
    """Wrap in the model's chat template. None: if the model has one."""
    num_chains: int | None = None
    """Scale of the answer, 1..n. None: all chains."""
    min_chains: int | None = None
    """Fewest chains: the decode node chooses between the two for each token, by its load. None: always `num_chains`."""
    max_new_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    timeout_s: float | None = None
    """Seconds until the client no longer needs the answer."""
    attention: AttentionMode = "dense"
    """Of the prompt, at the prefill."""
    kv_codec: KvCodec = "raw"
    """Of the prompt's keys and values, from the prefill node to the decode node."""
    max_draft_tokens: int | None = None
    """Tokens that chain 1 may draft before all chains verify them, which changes no token; 0 for none. None, and above
    it: the decode node's own limit."""
    provisional_first_token: bool = False
    """Send chain 1's own next token before the answer's first, where that comes sooner; it changes no token."""
    answer_key: str = ""
    """Under it the client may take the answer up again, should the call break: 32 hex digits, made at random."""
    answer_token_ids: tuple[int, ...] = ()
    """The answer so far, behind which it goes on."""
    revision: str = ""
    """Of the weights that the answer so far is of, as `Accepted` has it; others refuse to go on. Empty: any."""

    @property
    def scale(self) -> ScaleWish:
        """Chains that make the answer's tokens."""
        return ScaleWish(num_chains=self.num_chains, min_chains=self.min_chains)

    def __post_init__(self) -> None:
        checks.utf8("model", self.model)
        checks.utf8("prompt", self.prompt)
        checks.utf8("revision", self.revision)
        if not isinstance(self.history, tuple) or len(self.history) > MAX_HISTORY:
            raise InvalidRequest("history", len(self.history), f"must be a tuple of at most {MAX_HISTORY} messages")
        if self.chat is not None:
            checks.flag("chat", self.chat)
        if self.history and self.chat is False:
            raise InvalidRequest("chat", False, "a history needs the model's chat template")
        ScaleWish(num_chains=self.num_chains, min_chains=self.min_chains)
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
        checks.flag("provisional_first_token", self.provisional_first_token)
        checks.choice("attention", self.attention, ATTENTION_MODES)
        checks.choice("kv_codec", self.kv_codec, KV_CODECS)
        if self.max_draft_tokens is not None:
            limit = "must be an integer from 0 to 2^32 - 1"
            checks.integer("max_draft_tokens", self.max_draft_tokens, range(1 << 32), limit)
