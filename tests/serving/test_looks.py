"""Looking closer: why a ranking, which history, who wrote a token; the interface's description; the page's files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.worlds import histories
from tests.serving.test_bounds import broken
from tests.serving.test_scorer import LENGTHS, USERS, make_run, records
from tests.serving.test_server import ANYTHING, AT, AT_US, NAMES, QUICK, Served, serving
from vista.catalogue import Catalogue
from vista.errors import StaleOutput
from vista.schema import Manifest
from vista.serving import looks
from vista.serving.explain import explain
from vista.serving.history import timeline, trace
from vista.serving.http import Handlers
from vista.serving.openapi import openapi_document
from vista.serving.scorer import Asked, Scorer
from vista.store.contract import SummaryStore
from vista.store.record import encode


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("looks")) as found:
        yield found


class Logged:
    """Whole histories of USERS, as prepared data has them; of some, only the first events."""

    def __init__(self, run: Any, cut: dict[Any, int] | None = None) -> None:
        self.catalogue: Catalogue = run.catalogue
        self.manifest = type("Manifest", (), {"actions": run.schema.actions})()
        self._cut, self.is_stale = cut or {}, False

    manifest: Manifest

    def history_of(self, user_id: object) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        if self.is_stale:
            raise StaleOutput("data was changed")
        if user_id not in USERS:
            return None
        events, row = histories(LENGTHS), USERS.index(user_id)  # type: ignore[arg-type]
        own = slice(int(events.offsets[row]), int(events.offsets[row + 1]))
        cut = self._cut.get(user_id)
        return tuple(column[own][:cut].numpy() for column in (events.item, events.action, events.timestamp_us))  # type: ignore[return-value]


# -- why a ranking


def test_an_explanation_has_the_scores_of_the_ranking_and_weights_that_add_up(served):
    ask = {"user": "anna", "candidates": [3, 7, "no such", 11], "at": AT, "context": {"price": 9.0}}
    ranked = served.post("/v1/rank", ask).json()
    found = served.post("/v1/explain", ask).json()
    for one, other in zip(found["candidates"], ranked["candidates"], strict=True):
        assert (one["item"], one["is_known"]) == (other["item"], other["is_known"])
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)
        weights = one["attention"]
        assert len(weights["tokens"]) == found["num_tokens"] == 4
        assert len(weights["recent_events"]) == len(found["recent_events"]) == 16
        total = sum(weights["tokens"]) + sum(weights["recent_events"]) + weights["itself"]
        assert total == pytest.approx(1, abs=1e-4)
        assert set(one["scores_without"]) == {"summary", "recent_events"}
        assert all(other != one["scores"] for other in one["scores_without"].values())
    user = served.client.get("/v1/users/anna").json()
    assert [{k: v for k, v in e.items() if k != "features"} for e in found["recent_events"]] == user["recent_events"]
    assert found["candidates"][0]["features"] == {} or found["candidates"][0]["features"]["category"] in "abcde"


def test_attention_is_that_of_the_pass_that_scored():
    """Against the definition, computed from what the blocks are given while the scorer scores."""
    run = make_run(sketch_slots=64)
    model = model_of(run)
    summaries = model.scorer.read(["anna"])
    asked = Asked(run.catalogue.encode([1, 2, 3]), AT_US)
    found = explain(model, summaries, asked, False)
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda block, given: seen.append(by_hand(block, *given[:4])))
        for block in run.ranker.blocks
    ]
    model.scorer.score(summaries, [asked])
    for handle in handles:
        handle.remove()
    expected = torch.stack(seen).mean((0, 2))[0, : len(asked.index)].detach().numpy()
    got = np.concatenate([found.on_tokens, found.on_recent, found.on_itself[:, None]], 1)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def by_hand(block: Any, x: Any, tokens: Any, recent: Any, bias: Any) -> torch.Tensor:
    """The definition of a block's attention, (Q, H, C, K + R + 1)."""
    h = torch.nn.functional.rms_norm(x, x.shape[-1:])
    q, own = (p(h).unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for p in (block.query, block.key))
    scale = block.log_scale.exp()[:, None, None] * q.shape[-1] ** -0.5
    logits = [q @ tokens[0].mT * scale, q @ recent[0].mT * scale + bias, (q * own).sum(-1, keepdim=True) * scale]
    return torch.cat(logits, -1).softmax(-1)


def test_counts_are_those_of_the_whole_history():
    run = make_run(sketch_slots=64)
    model = model_of(run)
    events = histories(LENGTHS)
    mine = events.item[: LENGTHS[0]].numpy()
    index = np.unique(mine)
    found = explain(model, model.scorer.read(["anna"]), Asked(index, AT_US), False)
    items, categories = found.counted
    assert (items.feature, categories.feature) == (None, "category")
    assert items.events.tolist() == [(mine == one).sum() for one in index]
    since = [len(mine) - np.flatnonzero(mine == one)[-1] for one in index]
    assert items.events_since.tolist() == since
    assert set(found.without) == {"summary", "recent_events", "counts"}
    assert np.abs(found.without["counts"] - found.probability).max() > 1e-4


def test_what_came_right_before_the_last_meetings_is_that_of_the_whole_history():
    events = histories(LENGTHS)
    run = make_run(sketch_slots=64, sketch_predecessors=3)
    mine = events.item[: LENGTHS[0]].tolist()
    index = np.unique(mine)
    found = explain(model_of(run), model_of(run).scorer.read(["anna"]), Asked(index, AT_US), False).meetings_after
    for candidate, meetings in zip(index.tolist(), found, strict=True):
        places = [place for place, item in enumerate(mine) if item == candidate][-3:]
        before = [mine[place - 1] for place in places if place and mine[place - 1] != candidate]
        assert meetings.tolist() == [before.count(item) for item in mine[-16:]]
    assert found.sum() > 10


def model_of(run: Any) -> Any:
    """A model as the server holds it, around a store in memory."""
    store = Held({(r.kind, r.user_key): encode(r, "float32") for r in records(run)})
    return type("Held", (), {"run": run, "scorer": Scorer(run, store), "version": run.version})()  # type: ignore[arg-type]


class Held:
    """As much of a store as a scorer reads."""

    def __init__(self, blobs: dict[tuple[str, bytes], bytes]) -> None:
        self._blobs = blobs

    def get_many(self, kind: str, keys: list[bytes], version: str) -> list[bytes | None]:
        return [self._blobs.get((kind, key)) for key in keys]


# -- which history


def test_a_history_ends_where_the_store_does_and_says_so(served):
    found = served.client.get("/v1/history/anna?limit=10").json()
    assert (found["num_events"], found["num_missing"]) == (40, 24)
    assert "--data" in found["note"]
    assert [one["place"] for one in found["events"]] == list(range(39, 29, -1))
    rest = served.client.get(f"/v1/history/anna?limit=10&before={found['next_before']}").json()
    assert [one["place"] for one in rest["events"]] == list(range(29, 23, -1))
    assert sum(found["by_time"]) == 16
    assert found["by_time"][-1]
    assert served.client.get("/v1/history/new").json()["events"] == []


def test_a_history_of_one_event(served):
    served.post("/v1/events", {"events": [{"user": "single", "item": 1, "at": "2026-01-01T00:00:00Z"}]})
    found = served.client.get("/v1/history/single").json()
    assert (found["by_time"][0], sum(found["by_time"]), found["first_at"]) == (1, 1, found["last_at"])
    assert served.client.get("/v1/tokens/single").json()["why_not"].startswith("No segment")


def test_prepared_data_fills_in_what_the_store_does_not_keep():
    run = make_run()
    model, events = model_of(run), histories(LENGTHS)
    record = model.scorer.state("anna")
    whole = timeline(model, record, Logged(run), "anna")
    assert (whole.num_missing, whole.note) == (0, "")
    for name in ("item", "action", "timestamp_us", "gap_us"):
        assert getattr(whole, name).tolist() == getattr(events, name)[:40].tolist(), name
    cut = timeline(model, record, Logged(run, {"anna": 10}), "anna")
    assert cut.num_missing == 14
    assert "fewer events" in cut.note
    assert cut.place.tolist() == [*range(10), *range(24, 40)]
    other = Logged(run)
    other.manifest = type("Manifest", (), {"actions": ("z",)})()  # type: ignore[assignment]
    assert "another catalogue" in timeline(model, record, other, "anna").note
    stale = Logged(run)
    stale.is_stale = True
    assert "data was changed" in timeline(model, record, stale, "anna").note


# -- who wrote a token


@pytest.mark.parametrize("layers", [1, 2])
def test_shares_are_the_softmax_of_the_definition_and_add_up_to_one(layers):
    """One layer against a softmax over all events by hand; any number adds up to 1."""
    run = make_run(num_layers=layers)
    model, events = model_of(run), histories(LENGTHS)
    for user, number in zip(USERS, LENGTHS, strict=True):
        record = model.scorer.state(user)
        found = trace(model, record, timeline(model, record, Logged(run), user), float("inf"))
        closed = number // 8 * 8
        assert found.shares.shape[1] == closed
        if not closed:
            assert "No segment" in found.why_not
            continue
        np.testing.assert_allclose(found.shares.sum(1), 1, rtol=1e-5)
        if user == "anna" and layers == 1:
            layer, summarizer = run.summarizer.layers[0], run.summarizer
            columns = (events.item, events.action, events.timestamp_us, events.gap_us)
            with torch.no_grad():
                x = summarizer.embedding(*(column[:closed] for column in columns))
                key = layer.key(torch.nn.functional.rms_norm(x, x.shape[-1:])).unflatten(-1, (2, -1)).transpose(0, 1)
                weight = (layer.reader.query @ key.mT * key.shape[-1] ** -0.5).softmax(-1).mean(0)
            np.testing.assert_allclose(found.shares, weight.numpy(), rtol=1e-4)


def test_what_is_not_known_is_not_traced():
    run, deep, flat = make_run(num_layers=1), make_run(num_layers=2), make_run(memory="sum")
    for made, reason, number in ((run, "", 16), (deep, "2 summarizer layers", 0), (flat, "kind 'sum'", 0)):
        model = model_of(made)
        record = model.scorer.state("anna")
        found = trace(model, record, timeline(model, record, None, "anna"), float("inf"))
        assert reason in found.why_not
        assert bool(reason) == bool(found.why_not)
        assert found.shares.shape[1] == number
    model = model_of(run)
    record = model.scorer.state("anna")
    held = trace(model, record, timeline(model, record, None, "anna"), float("inf"))
    whole = trace(model, record, timeline(model, record, Logged(run), "anna"), float("inf"))
    np.testing.assert_allclose(held.shares, whole.shares[:, -16:], rtol=1e-5)


def test_tokens_over_http(tmp_path):
    with serving(tmp_path, num_layers=1) as served:
        found = served.client.get("/v1/tokens/anna?events=3").json()
        assert (found["num_summarized"], found["num_traced"], found["why_not"]) == (40, 16, "")
        for token in found["tokens"]:
            shares = [one["share"] for one in token["events"]]
            assert shares == sorted(shares, reverse=True)
            assert len(shares) == 3
            assert sum(shares) <= token["traced"] + 1e-5 < 1
            assert sum(token["by_bin"]) == pytest.approx(token["traced"], abs=1e-4)
            assert not any(token["by_bin"][: found["num_bins"] // 2])
        served.running.service._histories = Logged(served.run)  # type: ignore[assignment]
        whole = served.client.get("/v1/tokens/anna").json()
        assert [token["traced"] for token in whole["tokens"]] == pytest.approx([1] * 4, abs=1e-5)


def test_a_model_without_a_summary_has_nothing_to_trace():
    run = make_run(model="recent")
    model = model_of(run)
    record = model.scorer.state("anna")
    found = looks.tokens(trace(model, record, timeline(model, record, None, "anna"), float("inf")), "anna", 3)
    assert (found["tokens"], found["num_traced"]) == ([], 0)
    assert "no summary tokens" in found["why_not"]
    explained = explain(model, model.scorer.read(["anna"]), Asked(run.catalogue.encode([1, 2]), AT_US), False)
    assert explained.on_tokens.shape == (2, 0)
    np.testing.assert_allclose(explained.on_recent.sum(1) + explained.on_itself, 1, rtol=1e-5)
    assert set(explained.without) == {"recent_events"}


# -- users, status, what is refused


def test_users_and_status(served):
    found = served.client.get("/v1/users?limit=3").json()["users"]
    assert len(found) == 3
    assert {one["user"] for one in served.client.get("/v1/users").json()["users"]} >= set(USERS)
    status = served.client.get("/v1/status").json()
    assert status["model"]["version"] == status["store"]["published"] == served.run.version
    assert (status["model"]["num_tokens"], status["problem"], status["store"]["is_up"]) == (4, "", True)


REFUSED = [
    ("/v1/users?limit=101", "from 0 to 100"), ("/v1/users?limit=-1", "limit is"), ("/v1/users?first=3", "no parameter"),
    ("/v1/users?limit=1&limit=2", "stands twice"),
    ("/v1/history/anna?limit=x", "limit is"), ("/v1/history/anna?limit=1001", "from 0 to 1000"),
    ("/v1/history/anna?befor=3", "did you mean 'before'"), ("/v1/tokens/anna?events=51", "from 0 to 50"),
    ("/v1/history/anna?limit=" + "9" * 5000, "limit is"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_bad_parameters_get_a_reason(served, path, reason):
    answer = served.client.get(path)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_an_explanation_reads_what_candidates_ask_of_a_memory():
    model = model_of(make_run(candidate_memory="ridge"))
    summaries = model.scorer.read(["anna"])
    asked = Asked(model.run.catalogue.encode([1, 2, 3]), AT_US)
    found = explain(model, summaries, asked, False)
    np.testing.assert_allclose(found.probability, model.scorer.score(summaries, [asked])[0], rtol=1e-5)
    cold = replace(summaries, tokens=model.scorer.cold(1).tokens, readout=model.scorer.cold(1).readout)
    np.testing.assert_allclose(found.without["summary"], model.scorer.score(cold, [asked])[0], rtol=1e-5)
    half = replace(summaries, tokens=model.scorer.cold(1).tokens)
    assert not np.allclose(found.without["summary"], model.scorer.score(half, [asked])[0], rtol=1e-4)


def test_users_that_are_not_there_and_too_much_to_explain(served):
    for path in ("history", "tokens"):
        assert served.client.get(f"/v1/{path}/nobody").status_code == 404
    answer = served.post("/v1/explain", {"user": 1, "candidates": list(range(101))})
    assert (answer.status_code, "most is 100" in answer.json()["error"]) == (413, True)
    cold = served.post("/v1/explain", {"user": "nobody", "candidates": [1]}).json()
    assert (cold["is_known_user"], cold["recent_events"]) == (False, [])


@QUICK
@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=5))
def test_any_json_to_explain_gets_an_answer_that_is_not_500(served, body):
    answer = served.post("/v1/explain", body)
    assert answer.status_code in (200, 400, 413), answer.text


@settings(QUICK, max_examples=20)
@given(
    st.sampled_from(["history", "tokens", "users"]), st.text(max_size=12),
    st.dictionaries(st.sampled_from(["limit", "before", "events"]), st.text(max_size=6), max_size=2),
)  # fmt: skip
def test_any_url_gets_an_answer_that_is_not_500(served, kind, user, parameters):
    answer = served.client.get(f"/v1/{kind}/", params=parameters)
    assert answer.status_code in (200, 400, 404), answer.text
    path = "".join(f"%{byte:02X}" for byte in user.encode("utf-8", "replace"))
    assert served.client.get(f"/v1/{kind}/{path}", params=parameters).status_code in (200, 400, 404)


# -- the description


def check(name: str, value: Any) -> None:
    """Raise where a body is not as the document says."""
    document = openapi_document()
    jsonschema.Draft202012Validator(document | {"$ref": f"#/components/schemas/{name}"}).validate(value)


def test_the_description_has_every_route_and_no_other(served):
    document = served.client.get("/openapi.json").json()
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    routes = Handlers(served.running.service).routes()
    there = {(re.sub(r":\w+}", "}", r.path), m.lower()) for r in routes for m in r.methods or () if m != "HEAD"}
    assert described == there


def test_answers_are_as_described(served):
    ask = {"user": "anna", "candidates": [3, "x"], "at": AT}
    for path, asked, answered, body in (
        ("/v1/rank", "Ranking", "Ranked", ask),
        ("/v1/explain", "Explain", "Explained", ask),
        ("/v1/recommend", "Recommend", "Recommended", {"user": 7, "k": 3}),
        ("/v1/events", "Events", "Posted", {"events": [{"user": "x", "item": 1, "at": "2026-01-01T00:00:00Z"}]}),
        ("/v1/rank", "", "Error", {"user": None, "candidates": [1]}),
    ):
        if asked:
            check(asked, body)
        check(answered, served.post(path, body).json())
    for path, name in (
        ("/v1/users/anna", "User"), ("/v1/users/new", "User"), ("/v1/users", "Users"), ("/v1/history/anna", "History"),
        ("/v1/history/new", "History"), ("/v1/tokens/anna", "Tokens"), ("/v1/status", "Status"), ("/readyz", "Ready"),
        ("/livez", "Alive"), ("/nope", "Error"), ("/v1/users/nobody", "Error"),
    ):  # fmt: skip
        check(name, served.client.get(path).json())
    with pytest.raises(jsonschema.ValidationError):
        check("Ready", {"ready": True})


# -- the page's files


def test_the_page_comes_with_headers_that_let_nothing_else_in(served):
    answer = served.client.get("/ui")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    again = served.client.get("/ui", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for name in ("..%2Fpage.py", "nope.js", "%00", "index.html.bak"):
        assert served.client.get(f"/ui/{name}").status_code == 404


def test_the_page_names_no_other_host_and_every_file_it_names_is_there(served):
    folder = Path(__file__).parents[2] / "src" / "vista" / "serving" / "static"
    named = set(re.findall(r'(?:src|href)="(ui/[\w.-]+)"', (folder / "index.html").read_text()))
    assert named
    for path in sorted(folder.iterdir()):
        text = path.read_text()
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), f"{path.name} names a host"
        named |= {f"ui/{name}" for name in re.findall(r'from "\./([\w.-]+)"', text)}
        assert served.client.get(f"/ui/{path.name}").content.decode() == text
    for name in named:
        assert served.client.get(f"/{name}").status_code == 200, name


def test_the_page_can_be_left_out(tmp_path):
    with serving(tmp_path, has_page=False) as served:
        assert served.client.get("/ui").status_code == 404
        assert served.client.get("/v1/status").status_code == 200


def test_the_page_needs_no_token_but_what_it_shows_does(tmp_path):
    with serving(tmp_path, token=b"secret") as served:
        for path in ("/ui", "/ui/index.html", "/openapi.json"):
            assert served.client.get(path).status_code == 200
        for path in ("/v1/status", "/v1/users", "/v1/history/anna", "/v1/tokens/anna", "/metrics", "/uix"):
            assert served.client.get(path).status_code == 401
        assert served.post("/v1/explain", {"user": 1, "candidates": [1]}).status_code == 401


def test_a_store_that_is_away_or_a_damaged_state(tmp_path, monkeypatch):
    with serving(tmp_path) as served:
        with monkeypatch.context() as patch:
            for name in ("get_many", "versions", "scan"):
                patch.setattr(type(served.store), name, broken)
            for path in ("status", "users", "history/anna", "tokens/anna"):
                assert served.client.get(f"/v1/{path}").status_code == 503, path
        store: SummaryStore = served.store
        (blob,) = store.get_many("state", [b"s:anna"], served.run.version)
        store.commit([("state", b"s:anna", blob[:100] + bytes([blob[100] ^ 4]) + blob[101:])], served.run.version)
        answer = served.client.get("/v1/tokens/anna")
        assert (answer.status_code, "user 'anna'" in answer.json()["error"]) == (500, True)
        assert served.client.get("/v1/history/anna").status_code == 200
