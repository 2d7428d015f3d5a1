"""What OpenAI's clients send, and what becomes of it here.

Fields that this system has are read; fields that it lacks are accepted with the value that changes nothing, and refused
by name with any other; fields that nobody knows are refused, as OpenAI does. Beside OpenAI's own there are `scale` (or
`num_chains`), `min_chains`, `attention`, `provisional_first_token`, `document` and `timeout_s`, and of the sampling
fields that vLLM has `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos`, `guided_json`
and `guided_regex`. Its Python package sends them as `extra_body`.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from colm.errors import InvalidRequest
from colm.request import AttentionMode, ChatMessage, GenerateRequest
from colm.sampling import ANY_JSON_OBJECT, MAX_LOGIT_BIASES, Constraint, SamplingParams
from colm.scale import ScaleWish

MAX_ANSWERS = 8
"""Of one call. Each is a request of its own."""
MAX_DOCUMENTS = 64
DEFAULT_TEMPERATURE = 1.0
"""OpenAI's."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """Of a streamed answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """As vLLM has it: each chunk counts the tokens so far."""
    include_obfuscation: bool = False


class JsonSchema(_Strict):
    """What an answer is to be; always held to, `strict` or not."""

    name: str = ""
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_of_its_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, which needs it")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """Of the answer's text."""
        if self.json_schema is not None:
            return _schema(self.json_schema.json_schema)
        return ANY_JSON_OBJECT if self.type == "json_object" else None


def _without(reason: str) -> AfterValidator:
    """Refuses every value that asks for something."""

    def check(value: object) -> object:
        if value is False or value in (None, [], "none", "auto"):
            return value
        raise ValueError(reason)

    return AfterValidator(check)


_NO_PROMPT_LOGPROBS = _without(
    "a prompt is neither sent back nor given log probabilities: the prefill node computes its keys and values with "
    "chain 1 alone, and runs no output head over it"
)
_NO_TOOLS = _without(
    "tools are not served: each model's template writes them and its calls in a form of its own; describe them in the "
    "system message and ask for response_format={'type': 'json_schema', ...}"
)


class _Request(_Strict):
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = None
    """Not looked at, like the next four: names and caches of OpenAI's own."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    metadata: dict[str, str] | None = None

    scale: int | Literal["auto"] | None = None
    num_chains: int | None = None
    min_chains: int | None = None
    attention: AttentionMode = "dense"
    provisional_first_token: bool = False
    document: str | Annotated[list[str], Field(max_length=MAX_DOCUMENTS)] | None = None
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = Field(default=(), strict=False)
    ignore_eos: bool = False
    timeout_s: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: (
        Annotated[dict[Annotated[int, Field(strict=False)], float], Field(max_length=MAX_LOGIT_BIASES)] | None
    ) = None
    min_tokens: int = 0
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    prompt_logprobs: Annotated[int | bool | None, _NO_PROMPT_LOGPROBS] = None

    @model_validator(mode="after")
    def _one_name_of_scale(self) -> "_Request":
        if self.scale not in (None, "auto") and self.num_chains not in (None, self.scale):
            raise ValueError("scale and num_chains are the same and differ; give one of them")
        return self

    @model_validator(mode="after")
    def _provisional_is_streamed(self) -> "_Request":
        if self.provisional_first_token and not self.stream:
            raise ValueError("provisional_first_token needs stream=true; a whole answer has nothing provisional")
        return self

    @property
    def wish(self) -> ScaleWish:
        """Chains that make the answer's tokens; `auto` leaves it to the decode node, down to `min_chains`."""
        if self.scale == "auto":
            return ScaleWish(num_chains=self.num_chains, min_chains=self.min_chains or 1)
        return ScaleWish(num_chains=self.num_chains if self.scale is None else self.scale, min_chains=self.min_chains)

    @property
    def documents(self) -> list[str]:
        """Ids of files that stand before the prompt."""
        if self.document is None:
            return []
        return [self.document] if isinstance(self.document, str) else self.document

    def sampling(self, number: int, top_logprobs: int) -> SamplingParams:
        """How the tokens of the answer of that number are chosen."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else (self.seed + number) % (1 << 64),
            stop=stop,
            stop_token_ids=self.stop_token_ids,
            top_logprobs=top_logprobs,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            min_p=self.min_p or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            min_tokens=self.min_tokens,
            constraint=self._constraint(),
        )

    def _constraint(self) -> Constraint | None:
        asked = {
            "response_format": self.response_format and self.response_format.constraint,
            "guided_json": self.guided_json and _schema(self.guided_json),
            "guided_regex": self.guided_regex and Constraint(kind="regex", text=self.guided_regex),
        }
        given = {field: constraint for field, constraint in asked.items() if constraint}
        if len(given) > 1:
            raise InvalidRequest(next(iter(given)), "", f"{' and '.join(given)} exclude each other; give one of them")
        return next(iter(given.values()), None)


class ChatRequest(_Request):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    store: Literal[False, None] = None
    tools: Annotated[list[Any] | None, _NO_TOOLS] = None
    tool_choice: Annotated[str | dict[str, Any] | None, _NO_TOOLS] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", None] = None

    @model_validator(mode="after")
    def _ends_with_user(self) -> "ChatRequest":
        if self.messages[-1].role != "user":
            raise ValueError("messages must end with a user's message")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class CompletionRequest(_Request):
    """Of `/v1/completions`."""

    prompt: str | Annotated[list[int], Field(min_length=1)]
    logprobs: int | None = None
    echo: Annotated[bool | None, _NO_PROMPT_LOGPROBS] = None
    suffix: Literal["", None] = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _no_more_than_n(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must be n: every answer that is made is sent")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A call in the project's own terms."""

    requests: tuple[GenerateRequest, ...]
    """One for each answer; without their text, which is large and the same for all."""
    text: str
    """The user's message, or what is to be completed."""
    token_ids: tuple[int, ...]
    """A prompt of ids; empty where there is text."""
    documents: tuple[str, ...]
    is_chat: bool
    is_streamed: bool
    includes_usage: bool
    counts_along: bool
    """Each chunk of a stream says how many tokens there are so far."""
    wants_logprobs: bool


_Body = TypeVar("_Body", bound=_Request)


def _schema(schema: dict[str, Any] | str) -> Constraint:
    return Constraint(kind="json_schema", text=schema if isinstance(schema, str) else json.dumps(schema))


def read_chat(body: bytes) -> Ask:
    """A call of `/v1/chat/completions`.

    Raises:
        InvalidRequest: names the field.
    """
    call = _read(ChatRequest, body)
    *before, last = call.messages
    history = tuple(
        ChatMessage(role="system" if each.role == "developer" else each.role, content=each.text) for each in before
    )
    limit = call.max_tokens if call.max_completion_tokens is None else call.max_completion_tokens
    top_logprobs = call.top_logprobs or 0
    requests = _requests(call, limit, top_logprobs, chat=True, history=history)
    return _ask(call, requests, is_chat=True, text=last.text, wants_logprobs=bool(call.logprobs))


def read_completion(body: bytes) -> Ask:
    """A call of `/v1/completions`.

    Raises:
        InvalidRequest: names the field.
    """
    call = _read(CompletionRequest, body)
    requests = _requests(call, call.max_tokens, call.logprobs or 0, chat=False, history=())
    wants_logprobs = call.logprobs is not None
    if isinstance(call.prompt, str):
        return _ask(call, requests, is_chat=False, text=call.prompt, wants_logprobs=wants_logprobs)
    if call.documents:
        raise InvalidRequest("document", call.documents, "a prompt of token ids has no document before it")
    return _ask(call, requests, is_chat=False, token_ids=tuple(call.prompt), wants_logprobs=wants_logprobs)


def _requests(
    call: _Request, max_new_tokens: int | None, top_logprobs: int, *, chat: bool, history: tuple[ChatMessage, ...]
) -> tuple[GenerateRequest, ...]:
    return tuple(
        GenerateRequest(
            model=call.model,
            history=history,
            chat=chat,
            num_chains=call.wish.num_chains,
            min_chains=call.wish.min_chains,
            max_new_tokens=max_new_tokens,
            sampling=call.sampling(number, top_logprobs),
            timeout_s=call.timeout_s,
            attention=call.attention,
            provisional_first_token=call.provisional_first_token,
        )
        for number in range(call.n)
    )


def _ask(
    call: _Request,
    requests: tuple[GenerateRequest, ...],
    *,
    is_chat: bool,
    wants_logprobs: bool,
    text: str = "",
    token_ids: tuple[int, ...] = (),
) -> Ask:
    options = call.stream_options or StreamOptions()
    return Ask(
        requests=requests,
        text=text,
        token_ids=token_ids,
        documents=tuple(call.documents),
        is_chat=is_chat,
        is_streamed=call.stream,
        includes_usage=options.include_usage,
        counts_along=options.continuous_usage_stats,
        wants_logprobs=wants_logprobs,
    )


def _read(kind: type[_Body], body: bytes) -> _Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as err:
        found = err.errors(include_url=False)[0]
        field = ".".join(str(part) for part in found["loc"] if not str(part).startswith(("list[", "function-")))
        if found["type"] == "extra_forbidden":
            raise InvalidRequest(field, found["input"], "is not a parameter that this server knows") from err
        if found["type"] == "json_invalid":
            raise InvalidRequest("body", body[:40], f"must be JSON: {found['msg']}") from err
        limit = found["msg"].removeprefix("Value error, ")
        raise InvalidRequest(field or "body", found["input"] if field else "", limit) from err
