"""Bounds and failures of the server: deadlines, slow senders, new versions, a store that is away, TLS, the end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tests.serving.server import fill, saved_run
from tests.serving.test_deployment import wait_until
from tests.serving.test_server import AT, serving
from vista.cli.main import app
from vista.errors import CheckpointError, StoreError
from vista.serving import connections, server
from vista.serving.connections import MAX_HEAD_BYTES
from vista.serving.metrics import Metrics
from vista.serving.options import Limits, ServeOptions
from vista.serving.scorer import Scorer
from vista.serving.server import bound
from vista.serving.service import Service
from vista.store.contract import open_store
from vista.store.record import user_key


def slow_reads(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[Any]:
    """Make each read for a scoring take a while; the users of all of them, as they come."""
    read, users_read = Scorer.read, []

    def slowly(self: Scorer, users: Any) -> Any:
        users_read.extend(users)
        time.sleep(seconds)
        return read(self, users)

    monkeypatch.setattr(Scorer, "read", slowly)
    return users_read


def test_deadlines_and_full_queues(tmp_path, monkeypatch):
    """What waits beyond its deadline is dropped and not worked on; who finds the queue full is told so at once."""
    with serving(tmp_path, limits=Limits(max_waiting=2, timeout_s=5.0)) as served:
        read = slow_reads(monkeypatch, 0.6)
        answers: list[httpx.Response] = []

        def ask() -> None:
            with httpx.Client(base_url=served.running.url, timeout=20) as client:
                headers = {"x-request-timeout-ms": "300"}
                answers.append(client.post("/v1/rank", json={"user": 1, "candidates": [1]}, headers=headers))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {429, 504}
        assert next(a for a in answers if a.status_code == 429).headers["retry-after"] == "1"
        time.sleep(0.7)
        dropped = served.running.service.metrics.registry.get_sample_value("vista_dropped_total", {"queue": "rank"})
        assert dropped is not None
        assert dropped >= 1
        assert len(read) + dropped + codes.count(429) == 6, "who waited until it was too late is not scored"
        assert served.post("/v1/rank", {"user": 1, "candidates": [1]}).status_code == 200


SLOW = b"POST /v1/rank HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\nx-request-timeout-ms: 300\r\n\r\n"


def trickle(port: int, first: bytes, then: bytes, most_s: float = 10.0) -> tuple[bytes, float]:
    """What a server says to who sends a few bytes at a time, and after how many seconds it hangs up."""
    began_s, said = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=0.02) as connection:
        connection.sendall(first)
        while time.monotonic() < began_s + most_s:
            try:
                part = connection.recv(65536)
                if not part:
                    return said, time.monotonic() - began_s
                said += part
            except TimeoutError:
                pass
            except ConnectionError:
                return said, time.monotonic() - began_s
            try:
                connection.sendall(then)
            except ConnectionError:
                then = b""
    raise AssertionError(f"still connected after {most_s} s; it said {said!r}")


def test_who_sends_a_body_too_slowly_is_told_and_left(tmp_path):
    """However steadily the bytes come: the deadline is that of the whole."""
    with serving(tmp_path) as served:
        said, took_s = trickle(served.running.http_port, SLOW, b" ")
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"the deadline passed with" in said
        assert 0.25 < took_s < 5
        assert served.post("/v1/rank", {"user": 1, "candidates": [1]}).status_code == 200
    labels = {"endpoint": "rank", "code": "408"}
    assert served.running.service.metrics.registry.get_sample_value("vista_requests_total", labels) == 1


@pytest.mark.parametrize(
    ("first", "then", "answer"),
    [
        (b"", b"", b""), (b"", b"\r\n", b""), (b"GET /livez HTTP/1.1\r\n", b"a: b\r\n", b"HTTP/1.1 408 "),
        (b"GET /livez HTTP/1.1\r\n", b"a: " + b"b" * 9000 + b"\r\n", b"HTTP/1.1 431 "),
        (b"GET /livez HTTP/1.1\r\nhost: a\r\ncontent-length: 9999\r\n\r\n", b" ", b"HTTP/1.1 200 "),
    ],
    ids=["nothing", "empty lines", "headers", "large headers", "a body nobody reads"],
)  # fmt: skip
def test_no_connection_is_held_by_who_never_ends_a_request(tmp_path, monkeypatch, first, then, answer):
    monkeypatch.setattr(server, "ARRIVAL_SHARE", 0.03)  # of 20 s
    with serving(tmp_path) as served:
        said, took_s = trickle(served.running.http_port, first, then)
        assert said.startswith(answer)
        assert bool(said) == bool(answer)
        assert (took_s > 0.5) == (b"431" not in answer)
        time.sleep(0.7)
        assert served.client.get("/livez").status_code == 200, "an idle connection has all of its time"


def test_connections_too_many_are_told_so_and_leave_the_others_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "TOO_MANY_S", 0.2)
    with serving(tmp_path, limits=Limits(max_connections=3)) as served:
        port = served.running.http_port
        assert served.client.get("/livez").status_code == 200  # the first
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            time.sleep(0.1)
            said, took_s = trickle(port, b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n", b"")
            assert said.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in said
            assert took_s < 2
            said, took_s = trickle(port, b"", b"")
            assert said == b""
            assert 0.1 < took_s < 5, "who says nothing is not kept, either"
            assert served.post("/v1/rank", {"user": 1, "candidates": [1]}).status_code == 200
        with httpx.Client(base_url=served.running.url) as other:
            wait_until(lambda: other.get("/livez").status_code == 200)  # there is room again
    assert served.running.service.metrics.registry.get_sample_value("vista_connections_refused_total") >= 2


@pytest.mark.parametrize(
    ("wanted", "limits", "most"), [(100, (200, 1000), 100), (1000, (200, 1000), 744), (1000, (200, 300), 150)]
)
def test_as_many_connections_as_files_may_be_open(monkeypatch, wanted, limits, most):
    set_to = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(connections.resource, "setrlimit", lambda which, to: set_to.append(to))
    assert connections.most_connections(wanted) == most
    assert set_to == [(min(wanted + 256, limits[1]), limits[1])]


def test_what_waits_has_one_time_to_end_in_all(tmp_path):
    """Five queues, each with work that takes longer than that."""
    run = saved_run(tmp_path / "run")
    url = str(tmp_path / "store")
    with open_store(url) as store:
        fill(store, run)
        service = Service(ServeOptions(tmp_path / "run", url, limits=Limits(drain_s=0.5)), store, Metrics())
        release = threading.Event()
        for lane in (service._recommend, service._users, service._looks):
            lane.submit(lambda: release.wait(20), time.monotonic() + 60)
        began_s = time.monotonic()
        service.close()
        took_s = time.monotonic() - began_s
        release.set()
    assert 0.4 < took_s < 1.4


def test_large_bodies_do_not_count_as_heads(tmp_path):
    with serving(tmp_path, limits=Limits(timeout_s=20.0)) as served:
        body = json.dumps({"user": 1, "candidates": [1]}).encode() + b" " * (4 * MAX_HEAD_BYTES)
        assert [served.post("/v1/rank", body).status_code for _ in range(2)] == [200, 200]


def test_a_newly_published_version_takes_over_without_a_failed_request(tmp_path):
    with serving(tmp_path, watch_s=0.05) as served:
        other = saved_run(tmp_path / "runs" / "b", seed=1)
        codes, versions, is_over = [], [], threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=served.running.url, timeout=20) as client:
                while not is_over.is_set():
                    answer = client.post("/v1/rank", json={"user": "anna", "candidates": [1, 2], "at": AT})
                    codes.append(answer.status_code)
                    versions.append(answer.json()["model_version"])

        thread = threading.Thread(target=ask)
        thread.start()
        end_s = time.monotonic() + 60
        while not versions and time.monotonic() < end_s:
            time.sleep(0.02)
        fill(served.store, other)
        while other.version not in versions and time.monotonic() < end_s:
            time.sleep(0.02)
        is_over.set()
        thread.join()
        assert set(codes) == {200}
        assert versions[0] == served.run.version
        assert versions[-1] == other.version
        assert versions == sorted(versions, key=lambda version: version == other.version), "once, and not back"


def test_a_version_without_a_run_leaves_the_old_one_in_use(tmp_path, capfd):
    with serving(tmp_path) as served:
        stranger = saved_run(tmp_path / "elsewhere", seed=2)
        fill(served.store, stranger)
        served.running.service.deployment.look()
        assert served.client.get("/readyz").json() == {"ready": True, "model_version": served.run.version}
    assert f"no run has version {stranger.version}" in capfd.readouterr().err


def broken(*arguments: Any) -> None:
    raise StoreError("redis://host: cannot be read (refused); is the server up?")


@pytest.mark.parametrize("degrade", [False, True])
def test_a_store_that_is_away(tmp_path, monkeypatch, degrade):
    """503 with a time to come back, or a cold start that says so; and as before when the store is back."""
    ask = {"user": "anna", "candidates": [1, 2], "at": AT}
    with serving(tmp_path, degrade=degrade) as served:
        before = served.post("/v1/rank", ask).json()
        with monkeypatch.context() as patch:
            for name in ("get_many", "published"):
                patch.setattr(type(served.store), name, broken)
            served.running.service.deployment.look()
            answer = served.post("/v1/rank", ask)
            ready = served.client.get("/readyz")
            lost = served.post("/v1/events", {"events": [{"user": 1, "item": 1, "at": AT}]})
            assert (lost.status_code, lost.headers["retry-after"]) == (503, "1")
            assert served.client.get("/livez").status_code == 200
            if degrade:
                assert answer.json()["is_degraded"]
                assert (answer.json()["is_known_user"], ready.status_code) == (False, 200)
            else:
                assert (answer.status_code, answer.headers["retry-after"], ready.status_code) == (503, "1", 503)
        served.running.service.deployment.look()
        assert served.client.get("/readyz").status_code == 200
        assert served.post("/v1/rank", ask).json() == before


def test_a_damaged_record_fails_its_own_user_alone(tmp_path):
    with serving(tmp_path) as served:
        (blob,) = served.store.get_many("tokens", [user_key("anna")], served.run.version)
        damaged = blob[:100] + bytes([blob[100] ^ 4]) + blob[101:]
        served.store.commit([("tokens", user_key("anna"), damaged)], served.run.version)
        both = {"inputs": [
            {"name": "user", "datatype": "BYTES", "shape": [2], "data": ["7", "anna"]},
            {"name": "candidates", "datatype": "INT64", "shape": [2, 1], "data": [1, 1]},
        ]}  # fmt: skip
        answer = served.post("/v2/models/vista/infer", both)
        assert (answer.status_code, "user 'anna': checksum" in answer.json()["error"]) == (500, True)
        assert served.post("/v1/rank", {"user": 7, "candidates": [1]}).status_code == 200


def test_a_cache_never_hides_an_acknowledged_event(tmp_path):
    with serving(tmp_path, cache_users=10, cache_ttl_s=1000.0) as served:
        ask = {"user": "anna", "candidates": [1, 2, 3], "at": AT}
        first, second = (served.post("/v1/rank", ask).json() for _ in range(2))
        assert first == second
        assert len(served.running.service.model.scorer.cache or ()) == 1
        event = {"user": "anna", "item": 3, "at": "2026-01-01T00:00:00Z"}
        served.post("/v1/events", {"events": [event]})
        assert served.post("/v1/rank", ask).json()["num_events"] == first["num_events"] + 1


def test_a_token_is_asked_for_but_not_of_probers(tmp_path):
    with serving(tmp_path, token=b"secret") as served:
        body = {"user": 1, "candidates": [1]}
        assert served.post("/v1/rank", body).status_code == 401
        assert served.post("/v1/rank", body, authorization="Bearer wrong").status_code == 401
        assert served.post("/v1/rank", body, authorization="Bearer secret").status_code == 200
        assert served.client.get("/readyz").status_code == 200
        assert served.client.get("/metrics").status_code == 401
        triton = pytest.importorskip("tritonclient.grpc")
        client = triton.InferenceServerClient(f"127.0.0.1:{served.running.grpc_port}")
        assert client.is_server_ready()
        with pytest.raises(triton.InferenceServerException, match="UNAUTHENTICATED"):
            client.get_model_metadata("vista")
        assert client.get_model_metadata("vista", headers={"authorization": "Bearer secret"}).name == "vista"
        client.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of this machine's loopback address, signed by itself, and its key."""
    openssl = shutil.which("openssl") or pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
             "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]  # fmt: skip
    subprocess.run([openssl, *words], check=True, capture_output=True)
    return cert, key


def test_both_protocols_speak_tls(tmp_path, certificate):
    """With a certificate, whoever trusts it is answered, and nothing is said in the clear."""
    cert, key = certificate
    with serving(tmp_path, tls_cert=cert, tls_key=key, token=b"secret") as served:
        port, grpc_port = served.running.http_port, served.running.grpc_port
        trusting = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusting, timeout=20) as client:
            body, headers = {"user": 1, "candidates": [1]}, {"authorization": "Bearer secret"}
            assert client.post("/v1/rank", json=body, headers=headers).status_code == 200
            assert client.post("/v1/rank", json=body).status_code == 401
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"https://127.0.0.1:{port}/livez")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{port}/livez")
        triton = pytest.importorskip("tritonclient.grpc")
        client = triton.InferenceServerClient(f"localhost:{grpc_port}", ssl=True, root_certificates=str(cert))
        assert client.is_server_ready()
        client.close()


def test_a_run_and_a_store_that_do_not_match_are_refused_at_the_start(tmp_path):
    run = saved_run(tmp_path / "runs" / "a")
    with open_store(str(tmp_path / "store")) as store:
        with pytest.raises(StoreError, match=f"has no version {run.version}.*vista summarize"):
            Service(ServeOptions(tmp_path / "runs" / "a", "store"), store, Metrics())
        with pytest.raises(StoreError, match="no version is published"):
            Service(ServeOptions(tmp_path / "runs", "store"), store, Metrics())
        fill(store, saved_run(tmp_path / "elsewhere", seed=1))
        with pytest.raises(CheckpointError, match=f"its runs have {run.version}"):
            Service(ServeOptions(tmp_path / "runs", "store"), store, Metrics())


def test_the_command_serves_until_it_is_told_to_end(tmp_path):
    """As a user runs it: ready, answering, no longer ready after SIGTERM but still answering, and a clean end."""
    run = saved_run(tmp_path / "run")
    with open_store(str(tmp_path / "store")) as store:
        fill(store, run)
    places = ["--run", str(tmp_path / "run"), "--store", str(tmp_path / "store")]
    process = subprocess.Popen(
        [sys.executable, "-m", "vista.cli.main", "serve", *places, "--http-port", "0", "--grpc-port", "0",
         "--drain-delay-s", "0.5"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        first = json.loads(process.stderr.readline())
        assert (first["event"], first["version"]) == ("serving", run.version)
        with httpx.Client(base_url=first["http"], timeout=20) as client:
            assert client.get("/readyz").status_code == 200
            process.send_signal(signal.SIGTERM)
            end_s = time.monotonic() + 10
            while (ready := client.get("/readyz")).status_code == 200 and time.monotonic() < end_s:
                time.sleep(0.01)
            assert ready.json()["problem"] == "the server is ending"
            assert client.post("/v1/rank", json={"user": "anna", "candidates": [1]}).status_code == 200
        assert process.wait(20) == 0
        assert json.loads(process.stderr.read().splitlines()[-1])["event"] == "ended"
    finally:
        process.kill()
        process.stderr.close()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--run", "no-run"], "no-run is not there"),
        (["--data", "no-data"], "no-data"),
        (["--store", "no-store"], "there is no store"),
        (["--tls-cert", "cert.pem"], "belong together"),
        (["--tls-cert", "run/config.json", "--tls-key", "run/config.json"], "no certificate and its key"),
        (["--token-file", "no-token"], "no token can be read"),
        (["--cache-users", "5"], "needs cache_ttl_s"),
        (["--timeout-s", "0"], "timeout_s is 0.0"),
        (["--host", "256.0.0.1"], "cannot be had"),
    ],
)
def test_the_command_says_why_it_cannot_start(tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    run = saved_run(tmp_path / "run")
    with open_store(str(tmp_path / "store")) as store:
        fill(store, run)
    given = {"--run": "run", "--store": "store"} | dict(zip(words[::2], words[1::2], strict=True))
    result = CliRunner().invoke(app, ["serve", *(word for pair in given.items() for word in pair)])
    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert reason in result.stderr
    assert not (tmp_path / "no-store").exists()


def test_small_answers_do_not_wait_for_more(tmp_path):
    """asyncio sets TCP_NODELAY on accepted sockets that say they are TCP, as the listening one says."""
    with bound(ServeOptions(tmp_path, "memory:nodelay", http_port=0)) as listening:
        assert listening.proto == socket.IPPROTO_TCP
