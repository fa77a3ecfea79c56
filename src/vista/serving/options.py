"""Settings of the online server, with a unit each, and where each is checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from vista.errors import ConfigError

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait together, may ask for."""

    timeout_s: float = 2.0  # for a request that names no deadline of its own; none is later than this
    max_candidates: int = 10_000  # of one request
    max_events: int = 10_000  # of one request
    max_body_bytes: int = 4 * MEBIBYTE
    max_waiting: int = 256  # requests in a queue; the next one is refused
    max_connections: int = 4096  # over HTTP, idle ones among them; the next one is refused
    max_batch_candidates: int = 16_384  # scored in one batch, of all requests together
    max_exact_items: int = 50_000  # catalogues up to this size are recommended from by scoring every item
    drain_s: float = 10.0  # for requests in flight, after the signal to end


@dataclass(frozen=True)
class ServeOptions:
    """How the server runs. run: a run folder, or a folder of run folders; store: URL.

    Raises ConfigError for values out of range, and for half of a pair.
    """

    run: Path
    store: str
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    limits: Limits = field(default_factory=Limits)
    watch_s: float = 2.0  # between two looks at the store: is it up, which version is published
    degrade: bool = False  # answer from an empty history while the store is away, and say so
    cache_users: int = 0
    cache_ttl_s: float = 0.0
    threads: int = 1
    drain_delay_s: float = 0.0
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    has_page: bool = True  # whether /ui shows the page

    def __post_init__(self) -> None:
        for name, value in (("watch_s", self.watch_s), ("timeout_s", self.limits.timeout_s)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; give a number of seconds above 0")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key belong together; give both or neither")
        if self.cache_users and not self.cache_ttl_s > 0:
            raise ConfigError(
                "cache_users needs cache_ttl_s: for so many seconds a user's tokens may be older than what another "
                "process has written; give a number above 0"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can connect."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def token(self) -> bytes | None:
        """The bearer token that requests must carry, None for no such rule. Raises ConfigError for a useless file."""
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"{self.token_file}: no token can be read ({error.strerror}); check the path") from error
        if not token:
            raise ConfigError(f"{self.token_file} is empty; write a token into it, one line")
        return token
