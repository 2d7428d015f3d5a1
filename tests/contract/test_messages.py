"""Events, requests and sampling say the same on both ends of the wire."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from colm.errors import InvalidRequest, PeerUnavailable
from colm.events import (
    Accepted,
    Event,
    Finished,
    FinishReason,
    LayerRecall,
    PrefillProgress,
    ProvisionalToken,
    Queued,
    Reserved,
    ScaleChanged,
    SparseReport,
    Timings,
    Token,
    Usage,
    WaitsFor,
)
from colm.request import ATTENTION_MODES, CHAT_ROLES, KV_CODECS, ChatMessage, GenerateRequest
from colm.sampling import (
    ANY_JSON_OBJECT,
    MAX_LOGIT_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
    Constraint,
    SamplingParams,
)
from colm.scale import ScaleWish
from colm.wire.messages import (
    IDS_PER_MESSAGE,
    decode_response,
    end_of_prompt,
    event_from_pb,
    gateway_response,
    generate_request_from_pb,
    generate_request_to_pb,
    sampling_from_pb,
    sampling_to_pb,
    scale_to_pb,
    scale_wish_from_pb,
    token_id_pieces,
    token_ids_from_pb,
)
from colm.wire.prompt_stream import read_token_ids
from colm.wire.v1 import common_pb2, generation_service_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as kv_pb

M = TypeVar("M", bound=Message)

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
NUMBERS = st.floats(allow_nan=False)
SECONDS = st.floats(0, 1e9)

USAGES = st.builds(
    Usage,
    num_prompt_tokens=U32,
    num_prefill_tokens=U32,
    num_decode_prompt_tokens=U32,
    num_new_tokens=U32,
    kv_received_bytes=U64,
    kv_effective_bytes=U64,
    num_kv_streams=U32,
    num_draft_tokens=U32,
    num_accepted_tokens=U32,
    num_prefill_cached_tokens=U32,
)
TIMINGS = st.builds(
    Timings,
    queue_s=SECONDS,
    prefill_s=SECONDS,
    first_token_s=SECONDS,
    decode_s=SECONDS,
    provisional_token_s=st.none() | SECONDS,
)
ACCEPTED = st.builds(
    Accepted, request_id=TEXT, model=TEXT, num_prompt_tokens=U32, num_chains=U32, max_new_tokens=U32, timeout_s=SECONDS
)
RESERVED = st.builds(Reserved, num_pages=U64)
QUEUED = st.builds(Queued, waits_for=st.sampled_from(WaitsFor), num_ahead=U32, estimated_wait_s=st.none() | SECONDS)
PROGRESS = st.builds(PrefillProgress, num_tokens_done=U32, num_tokens_total=U32)
TOKENS = st.builds(
    Token,
    token_id=U32,
    text=TEXT,
    logprob=NUMBERS,
    num_chains=U32,
    top_logprobs=st.lists(st.tuples(U32, NUMBERS), max_size=4).map(tuple),
    confirms_provisional=st.none() | st.booleans(),
)
PROVISIONAL = st.builds(ProvisionalToken, token_id=U32, text=TEXT)
SCALES = st.builds(ScaleChanged, num_chains=U32, min_chains=U32)
REPORTS = st.builds(
    SparseReport,
    layers=st.lists(
        st.builds(
            LayerRecall,
            layer=U32,
            num_rows=U32,
            recall=st.floats(0, 1),
            recall_bound=st.floats(0, 1),
            num_dense_heads=U32,
        ),
        max_size=3,
    ).map(tuple),
)
FINISHED = st.builds(
    Finished,
    reason=st.sampled_from(FinishReason),
    usage=USAGES,
    timings=TIMINGS,
    text=TEXT,
    sparse=st.none() | REPORTS,
)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, MAX_TEMPERATURE),
    top_k=U32,
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.none() | U64,
    stop=st.lists(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=MAX_STOP_CHARS),
        max_size=MAX_STOP_STRINGS,
    ).map(tuple),
    stop_token_ids=st.lists(U32, max_size=MAX_STOP_TOKEN_IDS).map(tuple),
    top_logprobs=st.integers(0, MAX_TOP_LOGPROBS),
    ignore_eos=st.booleans(),
    presence_penalty=st.floats(-MAX_PENALTY, MAX_PENALTY),
    frequency_penalty=st.floats(-MAX_PENALTY, MAX_PENALTY),
    repetition_penalty=st.floats(0, MAX_REPETITION_PENALTY, exclude_min=True),
    min_p=st.floats(0, 1),
    logit_bias=st.dictionaries(U32, st.floats(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
    min_tokens=U32,
    constraint=st.sampled_from(
        [None, ANY_JSON_OBJECT, Constraint(kind="regex", text="é+"), Constraint(kind="json_schema", text="{}")]
    ),
)
REQUESTS = st.builds(
    GenerateRequest,
    model=TEXT,
    prompt=TEXT,
    chat=st.none() | st.booleans(),
    num_chains=st.none() | U32,
    min_chains=st.none() | U32,
    max_new_tokens=st.none() | st.integers(-1 << 63, (1 << 63) - 1),
    sampling=SAMPLING,
    timeout_s=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    attention=st.sampled_from(ATTENTION_MODES),
    kv_codec=st.sampled_from(KV_CODECS),
    max_draft_tokens=st.none() | U32,
    provisional_first_token=st.booleans(),
)
MESSAGES = st.builds(ChatMessage, role=st.sampled_from(CHAT_ROLES), content=TEXT)
CONVERSATIONS = st.builds(replace, REQUESTS, chat=st.none(), history=st.lists(MESSAGES, max_size=3).map(tuple))


def sent(message: M) -> M:
    """A message, serialised and parsed again."""
    return type(message).FromString(message.SerializeToString())


@given(ACCEPTED | QUEUED | PROGRESS | PROVISIONAL | TOKENS | SCALES | FINISHED)
def test_an_event_of_the_gateway_reaches_the_client(event: Event) -> None:
    assert event_from_pb(sent(gateway_response(event))) == event


@given(QUEUED | RESERVED | PROGRESS | PROVISIONAL | TOKENS | SCALES | FINISHED)
def test_an_event_of_a_decode_node_reaches_the_gateway(event: Event) -> None:
    assert event_from_pb(sent(decode_response(event))) == event


@given(st.builds(ScaleWish, num_chains=st.none() | U32, min_chains=st.none() | U32))
def test_a_wish_for_another_scale_survives(wish: ScaleWish) -> None:
    assert scale_wish_from_pb(sent(scale_to_pb(wish))) == wish


@given(REQUESTS | CONVERSATIONS)
def test_a_request_reaches_the_gateway(request: GenerateRequest) -> None:
    assert generate_request_from_pb(sent(generate_request_to_pb(request))) == request


def test_a_request_that_says_nothing_of_attention_and_codec_is_dense_and_raw() -> None:
    request = generate_request_from_pb(generation_service_pb2.OpenGenerate())
    assert (request.attention, request.kv_codec) == ("dense", "raw")


@pytest.mark.parametrize(
    ("field", "limit"), [("attention", "must be dense or sparse"), ("kv_codec", "must be raw or int8")]
)
def test_a_choice_that_is_not_known_is_refused_by_name(field: str, limit: str) -> None:
    message = sent(generation_service_pb2.OpenGenerate(**{field: 3}))  # type: ignore[arg-type]  # of a newer client
    with pytest.raises(InvalidRequest) as refusal:
        generate_request_from_pb(message)
    assert (refusal.value.field, refusal.value.value, refusal.value.limit) == (field, "3", limit)


def test_a_client_names_an_event_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="event of unknown kind"):
        event_from_pb(generation_service_pb2.GenerateResponse())


@given(SAMPLING)
def test_sampling_params_survive(params: SamplingParams) -> None:
    assert sampling_from_pb(sent(sampling_to_pb(params))) == params


def test_an_empty_sampling_message_is_greedy() -> None:
    assert sampling_from_pb(common_pb2.Sampling()) == SamplingParams()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (common_pb2.Sampling(temperature=11), "temperature"),
        (common_pb2.Sampling(top_p=0), "top_p"),
        (common_pb2.Sampling(stop=[""]), "stop"),
        (common_pb2.Sampling(top_logprobs=21), "top_logprobs"),
        (common_pb2.Sampling(repetition_penalty=0), "repetition_penalty"),
        (common_pb2.Sampling(json_schema="[]"), "json_schema"),
        (common_pb2.Sampling(regex=""), "regex"),
    ],
)
def test_sampling_from_a_caller_is_checked(message: common_pb2.Sampling, field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        sampling_from_pb(message)
    assert refusal.value.field == field


@pytest.mark.parametrize("num_ids", [0, 1, IDS_PER_MESSAGE, IDS_PER_MESSAGE + 1])
def test_token_ids_are_cut_into_messages_without_loss(num_ids: int) -> None:
    pieces = [token_ids_from_pb(sent(piece)) for piece in token_id_pieces(np.arange(num_ids))]
    assert [token_id for piece in pieces for token_id in piece.tolist()] == list(range(num_ids))
    assert all(1 <= len(piece) <= IDS_PER_MESSAGE for piece in pieces)


async def read_back(pieces: list[common_pb2.TokenIds], end: common_pb2.EndOfPrompt, num_ids: int) -> list[int]:
    async def requests() -> AsyncIterator[kv_pb.PullKvRequest]:
        for piece in pieces:
            yield kv_pb.PullKvRequest(token_ids=piece)
        yield kv_pb.PullKvRequest(end_of_prompt=end)

    ids: list[int] = (await read_token_ids(requests(), num_ids)).tolist()
    return ids


@pytest.mark.parametrize("num_ids", [1, IDS_PER_MESSAGE + 1])
async def test_ids_that_changed_on_the_way_are_told_from_those_that_were_sent(num_ids: int) -> None:
    """Bug: the prompt had no checksum, though its keys and values had one."""
    pieces, end = list(token_id_pieces(np.arange(num_ids))), end_of_prompt(np.arange(num_ids))
    assert await read_back(pieces, end, num_ids) == list(range(num_ids))
    pieces[-1].ids[-1] ^= 1
    with pytest.raises(PeerUnavailable, match="damaged on the way"):
        await read_back(pieces, end, num_ids)
    assert (await read_back(pieces, common_pb2.EndOfPrompt(), num_ids))[:-1] == list(range(num_ids - 1))
