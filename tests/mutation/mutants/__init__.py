"""Named mutations of the serving path, by the part that they break."""

from tests.mutation.mutant import Mutant
from tests.mutation.mutants import (
    autoscaling,
    bench,
    cluster,
    colm,
    decode_requests,
    decode_steps,
    gateway,
    kernels,
    page_sharing,
    prefill_engine,
    prefill_streams,
    prefix_cache,
    scale,
    simulate,
    wire,
)

MUTANTS: tuple[Mutant, ...] = (
    *autoscaling.MUTANTS,
    *bench.MUTANTS,
    *cluster.MUTANTS,
    *colm.MUTANTS,
    *decode_requests.MUTANTS,
    *decode_steps.MUTANTS,
    *gateway.MUTANTS,
    *kernels.MUTANTS,
    *page_sharing.MUTANTS,
    *prefill_engine.MUTANTS,
    *prefill_streams.MUTANTS,
    *prefix_cache.MUTANTS,
    *scale.MUTANTS,
    *simulate.MUTANTS,
    *wire.MUTANTS,
)
