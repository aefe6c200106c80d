"""``flip-obs serve``: an observer beside the server, for as long as it is wanted."""

from __future__ import annotations

import gc
import logging
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from flip_observability.cli.common import CommandError, console, ledger_directory
from flip_observability.settings import Settings


def serve(
    ctx: typer.Context,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 in a container.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 picks a free one.")] = 9464,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate and its chain (PEM): serve HTTPS.", show_default=False)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="The certificate's private key (PEM).", show_default=False)
    ] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="Let in only clients with a certificate of this CA (PEM).", show_default=False)
    ] = None,
) -> None:
    """Observe the ledger until SIGTERM or Ctrl-C: serve its metrics, tell the hub, end what died."""
    from flip_observability.exporter import TLS, ExporterError
    from flip_observability.observer import Observer
    from flip_observability.sentinel import Sentinel

    settings = Settings.load()
    directory = ledger_directory(ctx)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("flip_observability").setLevel(logging.INFO)  # what the libraries do is of no interest
    tls = TLS(tls_cert, tls_key, client_ca)
    sentinel = Sentinel(settings, directory.absolute())
    # The server makes the ledger: its folder may come with the first run, and must be the server's user's.
    observer = Observer(
        settings,
        directory.absolute(),
        host=host,
        port=port,
        tls=tls,
        sentinel=sentinel,
        insist=True,
        make_ledger=False,
    )
    sentinel.on_final = lambda: observer.nudge("dispatcher")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        observer.start()
    except ExporterError as error:
        raise CommandError(str(error)) from None
    out = console()
    url = observer.exporter.url if observer.exporter is not None else ""
    out.print(
        f"Serving {url}/metrics from the ledger in {directory} (net {settings.net_id}). Ctrl-C ends it.", soft_wrap=True
    )
    # What is there now stays: otherwise garbage collection looks at all of it, in the middle of every 50th scrape.
    gc.collect()
    gc.freeze()
    while not ended.wait(1.0):  # a bare wait would keep signals from being seen on some platforms
        pass
    observer.stop()
    sentinel.close()
    out.print("Stopped.")
