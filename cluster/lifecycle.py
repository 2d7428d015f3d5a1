"""`colm up`: starts Ray, the application and the state file, or brings a running cluster to other options."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from cluster.change import (
    as_kept,
    changed,
    has_room_for_both,
    is_another_model,
    require_changeable,
    require_room_for_both,
    require_same_weights,
    weights_stamps,
    with_its_ports,
)
from cluster.client_tokens import TOKENS_FILE, read_clients
from cluster.interrupts import Interrupts
from cluster.local_ray import is_left, is_running, prepare_ray, show_token, start_ray, stop_ray
from cluster.options import ClusterConfig
from cluster.ports import choose_port
from cluster.ray_files import new_ray_root
from cluster.security.certificates import look_after
from cluster.security.exposure import advice_to_clients, own_certificate, require_encryption
from cluster.security.secret_files import SecretFiles, write_secrets
from cluster.state import SECRETS, ClusterState, Joined, alone, make_state_dir, note_joined, read_joined
from cluster.teardown import RAY_TOKEN, Say, clear
from cluster.variants import require_one_chain_1
from colm.checkpoint import Checkpoint
from colm.clock import utc_now
from colm.dtypes import parse_dtype
from colm.errors import ClusterError, ConfigError
from colm.kv import KvFormat
from colm.placement import parse_device, why_unusable
from colm.wire.endpoint import is_loopback, why_not
from colm.wire.tls_files import CA_FILE
from decode_node.kv_layout import KvLayout
from prefill_node.memory import require_room_for_a_tile
from prefill_node.sparse.patterns import PatternFile

_MOST_REPLICAS = 1024
"""Of a role on a Ray of our own: room for more while they are replaced, and for a later `up` that wants more."""


def up(config: ClusterConfig, state_dir: Path, say: Say) -> ClusterState:
    """Bring a cluster up, or a running one to other options.

    A failure or an interruption stops all of what it began to bring up; a change that fails is taken back.

    Args:
        config: what to run.
        state_dir: holds what the other commands need.
        say: called with a line for each step.

    Raises:
        ClusterError, CheckpointError, ConfigError: what is wrong and what to do.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came.
    """
    if config.model.path is None:
        raise ConfigError("model.path is not set; give --model DIR or [model] path in the config file")
    checkpoint = Checkpoint.open(config.model.path)
    require_one_chain_1(config, checkpoint)
    _check_kv(config, checkpoint)
    _check_prefill(config, checkpoint)
    if config.ray.address is None:
        _check_devices(config)
    require_encryption(config)
    make_state_dir(state_dir)
    prepare_ray()
    with alone(state_dir), Interrupts() as interrupts:
        if (running := ClusterState.read(state_dir)) is not None:
            return _change(config, checkpoint, running, state_dir, say)
        if (joined := read_joined(state_dir)) is not None:
            raise ClusterError(
                f"a `colm up` on Ray at {joined.ray_address} was killed and left its replicas; run `colm down` first"
            )
        try:
            if is_left(state_dir / RAY_TOKEN):
                say("stopping the Ray of a `colm up` that was killed")
                stop_ray(state_dir / RAY_TOKEN)
            state = _bring_up(config, checkpoint, state_dir, say)
            interrupts.finish()
            state.write(state_dir)
        except BaseException:
            interrupts.deaf = True
            clear(state_dir, say)
            raise
    return state


def _change(
    config: ClusterConfig, checkpoint: Checkpoint, running: ClusterState, state_dir: Path, say: Say
) -> ClusterState:
    """Bring a running cluster to other options, replica by replica; its clients need not know."""
    if running.ray_pid is not None and not is_running(state_dir / RAY_TOKEN):
        raise ClusterError(f"the Ray of this cluster has ended (state in {state_dir}); run `colm down` first")
    config = with_its_ports(config, running.options)
    changes = changed(running.options, config)
    require_changeable(changes)
    before = ClusterConfig.model_validate(running.options)
    is_another = is_another_model(before, config)
    if not is_another:
        require_same_weights(running.weights_stamps, config, checkpoint)
    if not changes:
        say("the cluster is up with these options already")
        return running
    for name, (has, wants) in changes.items():
        say(f"{name}: {has} -> {wants}")
    if is_another:
        require_room_for_both(config, checkpoint.weights_path)
    show_token(state_dir / RAY_TOKEN)
    secrets = _secrets(config, state_dir, say, is_new=False)
    for danger in _dangers(config):
        say(f"insecure: {danger}")
    if is_another:
        return _succeed(before, config, checkpoint, running, secrets, state_dir, say)
    from cluster import deployment

    beside = has_room_for_both(config, checkpoint.weights_path)
    say(f"replacing replicas, {'beside those that run' if beside else 'one by one'}; answers go on")
    application, address = running.application, running.ray_address
    leaving = {each: section for each, section in before.model.variants.items() if each not in config.model.variants}
    for variant in leaving:
        say(f"{variant} goes; its answers have {config.gateway.drain_s:g} s to end")
    try:
        deployment.change(application, config, checkpoint, secrets, address, beside=beside, leaving=leaving)
    except BaseException as err:
        say(f"taking the change back: {str(err) or 'interrupted'}")
        deployment.change(application, before, checkpoint, secrets, address, beside=beside)
        raise
    state = replace(running, options=as_kept(config), weights_stamps=weights_stamps(config, checkpoint))
    state.write(state_dir)
    return state


def _succeed(
    before: ClusterConfig,
    config: ClusterConfig,
    checkpoint: Checkpoint,
    running: ClusterState,
    secrets: SecretFiles,
    state_dir: Path,
    say: Say,
) -> ClusterState:
    """Bring another model up beside the one that runs, and let it take that one's place (ADR 55)."""
    from cluster import deployment

    state = running
    last, name = before.model.served_name, config.model.served_name
    if last != name:
        say(f"clients that name the model must say {name!r}; [model] name = {last!r} would spare them that")
    say(f"loading {checkpoint.path.name} beside the model that runs")

    def note_successor(application: str) -> None:
        nonlocal state
        state = replace(
            running,
            application=application,
            options=as_kept(config),
            weights_stamps=weights_stamps(config, checkpoint),
        )
        state.write(state_dir)
        say(f"new requests go to {name}; answers of the last model have {config.gateway.drain_s:g} s to end")

    try:
        deployment.succeed(
            running.application, config, checkpoint, secrets, running.ray_address, when_open=note_successor
        )
    except BaseException as err:
        if state is running:
            say(f"taking the change back: {str(err) or 'interrupted'}")
        raise
    return state


def _check_kv(config: ClusterConfig, checkpoint: Checkpoint) -> None:
    """Check the KV cache's size as the replicas will, before anything starts."""
    kv_format = KvFormat.of(checkpoint.config, parse_dtype(config.resolved_dtype))
    for section in config.decode_pools.values():
        KvLayout(kv_format, section.page_tokens, section.kv_cache_dtype).pages_within(section.kv_cache_bytes)


def _check_prefill(config: ClusterConfig, checkpoint: Checkpoint) -> None:
    """Check the file of patterns and the size of tiles as the replicas will, before anything starts."""
    section, model = config.prefill, checkpoint.config
    if section.sparse_patterns is not None:
        PatternFile.read(section.sparse_patterns, model)
    if section.memory_bytes is not None:
        dtype = parse_dtype(config.resolved_dtype)
        try:
            require_room_for_a_tile(model, dtype, tile_tokens=section.tile_tokens, memory_bytes=section.memory_bytes)
        except ConfigError as err:
            raise ConfigError(f"prefill.{err}") from err


def _check_devices(config: ClusterConfig) -> None:
    """Check the devices of replicas on this machine, before anything starts."""
    num_gpus = 0
    for name, section in config.placed.items():
        if (reason := why_unusable(parse_device(section.resolved_device))) is not None:
            raise ConfigError(f"{name}.device={section.device!r} with {name}.num_gpus={section.num_gpus}: {reason}")
        num_gpus += section.most_replicas * section.num_gpus
    if num_gpus and num_gpus > (num_devices := torch.cuda.device_count()):
        raise ConfigError(
            f"the replicas take {num_gpus} GPUs and this machine has {num_devices}; lower num_gpus, replicas or "
            'max_replicas, or let roles share a GPU: num_gpus = 0 and device = "cuda"'
        )


def _with_ports(config: ClusterConfig) -> ClusterConfig:
    """Replace port 0 by a free port, so that a restarted gateway comes back at the same addresses.

    Raises:
        ClusterError: a port is taken, or the host is not this machine's.
    """
    gateway = config.gateway
    wanted = {"port": gateway.port, "http_port": gateway.wanted_http_port}
    for name, port in wanted.items():
        if (reason := why_not(gateway.host, port)) is not None:
            raise ClusterError(f"gateway.host={gateway.host!r} and gateway.{name}={port}: {reason}")
    ports = {name: port or choose_port(gateway.host) for name, port in wanted.items()}
    return config.model_copy(update={"gateway": gateway.model_copy(update=ports)})


def _dangers(config: ClusterConfig) -> list[str]:
    dangers = []
    if config.ray.insecure:
        dangers.append("whoever reaches the ports of this Ray can run code on its machines")
    if config.ray.address is not None and config.security.tls == "off":
        dangers.append("security.tls='off' has the nodes' token, keys and values in plaintext between machines")
    if not is_loopback(host := config.gateway.host):
        if config.security.token == "off":
            dangers.append(f"gateway.host={host!r} admits other machines, and security.token='off' every one of them")
        if config.security.tls == "off":
            dangers.append(f"gateway.host={host!r} admits other machines, and security.tls='off' in plaintext")
    if config.metrics.enabled and not is_loopback(host := config.metrics.host):
        dangers.append(f"metrics.host={host!r} shows the numbers of this cluster to whoever reaches it")
    return dangers


def _secrets(config: ClusterConfig, state_dir: Path, say: Say, *, is_new: bool) -> SecretFiles:
    own, section = own_certificate(config.gateway, say), config.security
    folder = section.folder
    clients_folder = state_dir if folder is None else folder
    if folder is None:
        folder = state_dir / SECRETS
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)  # a killed `up` may have left it
            write_secrets(folder, section.authority)
    read_clients(clients_folder / TOKENS_FILE)  # a damaged one is refused now, rather than left to the gateway's log
    secrets = SecretFiles.of(section, folder, clients_folder=clients_folder, own_certificate=own)
    if secrets.has_tls:
        for complaint in look_after(secrets, utc_now()):
            say(complaint)
    return secrets


def _bring_up(config: ClusterConfig, checkpoint: Checkpoint, state_dir: Path, say: Say) -> ClusterState:
    secrets = _secrets(config, state_dir, say, is_new=True)
    clients = secrets.of_clients()
    ray_address, ray_pid = config.ray.address, None
    if ray_address is None:
        config = _with_ports(config)
        say("starting Ray on this machine")
        resources = dict.fromkeys((section.resource for section in config.placed.values()), _MOST_REPLICAS)
        ray_address, ray_pid = start_ray(
            resources, new_ray_root(state_dir), state_dir / RAY_TOKEN, state_dir / "ray.log"
        )
    from cluster import deployment

    def note_address(address: str) -> None:
        if ray_pid is None:
            note_joined(state_dir, Joined(address, config.ray.application))

    for danger in _dangers(config):
        say(f"insecure: {danger}")
    pools = ", ".join(f"{section.num_replicas} {pool}" for pool, section in config.pools.items())
    say(f"loading {checkpoint.path.name}: {pools}")
    deployed = deployment.deploy(config, checkpoint, secrets, ray_address, note_address)
    own = secrets.own_certificate
    if (advice := advice_to_clients(config, secrets)) is not None:
        say(advice)
    return ClusterState(
        application=config.ray.application,
        gateway_address=deployed.gateway_address,
        http_address=deployed.http_address,
        ray_address=deployed.ray_address,
        ray_pid=ray_pid,
        client_token=clients.token,
        ca_file=str(Path(secrets.folder) / CA_FILE) if secrets.has_tls else None,
        own_certificate=None if own is None else own.certificate,
        options=as_kept(config),
        weights_stamps=weights_stamps(config, checkpoint),
    )
