"""The codecs of the KV stream: which one two ends agree on, and what each makes of a tile.

    raw     keys, values                          in the cache's dtype
    int8    keys, values, scale_ZKT               in int8, the scales in bf16

Shapes: K kv heads, T tokens of a tile, D head dim, Z the two of keys and values.
"""

from collections.abc import Iterable

import torch
from colm_kernels.kv_quantise import LARGEST, write_quantised_kv

from colm.errors import FingerprintMismatch, NotFinite
from colm.kv import KvFormat, KvTile
from colm.request import KV_CODECS, KvCodec
from colm.wire.messages import CODECS
from colm.wire.v1 import common_pb2 as pb


def choose_codec(accepted: Iterable[pb.Codec]) -> KvCodec:
    """The first of a caller's codecs that this node sends; raw where the caller names none.

    Raises:
        FingerprintMismatch: it sends none of them.
    """
    if not (values := list(accepted)):
        return "raw"
    names = {value: codec for codec, value in CODECS.items()}
    for value in values:
        if value in names:
            return names[value]
    raise FingerprintMismatch(
        f"this prefill node sends keys and values in codec {' or '.join(KV_CODECS)}, "
        f"the caller accepts {', '.join(map(codec_name, values))}"
    )


def require_codec(value: pb.Codec, wanted: KvCodec, what: str) -> None:
    """Refuse what comes in another codec than was asked for.

    Raises:
        FingerprintMismatch: names both; a retry cannot help.
    """
    if value not in CODECS.values():
        raise FingerprintMismatch(f"{what} came in codec {codec_name(value)}, which this node cannot read")
    if value != CODECS[wanted]:
        raise FingerprintMismatch(f"{what} came in codec {codec_name(value)}, and {wanted} was asked for")


def codec_name(value: pb.Codec) -> str:
    """As users write it; the number of one that is not known."""
    return next((codec for codec, known in CODECS.items() if value == known), str(value))


def codec_of(tile: KvTile) -> KvCodec:
    """In which a tile is written as it is."""
    return "raw" if tile.scale_ZKT is None else "int8"


def wire_token_bytes(kv_format: KvFormat, codec: KvCodec) -> int:
    """Keys and values of one token in one layer, as payload."""
    if codec == "raw":
        return kv_format.layer_token_bytes
    return 2 * kv_format.num_kv_heads * (kv_format.head_dim + torch.bfloat16.itemsize)


def quantised(tile: KvTile) -> KvTile:
    """A raw tile in int8, by `colm_kernels.kv_quantise`. Each row has a scale of its own, so parts give the same bits.

    Raises:
        NotFinite: it holds NaN, infinities or numbers so large that int8 might make infinities of them.
    """
    dtype = tile.k_KTD.dtype
    q_ZKTD = torch.empty((2, *tile.k_KTD.shape), dtype=torch.int8, device=tile.k_KTD.device)
    scale_ZKT = torch.empty(q_ZKTD.shape[:3], dtype=torch.bfloat16, device=q_ZKTD.device)
    for tokens_KTD, q_KTD, scale_KT in zip((tile.k_KTD, tile.v_KTD), q_ZKTD, scale_ZKT, strict=True):
        write_quantised_kv(tokens_KTD.transpose(0, 1), q_KTD.transpose(0, 1), scale_KT.t())
    # A row that is not finite has the scale NaN, which is no more than nothing.
    if not scale_ZKT.max().item() <= torch.finfo(dtype).max / LARGEST:
        raise not_finite(tile, "NaN, infinities or numbers too large for int8")
    return KvTile(tile.layer, tile.first_token, q_ZKTD[0], q_ZKTD[1], scale_ZKT)


def read_payload(
    payload: memoryview, codec: KvCodec, kv_format: KvFormat, *, layer: int, first_token: int, num_tokens: int
) -> KvTile:
    """The tile of a payload of the right length, as views into it."""
    shape = (2, kv_format.num_kv_heads, num_tokens, kv_format.head_dim)
    if codec == "raw":
        k_KTD, v_KTD = torch.frombuffer(payload, dtype=kv_format.dtype).view(shape)
        return KvTile(layer, first_token, k_KTD, v_KTD)
    num_values = num_tokens * kv_format.layer_token_bytes // kv_format.dtype.itemsize
    k_KTD, v_KTD = torch.frombuffer(payload, dtype=torch.int8, count=num_values).view(shape)
    scale_ZKT = torch.frombuffer(payload, dtype=torch.bfloat16, offset=num_values).view(shape[:3])
    return KvTile(layer, first_token, k_KTD, v_KTD, scale_ZKT)


def not_finite(tile: KvTile, what: str) -> NotFinite:
    """The error of a tile that cannot be sent."""
    return NotFinite(
        f"the keys or values of layer {tile.layer}, tokens {tile.first_token} to "
        f"{tile.first_token + tile.num_tokens - 1}, hold {what}; the model's weights or its dtype are at fault"
    )
