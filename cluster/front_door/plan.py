"""Checks a request's options against the model and the gateway's limits, and fills in defaults."""

from dataclasses import dataclass

from colm.errors import DeadlineExceeded, InvalidRequest, ModelReplaced
from colm.model.config import ChainConfig
from colm.request import AttentionMode, ChatMessage, GenerateRequest, KvCodec
from colm.sampling import SamplingParams
from colm.scale import Scale
from colm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What the gateway needs to know of the model."""

    name: str
    config: ChainConfig
    tokenizer: Tokenizer | None
    fingerprint: str
    revision: str = ""
    """Names all its weights, later chains' too, which the fingerprint does not; empty if nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayLimits:
    """Limits of one request, and of all together."""

    max_document_bytes: int
    max_upload_bytes: int
    upload_idle_s: float
    max_requests: int
    default_max_new_tokens: int
    max_new_tokens: int
    default_timeout_s: float
    min_prefill_tokens_per_s: float
    min_decode_tokens_per_s: float
    max_timeout_s: float

    def timeout_s(self, *, num_prompt_tokens: int, max_new_tokens: int) -> float:
        """Seconds that a request may take if its client set no deadline; they grow with the work."""
        work_s = num_prompt_tokens / self.min_prefill_tokens_per_s + max_new_tokens / self.min_decode_tokens_per_s
        return min(self.default_timeout_s + work_s, self.max_timeout_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A request's options as they will be served. The document is not part of them."""

    prompt: str
    history: tuple[ChatMessage, ...]
    chat: bool | None
    model: ServedModel
    scale: Scale
    max_new_tokens: int
    sampling: SamplingParams
    timeout_s: float | None
    """The client's deadline; None lets the gateway choose one, once it knows the prompt's length."""
    attention: AttentionMode
    kv_codec: KvCodec
    max_draft_tokens: int | None
    """None: the decode node's limit."""
    answer_token_ids: tuple[int, ...]
    provisional_first_token: bool

    @classmethod
    def of(
        cls, request: GenerateRequest, model: ServedModel, limits: GatewayLimits, caller_waits_s: float | None
    ) -> "Plan":
        """Check a request's options and fill in defaults.

        Args:
            request: its values have the right types.
            model: the one that it names.
            limits: the gateway's limits.
            caller_waits_s: seconds until the caller's own deadline, of which `max_timeout_s` count; None without one.

        Raises:
            InvalidRequest: names the field, its value and the limit.
            DeadlineExceeded: the request's time is over before it begins.
        """
        if request.answer_token_ids and request.revision not in ("", model.revision):
            raise ModelReplaced(
                f"this answer began with other weights than {model.name!r} has by now, and none is of two models; "
                "submit the request anew"
            )
        scale = Scale.of(request.scale, model.config.num_chains)
        max_new_tokens = request.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = limits.default_max_new_tokens
        if not 1 <= max_new_tokens <= limits.max_new_tokens:
            raise InvalidRequest("max_new_tokens", max_new_tokens, f"must be between 1 and {limits.max_new_tokens}")
        if len(request.answer_token_ids) > max_new_tokens:
            limit = f"at most max_new_tokens={max_new_tokens}"
            raise InvalidRequest("answer_token_ids", f"{len(request.answer_token_ids)} of them", limit)
        if (worst := max(request.answer_token_ids, default=0)) >= model.config.vocab_size:
            raise InvalidRequest(
                "answer_token_ids", worst, f"must be below the vocabulary size {model.config.vocab_size}"
            )
        request.sampling.check_vocabulary(model.config.vocab_size)
        if request.sampling.min_tokens > max_new_tokens:
            raise InvalidRequest(
                "min_tokens", request.sampling.min_tokens, f"must be at most max_new_tokens={max_new_tokens}"
            )
        timeout_s = request.timeout_s
        if timeout_s is not None:
            if timeout_s > limits.max_timeout_s:
                raise InvalidRequest("timeout_s", timeout_s, f"must be at most {limits.max_timeout_s:g}")
            if timeout_s <= 0:
                raise DeadlineExceeded(f"timeout_s={timeout_s:g}: the deadline is past already; it must be above 0")
        if caller_waits_s is not None:
            timeout_s = min(caller_waits_s, limits.max_timeout_s if timeout_s is None else timeout_s)
        if request.sampling.stop and model.tokenizer is None:
            limit = f"model {model.name!r} has no tokenizer; use stop_token_ids"
            raise InvalidRequest("stop", request.sampling.stop, limit)
        if (constraint := request.sampling.constraint) is not None and model.tokenizer is None:
            raise InvalidRequest(constraint.kind, constraint.text, f"model {model.name!r} has no tokenizer")
        return cls(
            prompt=request.prompt,
            history=request.history,
            chat=request.chat,
            model=model,
            scale=scale,
            max_new_tokens=max_new_tokens,
            sampling=request.sampling,
            timeout_s=timeout_s,
            attention=request.attention,
            kv_codec=request.kv_codec,
            max_draft_tokens=request.max_draft_tokens,
            answer_token_ids=request.answer_token_ids,
            provisional_first_token=request.provisional_first_token,
        )
