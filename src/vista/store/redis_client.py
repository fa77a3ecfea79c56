"""How a Redis or Valkey server is reached: its URL, the client, and whether it keeps what it acknowledges."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vista.errors import StoreError
from vista.store.contract import shown

TIMEOUT_S = 30  # for an answer; a commit of many large records must be on the server's disk by then
CONNECT_TIMEOUT_S = 5


def connect(url: str) -> tuple[Any, bool]:
    """A client for a URL, and whether a cluster is behind it. Raises StoreError where there is no way to it.

    Nothing is sent twice by itself: a rollback that arrived, but whose answer was lost, would be undone.
    """
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise StoreError(
            f"store {shown(url)}: the package redis is not installed; run: pip install 'vista-recsys[redis]'"
        ) from error
    options: dict[str, Any] = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    options |= {"retry": Retry(NoBackoff(), 0), "protocol": 2}  # 3 hides a missing password behind another error
    address = _address(url)
    try:
        client = redis.Redis.from_url(address, **options)
        client.ping()
        if not _is_cluster(client):
            return client, False
        client.close()
        return redis.RedisCluster.from_url(address, **options), True
    except (redis.RedisError, ValueError, OSError) as error:
        raise StoreError(
            f"{shown(url)}: cannot be opened ({error}); is the server up? Check host, port, password and database"
        ) from error


def _address(url: str) -> str:
    """The URL as the client knows it. Raises StoreError for one that the client would read as another."""
    scheme, _, rest = url.partition(":")
    if scheme == "unix":
        path, mark, query = rest.removeprefix("//").partition("?")
        return f"unix://{Path(path).absolute()}{mark}{query}"
    found = re.fullmatch(r"//[^/?]+(/([0-9]*))?(\?.*)?", rest)
    if found is None:
        raise StoreError(f"store {shown(url)}: not of the form {scheme}://[user:password@]host[:port][/db]")
    return url


def _is_cluster(client: Any) -> bool:
    return bool(client.info("cluster").get("cluster_enabled"))


def primaries(client: Any, is_cluster: bool) -> list[Any]:
    """A client for each server that takes writes."""
    return [node.redis_connection for node in client.get_primaries()] if is_cluster else [client]


def is_durable(client: Any, is_cluster: bool) -> bool:
    """Whether every server has on disk what it acknowledges. One that does not tell counts as one that has not."""
    from redis.exceptions import ResponseError

    try:
        settings = [server.config_get("append*") for server in primaries(client, is_cluster)]
    except ResponseError:
        return False
    return all((s.get("appendonly"), s.get("appendfsync")) == ("yes", "always") for s in settings)
