// The server: what it does each second, how long that takes, how fresh its answers are, and what the store holds.

import { api } from "./api.js";
import { lines, roundUpSpan } from "./chart.js";
import { bar, count, duration, el, latency, moment, percent } from "./dom.js";
import { growth, observed, parseMetrics, quantile, total } from "./metrics.js";

const EVERY_MS = 2000;
const KEPT_S = 600;
const WINDOW = 5; // readings that a rate or quantile is taken over
const OWN = new Set(["page", "metrics", "status", "health", "metadata", "other"]); // of pages and probers, this one's too
const isWork = (endpoint) => !OWN.has(endpoint);
const LONGEST_S = 31557600; // the last bound of freshness: what is older is counted as older
const samples = [];
let endpoint = "";

export function operatorView(main) {
  const body = el("div", { class: "stack" });
  const problem = el("div", { role: "alert" });
  main.replaceChildren(el("h1", {}, "Operator"), problem, body);
  body.append(el("p", { class: "busy", role: "status" }, "Loading metrics …"));
  let timer = 0, isOver = false;
  const view = { store: el("section", { class: "panel" }), live: el("div", { class: "stack" }) };
  const tick = async () => {
    try {
      if (!document.hidden) {
        const [text, status] = await Promise.all([api.metrics(), api.status()]);
        if (isOver) return;
        keep(parseMetrics(text));
        if (!body.contains(view.live)) body.replaceChildren(view.live, view.store);
        view.live.replaceChildren(...liveParts(status));
        view.store.replaceChildren(...storeParts(status));
      }
      problem.replaceChildren();
    } catch (error) {
      if (isOver) return;
      body.querySelector(".busy")?.remove();
      problem.replaceChildren(el("p", { class: "problem" }, `${error.message} Trying again every ${EVERY_MS / 1000} seconds.`));
    }
    if (!isOver) timer = setTimeout(tick, EVERY_MS);
  };
  tick();
  return () => {
    isOver = true;
    clearTimeout(timer);
  };
}

function keep(metrics) {
  const now = Date.now() / 1000;
  samples.push({ at: now, metrics });
  while (samples[0].at < now - KEPT_S) samples.shift();
}

/** [[age in s, value or null]] of a function of two readings that are WINDOW readings apart. */
function points(value) {
  const now = samples.at(-1).at;
  return samples.slice(1).map((after, i) => {
    const before = samples[Math.max(0, i + 1 - WINDOW)];
    return [now - after.at, value(before.metrics, after.metrics, after.at - before.at)];
  });
}

const latest = (series) => series.at(-1)?.[1] ?? null;
const spanS = () => (samples.at(-1).at - samples[0].at > 120 ? KEPT_S : 120);
const rate = (name, wanted) => (before, after, seconds) => growth(before, after, name, wanted) / seconds;
/** A quantile between two readings; beyond the last bound of the buckets it is shown at that bound. */
const below = (name, share, wanted) => (before, after) => {
  const buckets = observed(before, after, name, wanted);
  const found = quantile(buckets, share);
  return found === Infinity ? buckets.at(-2).le : found;
};

function liveParts(status) {
  const now = samples.at(-1).metrics;
  const used = [...new Set((now.vista_requests_total ?? []).map((one) => one.labels.endpoint))].filter(isWork).sort();
  if (!used.includes(endpoint)) endpoint = used.includes("rank") ? "rank" : used[0] ?? "rank";
  return [facts(status, now), el("div", { class: "charts" },
    requestsChart(), latencyChart(used), stagesChart(), freshnessChart(), eventsChart(), queueChart(now)), tables(now)];
}

function facts(status, now) {
  const requests = latest(points(rate("vista_requests_total", { endpoint: isWork })));
  const failed = total(now, "vista_requests_total", { endpoint: isWork, code: (code) => code >= "500" });
  const all = total(now, "vista_requests_total", { endpoint: isWork });
  const ranked = total(now, "vista_batch_users_count");
  const fresh = quantile(observed({}, now, "vista_freshness_seconds"), 0.5);
  const fact = (name, value, more) => el("div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, more) : null));
  return el("section", { class: "panel", "aria-label": "Now" }, el("dl", { class: "facts" },
    fact("State", status.problem ? el("span", { class: "bad" }, "not ready") : "ready", status.problem || `up ${duration(status.uptime_s)}`),
    fact("Requests", requests === null ? "–" : `${requests.toFixed(1)} /s`, `${count(all)} since the start`),
    fact("Server errors", el("span", { class: failed ? "bad" : "" }, all ? percent(failed / all) : "–"), `${count(failed)} since the start`),
    fact("Waiting", count(total(now, "vista_queue_depth")), `${count(total(now, "vista_dropped_total"))} dropped`),
    fact("Users per batch", ranked ? (total(now, "vista_batch_users_sum") / ranked).toFixed(1) : "–", `${count(ranked)} batches`),
    fact("Freshness", fresh === null ? "–" : fresh === Infinity ? "over 1 y" : `about ${duration(fresh)}`, "median age of the newest event known"),
    fact("Model version", el("span", { class: "mono" }, status.model.version), `${count(total(now, "vista_switches_total"))} switches`)));
}

function chart(title, series, write, more, up) {
  const said = series.map((one) => `${one.name} ${latest(one.points) === null ? "nothing yet" : write(latest(one.points))}`).join(", ");
  const span = spanS();
  return el("section", { class: "panel chart" }, el("header", {}, el("h2", {}, title), more),
    lines(series, span, (value) => write(value).replace(" or more", ""), `${title}, the last ${duration(span)}; now: ${said}`, up),
    el("p", { class: "axis" }, el("span", {}, `${duration(span)} ago`), el("span", {}, "now")),
    el("ul", { class: "legend" }, series.map((one, number) => el("li", {}, el("i", { class: `line s${number}` }), one.name, " ",
      el("b", {}, latest(one.points) === null ? "–" : write(latest(one.points)))))));
}

function requestsChart() {
  const work = { endpoint: isWork };
  return chart("Requests per second", [
    { name: "answered", points: points(rate("vista_requests_total", { ...work, code: (code) => code < "400" })) },
    { name: "refused (4xx)", points: points(rate("vista_requests_total", { ...work, code: (code) => code >= "400" && code < "500" })) },
    { name: "failed (5xx)", points: points(rate("vista_requests_total", { ...work, code: (code) => code >= "500" })) },
  ], (value) => value.toFixed(1));
}

function latencyChart(used) {
  const select = el("select", { "aria-label": "Endpoint", onchange: () => { endpoint = select.value; } },
    (used.length ? used : [endpoint]).map((name) => el("option", { value: name }, name)));
  select.value = endpoint;
  const of = (share) => points(below("vista_stage_seconds", share, { endpoint, stage: "total" }));
  return chart("Latency", [{ name: "median", points: of(0.5) }, { name: "95 %", points: of(0.95) }, { name: "99 %", points: of(0.99) }],
    latency, el("div", { class: "options" }, select));
}

function stagesChart() {
  const mean = (stage) => (before, after) => {
    const wanted = { endpoint: (name) => name === "rank" || name === "infer", stage };
    const number = growth(before, after, "vista_stage_seconds_count", wanted);
    return number ? growth(before, after, "vista_stage_seconds_sum", wanted) / number : null;
  };
  return chart("Rankings by stage, mean", ["score", "read", "queue"].map((stage) => ({ name: stage, points: points(mean(stage)) })), latency);
}

function freshnessChart() {
  const of = (share) => points(below("vista_freshness_seconds", share));
  return chart("Freshness of ranked users", [{ name: "median", points: of(0.5) }, { name: "95 %", points: of(0.95) }],
    (seconds) => (seconds === LONGEST_S ? `${duration(seconds)} or more` : duration(seconds)), null, roundUpSpan);
}

function eventsChart() {
  const refused = new Set(["too late", "bad clock"]);
  const taken = (outcome) => outcome !== "duplicate" && !refused.has(outcome);
  const of = (outcome) => points(rate("vista_events_total", { outcome }));
  return chart("Events per second", [{ name: "taken", points: of(taken) }, { name: "duplicate", points: of("duplicate") },
    { name: "refused", points: of((outcome) => refused.has(outcome)) }], (value) => value.toFixed(1));
}

function queueChart(now) {
  const queues = (now.vista_queue_depth ?? []).map((one) => one.labels.queue).filter((name) => ["rank", "events", "recommend"].includes(name));
  return chart("Waiting in queues", queues.map((queue) => ({ name: queue, points: points((_, after) => total(after, "vista_queue_depth", { queue })) })),
    (value) => value.toFixed(value % 1 ? 1 : 0));
}

function tables(now) {
  const fresh = observed({}, now, "vista_freshness_seconds");
  const most = Math.max(...fresh.map((one) => one.number), 1);
  const row = ({ le, number }, i) => el("tr", {},
    el("td", {}, le === Infinity ? `more than ${duration(fresh[i - 1].le)}` : `up to ${duration(le)}`),
    el("td", { class: "meter-cell" }, el("span", { class: "meter" }, bar(number / most))), el("td", { class: "num" }, count(number)));
  const outcomes = (now.vista_events_total ?? []).filter((one) => one.value);
  const extra = [["users that the store did not know", "vista_store_misses_total"], ["errors of the store", "vista_store_errors_total"], ["answers while the store was away", "vista_degraded_total"]];
  return el("div", { class: "charts" },
    el("section", { class: "panel" }, el("header", {}, el("h2", {}, "Freshness since the start")),
      total(now, "vista_freshness_seconds_count")
        ? el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Age of the newest event"), el("th", {}), el("th", { class: "num", scope: "col" }, "Rankings"))), el("tbody", {}, fresh.map(row)))
        : el("p", { class: "note" }, "No user has been ranked yet.")),
    el("section", { class: "panel" }, el("header", {}, el("h2", {}, "Since the start")),
      el("table", {}, el("tbody", {},
        extra.map(([name, key]) => el("tr", {}, el("td", {}, name), el("td", { class: "num" }, count(total(now, key))))),
        outcomes.map((one) => el("tr", {}, el("td", {}, `events ${one.labels.outcome}`), el("td", { class: "num" }, count(one.value))))))));
}

function storeParts({ store, model }) {
  const rows = store.versions.map((one) => el("tr", {},
    el("td", { class: "mono" }, one.version, " ", one.version === store.published ? el("span", { class: "badge" }, "published") : null, " ",
      one.version === model.version ? el("span", { class: "badge" }, "answers") : null),
    el("td", { class: "num" }, count(one.num_users)), el("td", { class: "num" }, one.expected_users ? percent(Math.min(one.num_users / one.expected_users, 1)) : "–"),
    el("td", {}, one.is_complete ? "complete" : el("span", { class: "warn" }, "being made")), el("td", { class: "wide-only" }, moment(one.created))));
  return [
    el("header", {}, el("h2", {}, "Store"), el("p", { class: "tag mono" }, store.url, store.is_up ? "" : el("b", { class: "bad" }, " is away"))),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["Version", "Users", "Coverage", "State"].map((name, i) => el("th", { scope: "col", class: i === 1 || i === 2 ? "num" : null }, name)),
      el("th", { scope: "col", class: "wide-only" }, "Made (UTC)"))), el("tbody", {}, rows))),
    el("p", { class: "note" }, `The model that answers: ${count(model.num_items)} items, ${count(model.num_tokens)} tokens of width ${model.width} in a memory of kind “${model.memory}”, segments of ${model.segment_events} events, ${model.recent_events} recent events${model.sketch_slots ? `, exact counts of ${count(model.sketch_slots)} items` : ""}.`),
  ];
}
