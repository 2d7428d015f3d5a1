"""The int8 codec: what it writes is defined to the bit, and which codec two ends agree on.

Shapes: K kv heads, T tokens, D head dim, Z the two of keys and values.
"""

import numpy as np
import pytest
import torch
import xxhash
from colm_kernels.kv_quantise import dequantise_kv, quantise_kv_reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from colm.errors import FingerprintMismatch, NotFinite, PeerUnavailable
from colm.kv import KvFormat, KvTile
from colm.kv_position import KV_START, KvPosition
from colm.wire.kv_codec import choose_codec, quantised, require_codec, wire_token_bytes
from colm.wire.tile_codec import decode_message, decode_tile, encode_tile, max_tile_tokens, seal, split_tile
from colm.wire.v1 import common_pb2
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from prefill_node.encoded_tile import TileEncoder

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER, FIRST_TOKEN = 3, 62


def format_of(dtype: torch.dtype = torch.float32) -> KvFormat:
    return KvFormat(num_layers=4, num_kv_heads=2, head_dim=8, dtype=dtype)


def tile_of(num_tokens: int, dtype: torch.dtype = torch.float32) -> KvTile:
    """A tile as the engine makes it: a view into a larger buffer, tokens of different magnitudes."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (2, 2, num_tokens + 5)
    x_ZKSD = torch.randn(*shape, 8, generator=generator) * torch.rand(*shape, 1, generator=generator) * 9
    k_KTD, v_KTD = x_ZKSD.to(dtype)[:, :, 2 : 2 + num_tokens]
    return KvTile(LAYER, FIRST_TOKEN, k_KTD, v_KTD)


def by_definition(tokens_KTD: Tensor) -> tuple[Tensor, Tensor]:
    """(q_KTD, scale_KT)."""
    q_TKD, scale_TK = quantise_kv_reference(tokens_KTD.transpose(0, 1))
    return q_TKD.transpose(0, 1), scale_TK.t()


def raw(tensor: Tensor) -> bytes:
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def message_of(tile: KvTile) -> pb.PullKvResponse:
    """The tile's message in int8, by the definition and the generated classes alone."""
    (k_KTD, k_scale_KT), (v_KTD, v_scale_KT) = by_definition(tile.k_KTD), by_definition(tile.v_KTD)
    payload = raw(k_KTD) + raw(v_KTD) + raw(k_scale_KT) + raw(v_scale_KT)
    header = pb.TileHeader(
        transfer_id="t-1",
        epoch=2,
        layer=tile.layer,
        first_token=tile.first_token,
        num_tokens=tile.num_tokens,
        codec=common_pb2.CODEC_INT8,
        checksum=xxhash.xxh3_64_intdigest(payload),
    )
    seal(header)
    return pb.PullKvResponse(tile=header, payload=payload)


def encoded(tile: KvTile) -> bytes:
    return encode_tile(quantised(tile), transfer_id="t-1", epoch=2)


def read(data: bytes, kv_format: KvFormat) -> KvTile:
    header, payload = decode_message(data)
    return decode_tile(header.tile, payload, kv_format, "int8")


ENCODED = encoded(tile_of(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 257])
def test_a_tile_is_written_in_int8_as_the_definition_and_protobuf_write_it(num_tokens: int, dtype: torch.dtype) -> None:
    tile = tile_of(num_tokens, dtype)
    assert encoded(tile) == message_of(tile).SerializeToString()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 63])
def test_from_the_engine_to_the_pages_int8_is_the_definition_to_the_bit(num_tokens: int, dtype: torch.dtype) -> None:
    """Through messages of several parts, at whatever address they lie, into pages that lie apart."""
    tile, kv_format = tile_of(num_tokens, dtype), format_of(dtype)
    store = KvStore(KvLayout(kv_format, 4), 40)
    store.k_pages_LBPKD.fill_(-1)
    store.v_pages_LBPKD.fill_(-1)
    table_M = np.random.default_rng(num_tokens).permutation(40).astype(np.int32)
    for part in split_tile(tile, 13):
        store.write(table_M, read(encoded(part), kv_format))
    pages_M, token_T = torch.from_numpy(table_M).long(), torch.arange(FIRST_TOKEN, FIRST_TOKEN + num_tokens)
    for pages_LBPKD, tokens_KTD in ((store.k_pages_LBPKD, tile.k_KTD), (store.v_pages_LBPKD, tile.v_KTD)):
        q_TKD, scale_TK = quantise_kv_reference(tokens_KTD.transpose(0, 1))
        placed_LBPKD = pages_LBPKD.clone()
        placed_TKD = placed_LBPKD[LAYER, pages_M[token_T // 4], token_T % 4]
        assert torch.equal(placed_TKD, dequantise_kv(q_TKD, scale_TK, dtype))
        placed_LBPKD[LAYER, pages_M[token_T // 4], token_T % 4] = -1
        assert (placed_LBPKD == -1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reading_int8_and_writing_it_again_changes_no_bit(dtype: torch.dtype) -> None:
    """As a job does whose next reader has another epoch: nothing is rounded twice."""
    encoder = TileEncoder(transfer_id="t-1", num_tokens=200, kv_format=format_of(dtype), codec="int8")
    tile = tile_of(31, dtype)
    (first,) = encoder.encode(tile, epoch=1, since=KV_START)
    again = encoder.reissue(first, epoch=2, since=KvPosition(LAYER, FIRST_TOKEN + 7), is_shared=False)
    assert again.message == encoded(tile.part(7, 31))
    assert (again.begin, again.end) == ((LAYER, FIRST_TOKEN + 7), (LAYER, FIRST_TOKEN + 31))
    assert again.payload_bytes == len(decode_message(again.message)[1])


def test_int8_is_about_half_of_bf16_and_its_messages_hold_more_tokens() -> None:
    kv_format = KvFormat(num_layers=1, num_kv_heads=8, head_dim=64, dtype=torch.bfloat16)
    assert kv_format.layer_token_bytes / wire_token_bytes(kv_format, "int8") == pytest.approx(64 / 33)
    assert max_tile_tokens(kv_format, 1 << 20) == 512
    assert max_tile_tokens(kv_format, 1 << 20, "int8") == 992


@given(st.integers(1, len(decode_message(ENCODED)[1])), st.integers(1, 255))
def test_a_damaged_payload_fails_its_checksum_scales_included(from_the_end: int, flip: int) -> None:
    garbled = bytearray(ENCODED)
    garbled[-from_the_end] ^= flip
    with pytest.raises(PeerUnavailable, match="damaged on the way"):
        read(bytes(garbled), format_of())


@pytest.mark.parametrize(("codec", "wanted"), [("raw", "int8"), ("int8", "raw")])
def test_a_tile_in_another_codec_than_was_agreed_on_is_final(codec: str, wanted: str) -> None:
    data = ENCODED if codec == "int8" else encode_tile(tile_of(3), transfer_id="t-1", epoch=2)
    header, payload = decode_message(data)
    with pytest.raises(FingerprintMismatch, match=f"token 62 came in codec {codec}, and {wanted} was asked for"):
        decode_tile(header.tile, payload, format_of(), wanted)  # type: ignore[arg-type]


def test_a_payload_of_another_length_than_its_codec_has_is_final() -> None:
    payload = memoryview(bytes(2 * 2 * 3 * 8 * 4))
    header = pb.TileHeader(num_tokens=3, codec=common_pb2.CODEC_INT8, checksum=xxhash.xxh3_64_intdigest(payload))
    with pytest.raises(FingerprintMismatch, match="came as 384 bytes for 3 tokens; in this node's format they are 120"):
        decode_tile(header, payload, format_of(), "int8")


@pytest.mark.parametrize(
    ("accepted", "codec"),
    [([], "raw"), ([1], "raw"), ([2], "int8"), ([2, 1], "int8"), ([9, 1, 2], "raw"), ([0, 9, 2], "int8")],
)
def test_the_first_codec_that_the_node_knows_is_taken(accepted: list[common_pb2.Codec], codec: str) -> None:
    assert choose_codec(accepted) == codec


def test_a_caller_whose_codecs_are_all_unknown_learns_what_there_is() -> None:
    with pytest.raises(FingerprintMismatch, match=r"in codec raw or int8, the caller accepts 9, 0$"):
        choose_codec([9, 0])  # type: ignore[list-item]  # of a newer node


def test_a_codec_that_is_not_known_is_no_codec_that_was_asked_for() -> None:
    with pytest.raises(FingerprintMismatch, match="came in codec 9, which this node cannot read"):
        require_codec(9, "int8", "what it sends")  # type: ignore[arg-type]  # of a newer node


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_numbers_that_would_come_back_infinite_are_not_sent(kind: str, dtype: torch.dtype) -> None:
    """127 times a scale that was rounded up may be more than the largest number."""
    largest = torch.finfo(dtype).max
    tile = tile_of(5, dtype)
    spoilt = tile.k_KTD if kind == "keys" else tile.v_KTD
    spoilt[1, 3, 2] = 0.99 * largest
    back = decode_tile_of(tile, dtype)
    assert back.isfinite().all()
    spoilt[1, 3, 2] = largest
    with pytest.raises(NotFinite, match="layer 3, tokens 62 to 66, hold NaN, infinities or numbers too large for int8"):
        quantised(tile)


def decode_tile_of(tile: KvTile, dtype: torch.dtype) -> Tensor:
    """Keys and values, as they come back."""
    back = read(encoded(tile), format_of(dtype))
    assert back.scale_ZKT is not None
    pairs = zip((back.k_KTD, back.v_KTD), back.scale_ZKT, strict=True)
    return torch.stack([dequantise_kv(q_KTD.transpose(0, 1), scale_KT.t(), dtype) for q_KTD, scale_KT in pairs])
