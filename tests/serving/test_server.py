"""The server as clients see it: HTTP for people, the Open Inference Protocol with others' client, bad input."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vista.serving.recommend
from tests.serving.server import Running, fill, running, saved_run
from tests.serving.test_scorer import USERS
from vista.checkpoint import Run
from vista.errors import RecordError
from vista.serving.events import EventWriter
from vista.serving.lanes import Job
from vista.serving.metrics import Metrics
from vista.serving.options import Limits, ServeOptions
from vista.serving.requests import PostedEvent
from vista.serving.scorer import Scorer
from vista.store.contract import SummaryStore, open_store
from vista.store.record import user_key

AT, AT_US = "2033-05-18T03:33:20Z", 2_000_000_000_000_000
LIMITS = Limits(max_candidates=500, max_events=50, max_body_bytes=20_000, timeout_s=5.0)


class Served:
    """A server, a client of it, and what is behind it."""

    def __init__(self, running: Running, run: Run, store: SummaryStore) -> None:
        self.running, self.run, self.store = running, run, store
        self.client = httpx.Client(base_url=running.url, timeout=20)

    def post(self, path: str, content: Any, **headers: str) -> httpx.Response:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.client.post(path, content=body, headers=headers)


@contextmanager
def serving(folder: Path, token: bytes | None = None, num_layers: int = 2, **changes: Any) -> Iterator[Served]:
    run = saved_run(folder / "runs" / "a", num_layers=num_layers)
    with open_store(str(folder / "store")) as store:
        fill(store, run)
        changes = {"limits": LIMITS, "watch_s": 60.0} | changes
        options = ServeOptions(folder / "runs", "store", **changes)
        with running(options, store, token) as found:
            served = Served(found, run, store)
            yield served
            served.client.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as found:
        yield found


# -- answers


def test_a_ranking_is_that_of_the_scorer_best_first(served):
    items = [3, 7, "no such item", 11]
    body = {"user": "anna", "candidates": items, "at": AT, "context": {"price": [9.0, None, 3, 4], "device": "phone"}}
    answer = served.post("/v1/rank", body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    model = served.running.service.model
    context = model.context.read(body["context"], 4)
    (expected,) = Scorer(served.run, served.store).rank(["anna"], [items], AT_US, [context])
    scores = {one["item"]: one["scores"] for one in found["candidates"]}
    for item, probability in zip(items, expected.probability, strict=True):
        assert scores[item] == pytest.approx(dict(zip(("click", "like"), probability, strict=True)), rel=1e-5)
    clicks = [one["scores"]["click"] for one in found["candidates"]]
    assert clicks == sorted(clicks, reverse=True)
    assert [one["item"] for one in found["candidates"] if not one["is_known"]] == ["no such item"]
    assert (found["num_events"], found["is_known_user"], found["model_version"]) == (40, True, served.run.version)
    plain = served.post("/v1/rank", body | {"context": None}).json()["candidates"]
    assert {one["item"]: one["scores"] for one in plain} != scores, "context says something"


def test_an_unknown_user_is_a_cold_start(served):
    found = served.post("/v1/rank", {"user": "nobody", "candidates": [1], "at": AT_US}).json()
    assert (found["is_known_user"], found["num_events"], found["as_of"]) == (False, 0, None)


def test_an_acknowledged_event_is_in_the_next_ranking(served):
    """And it is durable: another reader of the store has it. Posted again, it is a duplicate."""
    ask = {"user": 7, "candidates": list(range(20)), "at": AT}
    before = served.post("/v1/rank", ask).json()
    event = {"user": 7, "item": 12, "at": "2026-01-02T03:04:05Z", "action": "b", "event_id": "e1"}
    answer = served.post("/v1/events", {"events": [event]})
    assert answer.json()["outcomes"] == ["applied"], answer.text
    after = served.post("/v1/rank", ask).json()
    assert after["num_events"] == before["num_events"] + 1
    assert after["as_of"] == "2026-01-02T03:04:05Z"
    assert after["candidates"] != before["candidates"]
    assert int(Scorer(served.run, served.store).read([7]).num_events[0]) == after["num_events"]
    assert served.post("/v1/events", {"events": [event]}).json()["counts"]["duplicate"] == 1
    user = served.client.get("/v1/users/7").json()
    assert user["recent_events"][0] == {"item": 12, "is_known": True, "action": "b", "at": "2026-01-02T03:04:05Z"}
    assert user["num_events"] == after["num_events"]
    assert served.client.get("/v1/users/nobody").status_code == 404


def test_many_at_once_get_what_each_gets_alone(served):
    """Users and numbers of candidates mixed, so that batches are."""
    asks = [{"user": USERS[i % 5], "candidates": list(range(1 + 7 * i)), "at": AT} for i in range(24)]
    alone = [served.post("/v1/rank", ask).json() for ask in asks]
    together: list[Any] = [None] * len(asks)

    def ask(place: int) -> None:
        with httpx.Client(base_url=served.running.url, timeout=20) as client:
            while (answer := client.post("/v1/rank", json=asks[place])).status_code == 429:  # on a busy machine
                time.sleep(0.1)
            together[place] = answer.json()

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        scores = ({c["item"]: c["scores"]["click"] for c in answer["candidates"]} for answer in (one, other))
        assert next(scores) == pytest.approx(next(scores), rel=1e-5)


def test_concurrent_posts_are_all_kept(served):
    outcomes: list[str] = []

    def post(place: int) -> None:
        event = {"user": "crowd", "item": place % 40, "at": 1_700_000_000_000_000 + place * 1_000_000}
        with httpx.Client(base_url=served.running.url, timeout=20) as client:
            outcomes.extend(client.post("/v1/events", json={"events": [event]}).json()["outcomes"])

    threads = [threading.Thread(target=post, args=(place,)) for place in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"applied", "sorted in", "replayed"}, "all of which are in; which one, their order decides"
    assert len(outcomes) == 16
    assert served.client.get("/v1/users/crowd").json()["num_events"] == 16


def test_a_recommendation_is_the_best_of_all_items(served):
    items = list(range(40))
    ranked = served.post("/v1/rank", {"user": "anna", "candidates": items, "at": AT}).json()["candidates"]
    found = served.post("/v1/recommend", {"user": "anna", "k": 5, "at": AT}).json()
    assert found["is_exact"]
    assert [one["item"] for one in found["items"]] == [one["item"] for one in ranked[:5]]
    filters = {"exclude": [ranked[0]["item"], "unknown"], "category": {"category": ["a", "b"]}, "exclude_seen": True}
    chosen = served.post("/v1/recommend", {"user": "anna", "k": 40, "at": AT, "filters": filters}).json()["items"]
    features = served.run.catalogue.features[served.run.catalogue.first_item :, 0]
    seen = {e["item"] for e in served.client.get("/v1/users/anna").json()["recent_events"]}
    wanted = {i for i in items if features[i] in (1, 2)} - {ranked[0]["item"]} - seen
    assert {one["item"] for one in chosen} == wanted
    assert wanted


def test_items_that_filters_leave_are_all_scored_where_they_are_few(tmp_path, monkeypatch):
    """However few items the first stage lets through."""
    monkeypatch.setattr(vista.serving.recommend, "NUM_FIRST", 1)
    monkeypatch.setattr(vista.serving.recommend, "NUM_NEIGHBOURS", 1)
    with serving(tmp_path, limits=replace(LIMITS, max_exact_items=10)) as served:
        few = served.post("/v1/recommend", {"user": "nobody", "k": 40, "at": AT}).json()
        ids = served.run.catalogue.ids.tolist()
        filters = {"exclude": ids[10:]}
        found = served.post("/v1/recommend", {"user": "nobody", "k": 40, "at": AT, "filters": filters}).json()
    assert len(few["items"]) < 10
    assert {one["item"] for one in found["items"]} == set(ids[:10])
    assert found["is_exact"]
    assert not few["is_exact"]


def test_the_first_stage_lets_the_best_items_through(tmp_path):
    limits = Limits(max_exact_items=0, timeout_s=5.0)
    with serving(tmp_path, limits=limits) as served:
        found = served.post("/v1/recommend", {"user": "anna", "k": 3, "at": AT}).json()
        ranked = served.post("/v1/rank", {"user": "anna", "candidates": list(range(40)), "at": AT}).json()
    assert not found["is_exact"]
    assert [one["item"] for one in found["items"]] == [one["item"] for one in ranked["candidates"][:3]]


def test_metrics_tell_what_happened(served):
    served.post("/v1/rank", {"user": "nobody", "candidates": [1]})
    served.post("/v1/rank", {"user": "nobody"})
    lines = served.client.get("/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    assert values['vista_requests_total{code="200",endpoint="rank"}'] >= 1
    assert values['vista_requests_total{code="400",endpoint="rank"}'] >= 1
    assert values["vista_store_misses_total"] >= 1
    assert values[f'vista_model_info{{version="{served.run.version}"}}'] == 1
    for stage in ("queue", "read", "score", "total"):
        assert values[f'vista_stage_seconds_count{{endpoint="rank",stage="{stage}"}}'] >= 1


def test_a_request_id_is_given_back(served):
    assert served.client.get("/livez", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert len(served.client.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"]) == 32


def test_the_examples_of_the_document_run(served):
    curl = shutil.which("curl") or pytest.skip("needs curl")
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("curl ")]
    assert len(lines) > 4
    for line in lines:
        words = shlex.split(line.replace("http://127.0.0.1:8000", served.running.url))[1:]
        answer = subprocess.run([curl, "--fail-with-body", *words], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, f"{line}: {answer.stdout}"
        assert answer.stdout


# -- the Open Inference Protocol, with the client that others use


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("is_binary", [True, False])
def test_the_clients_of_others_work_unchanged(served, kind, is_binary):
    module = pytest.importorskip(f"tritonclient.{kind}")
    port = served.running.http_port if kind == "http" else served.running.grpc_port
    client = module.InferenceServerClient(f"127.0.0.1:{port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("vista")
    assert client.is_model_ready("vista", served.run.version)
    metadata = client.get_model_metadata("vista")
    versions = metadata["versions"] if kind == "http" else metadata.versions
    assert list(versions) == [served.run.version]
    user = module.InferInput("user", [2], "BYTES")
    items = module.InferInput("candidates", [2, 3], "INT64")
    at_us = module.InferInput("at_us", [1], "INT64")
    options = {"binary_data": is_binary} if kind == "http" else {}
    user.set_data_from_numpy(np.array([b"anna", "zoë".encode()], object), **options)
    items.set_data_from_numpy(np.array([[1, 2, 999], [4, 5, 6]]), **options)
    at_us.set_data_from_numpy(np.array([AT_US]), **options)
    outputs = [module.InferRequestedOutput(name, **options) for name in ("scores", "is_known_item", "num_events")]
    found = client.infer("vista", [user, items, at_us], outputs=outputs, request_id="r1")
    expected = Scorer(served.run, served.store).rank(["anna", "zoë"], [[1, 2, 999], [4, 5, 6]], AT_US)
    np.testing.assert_allclose(found.as_numpy("scores"), [one.probability for one in expected], rtol=1e-5)
    assert found.as_numpy("is_known_item").tolist() == [[True, True, False], [True] * 3]
    assert found.as_numpy("num_events").tolist() == [one.num_events for one in expected]
    assert found.as_numpy("as_of_us") is None
    flat = module.InferInput("candidates", [3], "INT64")
    flat.set_data_from_numpy(np.array([1, 2, 3]))
    with pytest.raises(Exception, match=r"input user: shape \[2\] for 1 users"):
        client.infer("vista", [user, flat])
    client.close()


# -- what is refused

REFUSED = [
    (b"", "not JSON"), (b"[]", "give an object"), (b"\xff", "byte 0 is not UTF-8"), (b"[" * 5000, "nested too deeply"),
    (b'{"user": 1, "user": 2}', "stands twice"), (b'{"user": NaN, "candidates": [1]}', "NaN is not JSON"),
    (b'{"user": 1, "candidates": [Infinity]}', "Infinity is not JSON"), (b'{"user": 1}', "candidates is missing"),
    (b'{"user": 1, "candidates": []}', "at least one"), (b'{"user": true, "candidates": [1]}', "user is true"),
    (b'{"user": 1.5, "candidates": [1]}', "user is 1.5"), (b'{"user": null, "candidates": [1]}', "user is null"),
    (b'{"user": "", "candidates": [1]}', "user is"), (b'{"user": 1, "candidates": [1, {}]}', "candidates[1] is dict"),
    (b'{"user": 1, "candidates": ["\\ud800"]}', "an id is"), (b'{"user": 1, "candidates": [1e999]}', "is Infinity"),
    (b'{"user": 1, "candidates": [9223372036854775808]}', "an id is"),
    (b'{"user": 1, "candidates": [1], "candidate": 1}', "did you mean 'candidates'"),
    (b'{"user": 1, "candidates": [1], "at": "soon"}', "at is"),
    (b'{"user": 1, "candidates": [1], "at": -1}', "at is -1"),
    (b'{"user": 1, "candidates": [1], "context": {"prise": 1}}', "did you mean 'price'"),
    (b'{"user": 1, "candidates": [1], "context": {"price": "a"}}', "finite number"),
    (b'{"user": 1, "candidates": [1], "context": {"price": 1e39}}', "finite number"),
    (b'{"user": 1, "candidates": [1], "context": {"price": [1, 2]}}', "2 values for 1 candidates"),
    (b'{"user": 1, "candidates": [1], "context": {"device": 3}}', "give a string"),
    (b'{"user": 1, "candidates": [' + b"9" * 5000 + b"]}", "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_gets_a_reason(served, body, reason):
    answer = served.post("/v1/rank", body)
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]


def test_what_is_too_much_is_refused(served):
    assert served.post("/v1/rank", {"user": 1, "candidates": [1] * 501}).status_code == 413
    answer = served.post("/v1/rank", b" " * 20_001)
    assert answer.status_code == 413
    assert "most is 20000" in answer.json()["error"]
    events = [{"user": 1, "item": 1, "at": AT}] * 51
    assert served.post("/v1/events", {"events": events}).status_code == 413
    assert served.post("/v1/recommend", {"user": 1, "k": 10**30}).status_code == 400
    for filters in ({"exclude": [1] * 501}, {"category": {"category": ["a"] * 501}}):
        answer = served.post("/v1/recommend", {"user": 1, "k": 1, "filters": filters})
        assert answer.status_code == 413
        assert "the most is 500" in answer.json()["error"]


def test_a_damaged_record_fails_its_own_post_alone(tmp_path):
    """And what the posts beside it are told is what became of them."""
    run = saved_run(tmp_path / "run")
    jobs = [
        Job([PostedEvent(user, 1, AT_US - 10**15, None, event_id)], 0.0)
        for user, event_id in (("good", None), ("broken", "e1"), ("fine", "e2"))
    ]
    with open_store(str(tmp_path / "store")) as store:
        store.begin_version(run.version, 4, 12, 1)
        store.commit([("state", user_key("broken"), b"garbage" * 20)], run.version)
        model = SimpleNamespace(run=run, scorer=Scorer(run, store), version=run.version)
        EventWriter(SimpleNamespace(model=model, store=store), Metrics()).write(jobs)
    assert [jobs[i].answer.result().outcomes for i in (0, 2)] == [["applied"], ["applied"]]
    assert isinstance(jobs[1].answer.exception(), RecordError)


@pytest.mark.parametrize("action", [2.0, True, 1, "b", None, -0.5])
def test_an_action_is_posted_as_a_log_has_it(served, action):
    event = {"user": f"actor {action!r}", "item": 1, "at": "2026-01-01T00:00:00Z", "action": action}
    answer = served.post("/v1/events", {"events": [event]})
    assert answer.json()["outcomes"] == ["applied"], answer.text


def test_one_wrong_event_refuses_the_post_as_a_whole(served):
    good = {"user": "half", "item": 1, "at": "2026-01-01T00:00:00Z"}
    answer = served.post("/v1/events", {"events": [good, good | {"at": None}]})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("events[1].at is null")
    assert served.client.get("/v1/users/half").status_code == 404


@pytest.mark.parametrize(
    ("bucket", "reason"), [(1024.0, "device is a category"), (0.5, "device is a category"), (3.0, "")]
)
def test_a_bucket_beyond_the_table_is_refused(served, bucket, reason):
    """Before the model reads from a place that is not there."""
    inputs = [
        {"name": "user", "datatype": "INT64", "shape": [1], "data": [7]},
        {"name": "candidates", "datatype": "INT64", "shape": [1], "data": [1]},
        {"name": "context", "datatype": "FP32", "shape": [1, 2], "data": [9.0, bucket]},
    ]
    answer = served.post("/v2/models/vista/infer", {"inputs": inputs})
    assert answer.status_code == (400 if reason else 200), answer.text
    assert reason in answer.text


@pytest.mark.parametrize("user", ["line\nbreak", "\n", "end\n", "a/b", "..", "?#%"])
def test_a_user_of_any_characters_is_not_another(served, user):
    """In a path, too: ``end%0A`` is not the user ``end``."""
    events = [{"user": one, "item": 1, "at": "2026-01-01T00:00:00Z"} for one in (user, *filter(None, [user.strip()]))]
    assert served.post("/v1/events", {"events": events}).status_code == 200
    path = "".join(f"%{byte:02X}" for byte in user.encode())
    for kind in ("users", "history", "tokens"):
        answer = served.client.get(f"/v1/{kind}/{path}")
        assert (answer.status_code, answer.json().get("user")) == (200, user), answer.text


def test_paths_methods_versions_and_headers_that_are_not_there(served):
    assert served.client.get("/v1/rank").status_code == 405
    assert served.client.get("/nope").status_code == 404
    assert "is not served" in served.client.get("/v2/models/vista/versions/0/ready").json()["error"]
    body = {"user": 1, "candidates": [1]}
    assert served.post("/v1/rank", body, **{"x-request-timeout-ms": "0"}).status_code == 400


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = (
    "user",
    "candidates",
    "at",
    "context",
    "events",
    "item",
    "k",
    "filters",
    "inputs",
    "outputs",
    "parameters",
    "id",
)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(st.sampled_from(["rank", "events", "recommend"]), st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=5))
def test_any_json_gets_an_answer_that_is_not_500(served, path, body):
    answer = served.post(f"/v1/{path}", body)
    assert answer.status_code in (200, 400, 413), answer.text
    assert answer.status_code == 200 or answer.json()["error"]


BINARY = st.fixed_dictionaries({"binary_data_size": st.integers(-1, 40)})
TENSOR = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["user", "candidates", "at_us", "context", "users"]),
        "datatype": st.sampled_from(["BYTES", "INT64", "FP32", "BOOL", ""]),
        "shape": st.lists(st.integers(-1, 4), max_size=4),
    },
    optional={"data": ANYTHING, "parameters": BINARY},
)


@QUICK
@given(st.lists(TENSOR, max_size=4), st.binary(max_size=80), st.integers(-3, 3))
def test_any_tensors_get_an_answer_that_is_not_500(served, inputs, binary, off):
    head = json.dumps({"inputs": inputs}).encode()
    header = {"inference-header-content-length": str(len(head) + off)}
    answer = served.post("/v2/models/vista/infer", head + binary, **header)
    assert answer.status_code in (200, 400, 413), answer.text
