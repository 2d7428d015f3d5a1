"""What work takes: the machine model of `bench.roofline`, applied to what nodes count of their own steps.

A prefill step's operations are counted by `prefill_node.cost_model`. They take the device

    max(linear flops / gemm rate, a layer's weights / memory rate) + attention flops / its rate + bytes / memory rate

with the host beside or before it, as `bench.roofline.machine` has it. A decode step reads the weights of its largest
scale once, and the keys and values of its answers:

    max((weights + contexts) / memory rate, linear flops / gemm rate)

for all layers, each with its host time. Neither knows of packets, allocators, clocks that fall, or other users.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import torch

from bench.roofline.machine import Machine
from bench.roofline.model import ELEMENT_BYTES, Prompt
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from colm.model.transformer import num_step_parameters
from prefill_node.cost_model import CostModel, PrefillShape, Work

KV_DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeWork:
    """What a decode step reads and computes."""

    num_tokens: Mapping[int, int]
    """Query tokens, by scale."""
    num_context_tokens: int
    """Keys that its rows attend to, summed over rows."""


class Costs(Protocol):
    """Seconds of both kinds of engine, as they are; what nodes believe is `believed`."""

    def prefill_step_s(self, work: Work) -> float:
        """One step of a prefill engine, of one prompt or of several as one."""

    def decode_step_s(self, work: DecodeWork) -> float:
        """One step of a decode engine, with all that its loop does around it."""

    def believed(self) -> CostModel:
        """What a prefill node believes as it starts; one object for each node, which corrects its own."""


@dataclass(frozen=True, kw_only=True)
class MachineCosts:
    """Both engines on one kind of machine."""

    machine: Machine
    config: ChainConfig
    tile_tokens: int

    def prefill_step_s(self, work: Work) -> float:
        """By the module's formula; bytes that small operations move are taken in proportion to linear flops."""
        machine, layer = self.machine, self._layer_tile
        per_flop = layer.moved_bytes / layer.linear_flops
        linear_s = work.linear_flops / (machine.gemm_gflops_per_s * 1e9)
        if work.linear_flops:
            linear_s = max(linear_s, layer.weight_bytes / (machine.memory_gb_per_s * 1e9))
        attention_s = work.attention_flops / (machine.attention_gflops_per_s * 1e9)
        moved_s = work.linear_flops * per_flop / (machine.memory_gb_per_s * 1e9)
        return machine.step_seconds(linear_s + attention_s + moved_s)

    def decode_step_s(self, work: DecodeWork) -> float:
        """By the module's formula."""
        machine, num_layers = self.machine, self.config.num_layers
        read = scale_bytes(self.config, max(work.num_tokens)) + work.num_context_tokens * self._kv_token_bytes
        # Two operations for each weight, which has two bytes.
        flops = sum(num * scale_bytes(self.config, scale) for scale, num in work.num_tokens.items())
        device_s = max(read / (machine.memory_gb_per_s * 1e9), flops / (machine.gemm_gflops_per_s * 1e9))
        return num_layers * machine.decode_layer_seconds(device_s / num_layers)

    def believed(self) -> CostModel:
        """As calibration would find it: the rates, and a step of no work."""
        machine = self.machine
        return CostModel(
            shape=PrefillShape.of(self.config, self.tile_tokens),
            linear_flop_s=1 / (machine.gemm_gflops_per_s * 1e9),
            attention_flop_s=1 / (machine.attention_gflops_per_s * 1e9),
            step_s=machine.step_s,
        )

    @cached_property
    def _kv_token_bytes(self) -> int:
        return KvFormat.of(self.config, KV_DTYPE).token_bytes

    @cached_property
    def _layer_tile(self) -> "_LayerTile":
        (tile,) = Prompt(config=self.config, num_tokens=1, tile_tokens=1).tiles()
        halves = tile.keys_values, tile.rest
        return _LayerTile(
            linear_flops=sum(each.linear_flops for each in halves),
            weight_bytes=sum(each.weight_bytes for each in halves),
            moved_bytes=sum(each.moved_bytes for each in halves),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _LayerTile:
    """One token in one layer."""

    linear_flops: float
    weight_bytes: float
    moved_bytes: float


@cache
def scale_bytes(config: ChainConfig, num_chains: int) -> int:
    """Weights that a decode step at a scale reads, in bf16."""
    return num_step_parameters(config, num_chains) * ELEMENT_BYTES
