"""Serve a checkpoint to robots and simulators that speak openpi's websocket protocol (openpi-client, unmodified).

    python eval/serve.py --model_name_or_path runs/pusht                       # ws://127.0.0.1:8000, this machine only
    python eval/serve.py --model_name_or_path USER/NAME --layout libero
    python eval/serve.py --model_name_or_path USER/NAME --layout so100 --units degrees
    python eval/serve.py --model_name_or_path runs/pusht --layout my_robot.yaml --n_action_steps 4 --decoding parallel

To other machines, with a key that each client sends, and TLS:

    head -c 24 /dev/urandom | base64 > key && chmod 600 key
    python eval/serve.py --model_name_or_path runs/pusht --host 0.0.0.0 --api_key_file key --tls_cert C --tls_key K

It listens once every batch size is warm. `python eval/check_server.py ws://127.0.0.1:8000` measures it, and tells
whether latency, chunk and control frequency fit. GET /healthz answers OK. eval/README.md has the messages.
"""

import asyncio
import logging
import signal
import ssl
from dataclasses import dataclass
from pathlib import Path

from vla0_trl.command_line import option, parse, user_errors
from vla0_trl.evaluation.arguments import PolicyArguments
from vla0_trl.joint_units import JOINT_UNITS


@dataclass(kw_only=True)
class Arguments(PolicyArguments):
    layout: str = option(
        "plain", "keys of the robot's messages: plain, libero, pusht, droid, aloha, so100, or a FILE.yaml"
    )
    units: str | None = option(
        None, "of the checkpoint's joints, for so100 (default: as they were converted)", choices=JOINT_UNITS
    )
    host: str = option("127.0.0.1", "address to listen on (default: %(default)s, this machine alone)")
    port: int = option(8000, "0 takes a free one (default: %(default)s)")
    api_key_file: Path | None = option(None, "a file whose one line clients must send as Authorization: Api-Key …")
    tls_cert: Path | None = option(None, "PEM file of the certificate chain, for wss://")
    tls_key: Path | None = option(None, "PEM file of its private key")
    insecure: bool = option(False, "listen beyond this machine without a key")
    max_batch: int = option(8, "robots in one call of the model, at most (default: %(default)s)")
    window_ms: float = option(5.0, "how long a request waits for company (default: %(default)s)")
    max_mb: int = option(32, "MiB of a message, at most (default: %(default)s)")
    max_connections: int = option(64, "at the same time (default: %(default)s)")


def read_key(path: Path) -> str:
    lines = path.read_text().split()
    if len(lines) != 1 or len(lines[0]) < 16:
        raise ValueError(f"{path}: must hold one key of at least 16 characters (head -c 24 /dev/urandom | base64)")
    return lines[0]


def tls_context(args: Arguments) -> ssl.SSLContext | None:
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ValueError("--tls_cert and --tls_key belong together: give both, or neither")
    if args.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(args.tls_cert, args.tls_key)
    return context


async def listen(server, url: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with server:
        latency = ", ".join(f"{name} {ms:.0f} ms" for name, ms in server.engine.percentiles().items())
        print(f"serving on {url}:{server.port}, latency {latency}; Ctrl-C stops", flush=True)
        await stop.wait()


def main() -> None:
    args = parse(Arguments, __doc__)
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("vla0_trl.serving").setLevel(logging.INFO)
    with user_errors():
        from vla0_trl.serving.layouts import load_layout
        from vla0_trl.serving.server import PolicyServer, ServerOptions

        options = ServerOptions(
            host=args.host,
            port=args.port,
            api_key=args.api_key_file and read_key(args.api_key_file),
            tls=tls_context(args),
            insecure=args.insecure,
            max_mb=args.max_mb,
            max_connections=args.max_connections,
        )
        layout = load_layout(args.layout)
    from vla0_trl.evaluation.policy_source import checkpoint_policy  # after parsing: torch takes seconds to import
    from vla0_trl.serving.engine import Engine
    from vla0_trl.serving.requests import RequestReader

    with user_errors():
        source = checkpoint_policy(args)
        policy = source.load(args.execution_of(source.config))
        reader = RequestReader(layout, policy.config, args.units)
        engine = Engine(policy, args.max_batch, args.window_ms / 1000)
        print(
            f"warming up {args.model_name_or_path} on {source.device}, batches of up to {args.max_batch}", flush=True
        )
        engine.warm_up(reader.read(reader.example()))
        engine.start()
        try:
            server = PolicyServer(engine, reader, options, source.checkpoint_hash, source.protocol)
            asyncio.run(listen(server, f"{'wss' if options.tls else 'ws'}://{args.host}"))
        finally:
            engine.stop()


if __name__ == "__main__":
    main()
