"""``vista serve``: a model and a store, online."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vista.cli.store import URL_HELP

Port = typer.Option(min=0, max=65535, help="0: any that is free.")


def serve(
    run: Annotated[
        Path, typer.Option(help="Run folder; or a folder of them, of which the version published in the store answers.")
    ],
    store: Annotated[str, typer.Option(help=URL_HELP)],
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines reach this one only if told.")
    ] = "127.0.0.1",
    http_port: Annotated[int, Port] = 8000,
    grpc_port: Annotated[int, Port] = 8001,
    timeout_s: Annotated[float, typer.Option(help="Longest time for an answer, in seconds.")] = 2.0,
    max_candidates: Annotated[int, typer.Option(min=1, help="Most candidates of one request.")] = 10_000,
    max_events: Annotated[int, typer.Option(min=1, help="Most events of one request.")] = 10_000,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Largest body of a request.")] = 4_194_304,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most requests that wait in a queue.")] = 256,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Most connections over HTTP, idle ones among them.")
    ] = 4096,
    max_exact_items: Annotated[
        int, typer.Option(min=0, help="Catalogues up to this size are recommended from by scoring every item.")
    ] = 50_000,
    watch_s: Annotated[
        float, typer.Option(help="Seconds between two looks at the store: is it up, and which version is published.")
    ] = 2.0,
    degrade: Annotated[
        bool, typer.Option("--degrade", help="While the store is away, rank from an empty history and say so.")
    ] = False,
    cache_users: Annotated[int, typer.Option(min=0, help="Users whose tokens are kept decoded; 0: none.")] = 0,
    cache_ttl_s: Annotated[
        float, typer.Option(help="How long at most, in seconds; what other processes write is not seen before.")
    ] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one matrix product.")] = 1,
    drain_delay_s: Annotated[
        float, typer.Option(min=0, help="After SIGTERM, seconds of not being ready before connections are closed.")
    ] = 0.0,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds that requests in flight have to end.")] = 10.0,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that requests must carry.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    ui: Annotated[bool, typer.Option(help="Show the page at /ui, on which to look at users and at the server.")] = True,
    data: Annotated[
        Path | None, typer.Option(help="Prepared data: lets the page show whole histories. No ranking needs it.")
    ] = None,
) -> None:
    """Rank, recommend and take events over HTTP and gRPC, from one model and one store.

    Ends on SIGTERM or Ctrl-C when the requests in flight have their answers. Needs the extra `serve`.
    """
    from vista.errors import ConfigError

    try:
        from vista.serving.options import Limits, ServeOptions
        from vista.serving.server import serve as run_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {error.name} is not installed; run: pip install 'vista-recsys[serve]'"
        ) from error
    limits = Limits(
        timeout_s=timeout_s, max_candidates=max_candidates, max_events=max_events, max_body_bytes=max_body_bytes,
        max_waiting=max_waiting, max_connections=max_connections, max_exact_items=max_exact_items, drain_s=drain_s,
    )  # fmt: skip
    options = ServeOptions(
        run, store, host, http_port, grpc_port, limits, watch_s, degrade, cache_users, cache_ttl_s, threads,
        drain_delay_s, token_file, tls_cert, tls_key, ui,
    )  # fmt: skip
    histories = None
    if data is not None:
        from vista.data.histories import PreparedData  # a server without it needs no data tooling

        histories = PreparedData.open(data)
    run_server(options, histories)
