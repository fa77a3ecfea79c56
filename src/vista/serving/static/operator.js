// The server: what it does each second, how long that takes, how fresh its answers are, and what the store holds.

import { api } from "./api.js";
import { lines, roundUpSpan } from "./chart.js";
import { bar, count, duration, el, latency, momentWords, percent } from "./dom.js";
import { growth, observed, parseMetrics, quantile, total } from "./metrics.js";

const EVERY_MS = 2000;
const KEPT_S = 600;
const SPANS_S = [60, 120, 300, KEPT_S]; // of a chart, as readings gather
const WINDOW = 5; // readings that a rate or quantile is taken over
const OWN = new Set(["page", "metrics", "status", "health", "metadata", "other"]); // of pages and probers, this one's too
const isWork = (endpoint) => !OWN.has(endpoint);
const LONGEST_S = 31557600; // the last bound of freshness: what is older is counted as older
const samples = [];
let endpoint = "";

export function operatorView(main) {
  const busy = el("p", { class: "busy", role: "status" }, "Loading metrics …");
  const problem = el("div", { role: "alert" });
  const body = el("div", { class: "stack" }, busy);
  main.replaceChildren(el("h1", {}, "Operator"), problem, body);
  const parts = viewParts();
  let timer = 0, isOver = false;
  const tick = async () => {
    try {
      if (!document.hidden) {
        const [text, status] = await Promise.all([api.metrics(), api.status()]);
        if (isOver) return;
        keep(parseMetrics(text));
        if (busy.isConnected) body.replaceChildren(...parts.sections);
        parts.update(status);
      }
      problem.replaceChildren();
    } catch (error) {
      if (isOver) return;
      busy.hidden = true;
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

/** The sections, made once so that what has the focus keeps it, and what fills them anew from the newest reading. */
function viewParts() {
  const select = el("select", { "aria-label": "Endpoint", onchange: () => { endpoint = select.value; draw(); } });
  const charts = [
    chart("Requests per second", requestsSeries, perSecond),
    chart("Latency", latencySeries, latency, el("div", { class: "options" }, select)),
    chart("Rankings by stage, mean", stagesSeries, latency),
    chart("Freshness of ranked users", freshnessSeries, age, null, roundUpSpan),
    chart("Events per second", eventsSeries, perSecond),
    chart("Waiting in queues", queueSeries, (value) => value.toFixed(value % 1 ? 1 : 0)),
  ];
  const draw = () => charts.forEach((one) => one.draw());
  const now = el("section", { class: "panel", "aria-label": "Now" });
  const since = el("div", { class: "charts" });
  const store = el("section", { class: "panel" });
  const update = (status) => {
    const { metrics } = samples.at(-1);
    offer(select, metrics);
    now.replaceChildren(facts(status, metrics));
    draw();
    since.replaceChildren(...tables(metrics));
    store.replaceChildren(...storeParts(status));
  };
  return { sections: [now, el("div", { class: "charts" }, charts.map((one) => one.section)), since, store], update };
}

/** The endpoints that have been asked, to choose from. */
function offer(select, metrics) {
  const used = [...new Set((metrics.vista_requests_total ?? []).map((one) => one.labels.endpoint))].filter(isWork).sort();
  if (!used.includes(endpoint)) endpoint = used.includes("rank") ? "rank" : used[0] ?? "rank";
  const names = used.length ? used : [endpoint];
  if (names.join() !== [...select.options].map((one) => one.value).join()) {
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  }
  select.value = endpoint;
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

const latest = (points) => points.at(-1)?.[1] ?? null;
const spanS = () => SPANS_S.find((span) => span >= samples.at(-1).at - samples[0].at) ?? KEPT_S;
const perSecond = (value) => value.toFixed(1);
const age = (seconds) => (seconds === LONGEST_S ? `${duration(seconds)} or more` : duration(seconds));
const rate = (name, wanted) => (before, after, seconds) => growth(before, after, name, wanted) / seconds;
/** A quantile between two readings; beyond the last bound of the buckets it is shown at that bound. */
const below = (name, share, wanted) => (before, after) => {
  const buckets = observed(before, after, name, wanted);
  const found = quantile(buckets, share);
  return found === Infinity ? buckets.at(-2).le : found;
};

function facts(status, now) {
  const requests = latest(points(rate("vista_requests_total", { endpoint: isWork })));
  const failed = total(now, "vista_requests_total", { endpoint: isWork, code: (code) => code >= "500" });
  const all = total(now, "vista_requests_total", { endpoint: isWork });
  const ranked = total(now, "vista_batch_users_count");
  const fresh = quantile(observed({}, now, "vista_freshness_seconds"), 0.5);
  const fact = (name, value, more) => el("div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, more) : null));
  return el("dl", { class: "facts" },
    fact("State", status.problem ? el("span", { class: "bad" }, "not ready") : "ready",
      status.problem || `up ${duration(status.uptime_s)}`),
    fact("Requests", requests === null ? "–" : `${requests.toFixed(1)} /s`, `${count(all)} since the start`),
    fact("Server errors", el("span", { class: failed ? "bad" : "" }, all ? percent(failed / all) : "–"),
      `${count(failed)} since the start`),
    fact("Waiting", count(total(now, "vista_queue_depth")), `${count(total(now, "vista_dropped_total"))} dropped`),
    fact("Users per batch", ranked ? (total(now, "vista_batch_users_sum") / ranked).toFixed(1) : "–", `${count(ranked)} batches`),
    fact("Freshness", fresh === null ? "–" : fresh === Infinity ? "over 1 y" : `about ${duration(fresh)}`,
      "median age of the newest event known"),
    fact("Model version", el("span", { class: "mono" }, status.model.version), `${count(total(now, "vista_switches_total"))} switches`));
}

/** A section with a chart. series: gives [{ name, points }]; write: a value as text; up: to a round value. */
function chart(title, series, write, more, up) {
  const body = el("div", { class: "chart" });
  const section = el("section", { class: "panel chart" }, el("header", {}, el("h2", {}, title), more), body);
  const draw = () => {
    const span = spanS();
    const all = series().map((one) => ({ ...one, now: latest(one.points) === null ? "–" : write(latest(one.points)) }));
    const label = `${title}, the last ${duration(span)}; now: ${all.map((one) => `${one.name} ${one.now}`).join(", ")}`;
    body.replaceChildren(
      lines(all, span, body.clientWidth, (value) => write(value).replace(" or more", ""), label, up),
      el("p", { class: "axis" }, el("span", {}, `${duration(span)} ago`), el("span", {}, "now")),
      el("ul", { class: "legend" }, all.map((one, number) =>
        el("li", {}, el("i", { class: `line s${number}` }), one.name, " ", el("b", {}, one.now)))));
  };
  return { section, draw };
}

function requestsSeries() {
  const of = (code) => points(rate("vista_requests_total", { endpoint: isWork, code }));
  return [
    { name: "answered", points: of((code) => code < "400") },
    { name: "refused (4xx)", points: of((code) => code >= "400" && code < "500") },
    { name: "failed (5xx)", points: of((code) => code >= "500") },
  ];
}

function latencySeries() {
  const of = (share) => points(below("vista_stage_seconds", share, { endpoint, stage: "total" }));
  return [{ name: "median", points: of(0.5) }, { name: "95 %", points: of(0.95) }, { name: "99 %", points: of(0.99) }];
}

function stagesSeries() {
  const mean = (stage) => (before, after) => {
    const wanted = { endpoint: (name) => name === "rank" || name === "infer", stage };
    const number = growth(before, after, "vista_stage_seconds_count", wanted);
    return number ? growth(before, after, "vista_stage_seconds_sum", wanted) / number : null;
  };
  return ["score", "read", "queue"].map((stage) => ({ name: stage, points: points(mean(stage)) }));
}

function freshnessSeries() {
  const of = (share) => points(below("vista_freshness_seconds", share));
  return [{ name: "median", points: of(0.5) }, { name: "95 %", points: of(0.95) }];
}

function eventsSeries() {
  const refused = new Set(["too late", "bad clock"]);
  const of = (outcome) => points(rate("vista_events_total", { outcome }));
  return [
    { name: "taken", points: of((outcome) => outcome !== "duplicate" && !refused.has(outcome)) },
    { name: "duplicate", points: of("duplicate") },
    { name: "refused", points: of((outcome) => refused.has(outcome)) },
  ];
}

function queueSeries() {
  return ["rank", "events", "recommend"].map((queue) => (
    { name: queue, points: points((_, after) => total(after, "vista_queue_depth", { queue })) }));
}

/** A table's head: [name, whether numbers stand below it]. */
const head = (...columns) => el("thead", {}, el("tr", {}, columns.map(([name, isNumber]) =>
  el("th", { scope: "col", class: isNumber ? "num" : null }, name))));

const panel = (title, ...children) => el("section", { class: "panel" }, el("header", {}, el("h2", {}, title)), children);
const numbers = (rows) => el("table", {}, el("tbody", {}, rows.map(([name, value]) =>
  el("tr", {}, el("td", {}, name), el("td", { class: "num" }, count(value))))));

function tables(now) {
  const outcomes = (now.vista_events_total ?? []).filter((one) => one.value);
  return [
    panel("Freshness since the start", freshnessTable(now)),
    panel("Since the start", numbers([
      ["users that the store did not know", total(now, "vista_store_misses_total")],
      ["errors of the store", total(now, "vista_store_errors_total")],
      ["answers while the store was away", total(now, "vista_degraded_total")],
      ...outcomes.map((one) => [`events ${one.labels.outcome}`, one.value]),
    ])),
  ];
}

function freshnessTable(now) {
  if (!total(now, "vista_freshness_seconds_count")) return el("p", { class: "note" }, "No user has been ranked yet.");
  const fresh = observed({}, now, "vista_freshness_seconds");
  const most = Math.max(...fresh.map((one) => one.number), 1);
  const rows = fresh.map(({ le, number }, i) => el("tr", {},
    el("td", {}, le === Infinity ? `more than ${duration(fresh[i - 1].le)}` : `up to ${duration(le)}`),
    el("td", { class: "meter-cell" }, el("span", { class: "meter" }, bar(number / most))),
    el("td", { class: "num" }, count(number))));
  return el("table", {}, head(["Age of the newest event"], [""], ["Rankings", true]), el("tbody", {}, rows));
}

function storeParts({ store, model }) {
  const counts = model.sketch_slots ? `, exact counts of ${count(model.sketch_slots)} items` : "";
  return [
    el("header", {}, el("h2", {}, "Store"),
      el("p", { class: "tag mono" }, store.url, store.is_up ? null : el("b", { class: "bad" }, " is away"))),
    el("div", { class: "scroll" }, el("table", {},
      head(["Version"], ["Users", true], ["Coverage", true], ["State"], ["Made (UTC)"]),
      el("tbody", {}, store.versions.map((one) => versionRow(one, store, model))))),
    el("p", { class: "note" }, `The model that answers: ${count(model.num_items)} items, ${count(model.num_tokens)} tokens of width `
      + `${model.width} in a memory of kind “${model.memory}”, segments of ${model.segment_events} events, `
      + `${model.recent_events} recent events${counts}.`),
  ];
}

function versionRow(one, store, model) {
  const badge = (text) => [" ", el("span", { class: "badge" }, text)];
  return el("tr", {},
    el("td", { class: "mono word" }, one.version, one.version === store.published ? badge("published") : null,
      one.version === model.version ? badge("answers") : null),
    el("td", { class: "num" }, count(one.num_users)),
    el("td", { class: "num" }, one.expected_users ? percent(Math.min(one.num_users / one.expected_users, 1)) : "–"),
    el("td", {}, one.is_complete ? "complete" : el("span", { class: "warn" }, "being made")),
    el("td", {}, momentWords(one.created)));
}
