"""The one open port: TLS 1.3, refusals said in words, and behind it whatever application it is given."""

import asyncio
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from weft.core.errors import JobError

Say = Callable[[str], None]

REASONS = {
    "HTTP_REQUEST": "plain text where only TLS is spoken; a site must use https, which `weft join` does",
    "WRONG_VERSION_NUMBER": "something that is no TLS",
    "UNSUPPORTED_PROTOCOL": "a TLS older than 1.3",
    "NO_SHARED_CIPHER": "no common cipher",
    "TLSV1_ALERT_UNKNOWN_CA": "that its CA did not sign the certificate here; give the site this coordinator's ca.pem",
    "SSLV3_ALERT_BAD_CERTIFICATE": "that the certificate here is not for the name or address that it asked for",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "that the certificate here has expired",
}
"""OpenSSL's reason for a failed handshake -> what the other side sent or said."""


@dataclass
class Listener:
    """A server in a thread of its own."""

    server: uvicorn.Server
    failure: list[BaseException] = field(default_factory=list)

    @property
    def port(self) -> int:
        """Return the number of the open port."""
        return int(self.server.servers[0].sockets[0].getsockname()[1])

    def stop(self) -> None:
        """Close the port."""
        self.server.should_exit = True
        self.thread.join(10)

    def start(self) -> None:
        """Serve until `stop`."""
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.02)

    def _serve(self) -> None:
        try:
            asyncio.run(self._until_stopped())
        except (SystemExit, OSError) as error:  # uvicorn leaves this way where the port is taken
            self.failure.append(error)

    async def _until_stopped(self) -> None:
        """Serve; in the end cut the connections of those who do not answer a goodbye."""
        await self.server.serve()
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0.1)


def listen(app: Any, address: tuple[str, int], cert: Path, key: Path, say: Say) -> Listener:
    """Open a port for an application; raise JobError where it cannot be opened."""
    host, port = address
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="critical",
        ssl_certfile=str(cert),
        ssl_keyfile=str(key),
        timeout_keep_alive=60,
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    try:
        config.load()
    except (OSError, ValueError) as error:
        raise JobError(f"{cert} and {key} are no certificate with its key: {error}") from None
    assert config.ssl
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    config.ssl.sslobject_class = _noting(say)
    listener = Listener(uvicorn.Server(config))
    listener.start()
    if not listener.server.started:
        raise JobError(f"--listen {host}:{port}: cannot be opened; it is in use, below 1024, or not of this machine")
    return listener


def _noting(say: Say) -> type[ssl.SSLObject]:
    """Return a TLS object that says why a handshake failed, which asyncio keeps to itself."""
    last: dict[str, float] = {}

    class Noting(ssl.SSLObject):
        """Handshakes as ever, failures in words."""

        def do_handshake(self) -> None:
            """Perform the handshake; each kind of failure is said at most once in ten seconds."""
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                reason = str(error.reason or error)
                if time.monotonic() - last.get(reason, -60.0) > 10:
                    last[reason] = time.monotonic()
                    say(f"refused: a node sent {REASONS.get(reason, f'a handshake that failed ({reason.lower()})')}")
                raise

    return Noting
