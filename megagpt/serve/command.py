"""`megagpt serve RUN_DIR`: a trained model behind OpenAI's API, and a page to try it (L3)."""

import argparse
import ipaddress
import logging
import math
import os
import signal
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from megagpt.errors import UsageError
from megagpt.serve.limits import Limits
from megagpt.use.loading import add_placing, add_run_dir, add_split, cache_bytes
from megagpt.use.options import add_fields, given

if TYPE_CHECKING:
    from megagpt.serve.answering import Served
    from megagpt.use.generator import Generator

log = logging.getLogger("megagpt.serve")

KEY = "MEGAGPT_API_KEY"
"""Variable with the key, which other users of a host do not see."""
CONNECTIONS = 900
"""Open at a time; a process commonly has 1,024 descriptors."""
KEEP_ALIVE_S = 60
"""Seconds that an idle connection is kept for its next request."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Serves /v1/completions, /v1/chat/completions (where the tokenizer has tokens "
        "for turns), /v1/models, /tokenize, /detokenize, /health, /metrics, and a page at /. "
        "Needs FastAPI and uvicorn: pip install -e '.[serve]' in megagpt's checkout."
    )
    parser.epilog = (
        "SIGTERM and Ctrl-C take no more requests, finish those that are there and exit with 0."
    )
    add_run_dir(parser)
    option = parser.add_argument
    option("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    option("--port", type=int, default=8000, help="port; 0: any that is free (default: 8000)")
    option("--name", help="the model's name for clients (default: the folder's)")
    option(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(KEY, ""),
        help=f"what clients must send; needed off this machine (default: ${KEY})",
    )
    option(
        "--allow-origin",
        metavar="URL",
        action="append",
        default=[],
        help="web pages of this origin may ask, too; repeatable (default: none)",
    )
    add_fields(parser, Limits)
    option(
        "--batch-invariant",
        action="store_true",
        help="multiply texts one by one: each is bit for bit what it would be alone, and a batch "
        "takes as long as its texts one after another",
    )
    add_placing(parser)
    add_split(parser, "serve")


def run(args: argparse.Namespace) -> None:
    """Serves until a signal."""
    limits = Limits(**given(args, Limits))
    limits.check()
    if not args.api_key and not _is_loopback(args.host):
        raise UsageError(
            f"--host {args.host}: other machines could use the model; give --api-key or the "
            f"variable {KEY}, or listen at 127.0.0.1"
        )
    if not all("!" <= letter <= "~" for letter in args.api_key):
        raise UsageError("--api-key: must be ASCII without spaces, since it travels in a header")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"megagpt serve needs FastAPI and uvicorn ({error}); pip install -e '.[serve]' in "
            "megagpt's checkout"
        ) from None
    from megagpt.use.together import placed_generator

    # A port that is taken is told before the model is loaded; of several ranks one listens.
    listener = None if args.split else _bound(args.host, args.port)
    with placed_generator(args, limits.concurrent, args.batch_invariant) as (generator, facts):
        if generator is not None:
            served = served_by(generator, facts, args.name or args.folder.absolute().name, limits)
            _listen(args, listener or _bound(args.host, args.port), served)


def _listen(args: argparse.Namespace, listener: socket.socket, served: "Served") -> None:
    """Answers until a signal."""
    import uvicorn

    from megagpt.serve.app import build_app
    from megagpt.serve.gate import punctual

    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    config = uvicorn.Config(
        build_app(served, args.api_key, args.allow_origin),
        http=punctual(served.limits.receive_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(served.limits.drain_s),
    )
    server = uvicorn.Server(config)

    def end(number: int, frame: FrameType | None) -> None:
        # Before uvicorn listens for signals; also it passes on the one that ended it, when all is
        # done, and that is the end as wished.
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("serving %s at http://%s:%d (API: /v1)", served.name, shown, port)
    server.run(sockets=[listener])
    log.info("stopped")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises UsageError for one that cannot be had."""
    if not 0 <= port < 1 << 16:
        raise UsageError(f"--port {port}: must be 0 to 65535")
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Taken by another only now, where both may bind.
        listener.listen(1)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        raise UsageError(
            f"--host {host} --port {port}: cannot listen there ({error}); choose another"
        ) from None
    return listener


def served_by(generator: "Generator", facts: dict[str, Any], name: str, limits: Limits) -> "Served":
    """What a server of this name answers with."""
    from megagpt.serve.answering import Served
    from megagpt.serve.scheduler import Scheduler

    log.info("{checkpoint}: step {step}, trained on {tokens:,} tokens".format(**facts))
    itemsize = next(generator.model.parameters()).dtype.itemsize
    positions = [generator.n_ctx] * generator.rows
    size = cache_bytes(generator.model.config, positions, itemsize)
    log.info(
        "keys and values: %s at most for %d texts of %d tokens",
        f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB",
        generator.rows,
        generator.n_ctx,
    )
    scheduler = Scheduler(generator, limits)
    return Served(
        name=name, facts=facts, scheduler=scheduler, limits=limits, created=int(time.time())
    )
