"""A cluster in this process whose every part can be watched, as a status page does."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from prometheus_client import CollectorRegistry

from cluster.client_tokens import Clients
from cluster.node_registry import NodeRegistry
from colm.checkpoint import Checkpoint
from colm.metrics.endpoint import MetricsEndpoint
from colm.nodes import NodeReport, ProcessFacts, Role
from colm.text.tokenizer import Tokenizer
from tests.clock import FakeClock
from tests.gateway import TakingTurns, http_gateway
from tests.nodes import decode_node, prefill_node


@asynccontextmanager
async def watched_cluster(checkpoint: Checkpoint, clients: Clients) -> AsyncIterator[str]:
    """A gateway with its page over one prefill and one decode node; yields its host:port."""
    path, nodes, counts = str(checkpoint.path), NodeRegistry(FakeClock()), CollectorRegistry()
    async with AsyncExitStack() as stack:

        async def serve(registry: CollectorRegistry) -> str:
            endpoint = MetricsEndpoint(registry, host="127.0.0.1", port=0)
            await endpoint.start()
            stack.push_async_callback(endpoint.stop)
            return endpoint.address

        prefill = await stack.enter_async_context(prefill_node(path))
        decode = await stack.enter_async_context(decode_node(path, [prefill.address]))
        for role, node, pages in ((Role.PREFILL, prefill, 0), (Role.DECODE, decode, 64)):
            report = NodeReport(
                role=role,
                replica_id=role.value,
                ray_node_id="here",
                address=node.address,
                metrics_address=await serve(node.metrics),
                num_active_requests=0,
                num_queued_requests=0,
                num_leases=0,
                num_pages_total=pages,
                num_pages_used=0,
                process=ProcessFacts.now(),
            )
            nodes.report(report)
        address = await stack.enter_async_context(
            http_gateway(
                checkpoint.config,
                TakingTurns([decode.address]),
                Tokenizer.load(checkpoint),
                clients=clients,
                nodes=nodes,
                metrics=counts,
                metrics_address=await serve(counts),
            )
        )
        yield address
