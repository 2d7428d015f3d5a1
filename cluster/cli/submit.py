"""colm submit: one document, one instruction, one answer."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.answer_view import AnswerView
from cluster.cli.output import DEFAULT_STATE_DIR, INTERRUPTED, JsonFlag, StateDir, note, print_json
from cluster.state import ClusterState
from colm.client import Client
from colm.errors import ClusterError
from colm.request import AttentionMode, KvCodec
from colm.sampling import Constraint, SamplingParams
from colm.upload import Document
from colm.wire.certificates import system_authorities
from colm.wire.members import CLUSTER_NAME
from colm.wire.security import Security, Tls, read_token


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("submit")(submit)


def submit(
    file: Annotated[str, typer.Argument(help="The document, UTF-8; - reads stdin.")],
    prompt: Annotated[str, typer.Option(help="The instruction that follows the document.")] = "",
    chains: Annotated[
        str | None,
        typer.Option(help="Scale of the answer, 1..n; auto: as many as the node's load allows. All chains by default."),
    ] = None,
    min_chains: Annotated[
        int | None,
        typer.Option(help="Fewest chains; the decode node chooses from these to --chains for each token, by its load."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of the answer at most.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the tokens that make up this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Fixes the random choices.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    min_p: Annotated[
        float, typer.Option(help="Keep the tokens that reach this part of the likeliest one's share.")
    ] = 0.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Taken from the logit of each token that the answer has; -2 to 2.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Taken from the logit of a token as often as the answer has it; -2 to 2.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Makes tokens that document or answer has less likely above 1; at most 10.")
    ] = 1.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit; may be repeated.")
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Tokens before which nothing ends the answer.")] = 0,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema; the answer is JSON of it, unless its length cuts it.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that the whole answer matches, unless its length cuts it.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Plain completion, without the chat template.")] = False,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
    attention: Annotated[
        AttentionMode, typer.Option(help="sparse skips what each layer's plan finds light; for long documents.")
    ] = "dense",
    kv_codec: Annotated[
        KvCodec, typer.Option(help="int8 sends keys and values in half the bytes, rounded; for slow networks.")
    ] = "raw",
    max_draft_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that chain 1 may draft for all chains to verify; 0 drafts none. Changes no token."),
    ] = None,
    provisional_first_token: Annotated[
        bool,
        typer.Option(
            "--provisional-first-token",
            help="Show chain 1's own next word, dimmed, before the first one, which confirms or replaces it.",
        ),
    ] = False,
    model: Annotated[str, typer.Option(help="Model name; by default the one that is no variant.")] = "",
    address: Annotated[str | None, typer.Option(help="Gateway host:port; this machine's cluster by default.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="With --address: file with the client token.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="With --address: authority of its certificate, PEM.")] = None,
    system_ca: Annotated[
        bool, typer.Option("--system-ca", help="With --address: trust this system's authorities, and check its name.")
    ] = False,
    server_name: Annotated[
        str | None, typer.Option(help="With --ca-file: name in the certificate, if not that of a cluster's own.")
    ] = None,
    plaintext: Annotated[
        bool, typer.Option("--plaintext", help="With --token-file: send the token without encryption.")
    ] = False,
    reconnect: Annotated[
        bool, typer.Option(help="Go on with the answer when the gateway was lost and is back; else that is an error.")
    ] = True,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    json: JsonFlag = False,
) -> None:
    """Submit a document and print the answer as it comes. Ctrl-C cancels it everywhere."""
    num_chains = _num_chains(chains)
    if chains == "auto" and min_chains is None:
        min_chains = 1
    view = AnswerView(stream_text=not json)
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=tuple(map(_bias, logit_bias or ())),
        min_tokens=min_tokens,
        constraint=_constraint(json_schema, regex),
    )
    try:
        with (
            _connect(address, token_file, ca_file, system_ca, server_name, plaintext, state_dir, reconnect) as client,
            view,
        ):
            answer = client.generate(
                _document(file),
                prompt,
                model=model,
                chat=False if raw else None,
                num_chains=num_chains,
                min_chains=min_chains,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                timeout_s=timeout_s,
                attention=attention,
                kv_codec=kv_codec,
                max_draft_tokens=max_draft_tokens,
                provisional_first_token=provisional_first_token,
            )
            with closing(answer) as events:  # leaving early cancels the request on every node
                for event in events:
                    view.see(event)
    except KeyboardInterrupt:
        note("cancelled")
        raise typer.Exit(INTERRUPTED) from None
    if json:
        print_json(view.record())
    else:
        view.print_summary()


def _bias(word: str) -> tuple[int, float]:
    token_id, _, bias = word.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise ClusterError(f"--logit-bias={word!r} must be a token id and a number, as in 42=-1.5") from None


def _constraint(json_schema: Path | None, regex: str | None) -> Constraint | None:
    if json_schema is not None and regex is not None:
        raise ClusterError("--json-schema and --regex exclude each other; leave one out")
    if json_schema is not None:
        try:
            return Constraint(kind="json_schema", text=json_schema.read_text())
        except (OSError, UnicodeDecodeError) as err:
            raise ClusterError(f"--json-schema={json_schema} is not a text file that can be read: {err}") from err
    return None if regex is None else Constraint(kind="regex", text=regex)


def _num_chains(chains: str | None) -> int | None:
    if chains is None or chains == "auto":
        return None
    if not chains.isdecimal():
        raise ClusterError(f"--chains={chains!r} must be a number of chains, or auto")
    return int(chains)


def _document(file: str) -> Document:
    if file == "-":
        return sys.stdin.buffer
    path = Path(file)
    if not path.is_file():
        raise ClusterError(f"{file} is not a file that can be read; give a path, or - for stdin")
    return path


def _connect(
    address: str | None,
    token_file: Path | None,
    ca_file: Path | None,
    system_ca: bool,
    server_name: str | None,
    plaintext: bool,
    state_dir: Path,
    reconnects: bool,
) -> Client:
    if address is None:
        of_others = {
            "token-file": token_file,
            "ca-file": ca_file,
            "system-ca": system_ca or None,
            "server-name": server_name,
            "plaintext": plaintext or None,
        }
        for name, given in of_others.items():
            if given is not None:
                raise ClusterError(f"--{name} needs --address; this machine's cluster has its own")
        state = ClusterState.require(state_dir)
        return Client(state.gateway_address, state.security, reconnects=reconnects)
    chosen = {"--plaintext": plaintext, "--ca-file": ca_file is not None, "--system-ca": system_ca}
    if sum(chosen.values()) > 1:
        words = " and ".join(word for word, is_chosen in chosen.items() if is_chosen)
        raise ClusterError(f"{words} exclude each other; leave all but one out")
    if server_name is not None and ca_file is None:
        raise ClusterError(f"--server-name={server_name!r} needs --ca-file; --system-ca checks the name in --address")
    if token_file is not None and not any(chosen.values()):
        raise ClusterError(
            f"--token-file without --ca-file would show the token to everybody on the way to {address}; give the "
            "authority of the gateway's certificate, --system-ca if it is a public one, or --plaintext for a cluster "
            "with security.tls off"
        )
    try:
        token = read_token(token_file) if token_file else None
        tls = Tls(ca_pem=ca_file.read_bytes(), server_name=server_name or CLUSTER_NAME) if ca_file else None
        if system_ca:
            tls = Tls(ca_pem=system_authorities(), server_name=None)
    except OSError as err:
        raise ClusterError(f"cannot read {err.filename}: {err.strerror}") from err
    return Client(address, Security(token=token, tls=tls), reconnects=reconnects)
