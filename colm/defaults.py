"""Defaults shared by the cluster's options, the nodes' own commands, and the options classes of both in Python."""

from typing import Final

GATEWAY_PORT = 8851
"""TCP port of a gateway; over HTTP it listens on the next one. Linux hands out neither by chance (ADR 62)."""
PAGE_TOKENS = 64
"""Tokens in a KV page."""
TILE_TOKENS = 512
"""Tokens that a prefill node computes and sends at a time."""
KV_CACHE_BYTES = 4 << 30
"""Memory of a decode node for keys and values."""
PREFIX_CACHE_BYTES = 1 << 30
"""Memory of a prefill node for what it keeps of earlier prompts: 32K tokens of a 1B model in bf16."""
DECODE_PREFIX_CACHE_BYTES = 2 << 30
"""Of a decode node's memory for keys and values, what may be kept of prompts that no request uses."""
MAX_BATCH_SIZE = 32
"""Answers that a decode node advances together."""
MAX_REQUESTS = 64
"""Most requests at one time, on a decode node and inside a gateway."""
MAX_LOCAL_PREFILL_TOKENS = 32
"""Longest prompt that a decode node computes without a prefill node."""
MAX_DRAFT_TOKENS = 8
"""Tokens that chain 1 may draft before all chains of an answer verify them."""
DRAFT_WEIGHTS: Final = "int8"
"""How the weights lie that draft on a decode node."""
MAX_QUEUED = 64
"""Prompts that may wait for a prefill node."""
MAX_STREAMS = 16
"""Prompts that a prefill node is lent for at a time."""
MAX_QUEUED_S = 3600.0
"""Engine time that may go before a new prompt on a prefill node, as estimated."""
JOB_LEASE_S = 20.0
"""How long a prefill node keeps a prompt whose stream has broken; a lost peer is noticed within 15 s."""
ORPHAN_S = 30.0
"""How long a decode node holds an answer whose call has broken; a gateway restarts within 10 s."""
STALL_S = 30.0
"""How long a reader may keep memory that others wait for without an acknowledgement."""
UPLOAD_IDLE_S = 30.0
"""Longest pause between two pieces of a prompt that is sent."""
DRAIN_S = 30.0
"""How long answers may go on when their gateway stops."""
STOP_GRACE_S = 5.0
"""How long a server that stops lets running calls go on."""
