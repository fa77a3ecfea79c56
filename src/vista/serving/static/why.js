// Why one candidate has its score: what the server's explanation of it says.

import { bars } from "./chart.js";
import { bar, count, day, duration, el, itemName, moment, percent, score, show } from "./dom.js";

const NUM_SHOWN = 5;
const SOURCES = { summary: "the summary", recent_events: "recent events", counts: "exact counts" };

const sum = (values) => values.reduce((all, value) => all + value, 0);
const part = (title, ...children) => el("section", { class: "stack tight" }, el("h3", {}, title), children);

/** Places of the largest values, largest first. */
function largest(values, number) {
  return values.map((value, place) => [value, place]).filter(([value]) => value > 0).sort((a, b) => b[0] - a[0]).slice(0, number);
}

export function whyView(one, found, tokens) {
  const { attention } = one;
  return [
    el("header", {}, el("h2", {}, "Why ", itemName(one)),
      el("p", { class: "legend" }, found.tasks.map((task) => el("span", {}, `${task} `, el("b", {}, score(one.scores[task])))))),
    one.is_known ? null : el("p", { class: "note" }, "The catalogue does not know this item; it is scored as an unknown one."),
    part("Where the ranker looked", attentionSplit(attention)),
    part("The score without each source", withoutTable(one, found.tasks[0])),
    one.counted.length ? part("Exact counts", countedList(one.counted)) : null,
    one.meetings_after.some((meetings) => meetings > 0)
      ? part("What came right before it, the last times", precedingList(one.meetings_after, found.recent_events)) : null,
    part("Recent events it looked at most", recentList(attention.recent_events, found.recent_events)),
    attention.tokens.length && tokens
      ? part("Summary tokens it looked at most, and who wrote them", tokenPart(attention.tokens, tokens)) : null,
    el("p", { class: "note" }, "Weights are those of the pass that gave the score, means over heads and blocks. They tell where the ranker "
      + "looked; the scores without a source tell what difference it made."),
  ].filter(Boolean);
}

function attentionSplit(attention) {
  const shares = [["summary tokens", sum(attention.tokens)], ["recent events", sum(attention.recent_events)],
    ["the item itself", attention.itself]];
  return [
    el("div", { class: "split", "aria-hidden": "true" }, shares.map(([, share]) => bar(share))),
    el("ul", { class: "legend" }, shares.map(([name, share], number) =>
      el("li", {}, el("i", { class: `s${number}` }), name, " ", el("b", {}, percent(share))))),
  ];
}

function withoutTable(one, task) {
  const rows = Object.entries(one.scores_without).map(([source, scores]) => {
    const change = Number(score(one.scores[task] - scores[task]));
    return el("tr", {}, el("td", {}, `without ${SOURCES[source] ?? source}`), el("td", { class: "num" }, score(scores[task])),
      el("td", { class: "num" }, `${change > 0 ? "+" : change < 0 ? "−" : ""}${score(Math.abs(change))}`));
  });
  return el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, el("span", { class: "hidden-text" }, "Source left out")),
    el("th", { class: "num", scope: "col" }, "score"), el("th", { class: "num", scope: "col" }, "it brings"))), el("tbody", {}, rows));
}

function countedList(counted) {
  return el("ul", { class: "shares" }, counted.map((one) => el("li", {},
    el("span", {}, one.feature === null ? "this item" : `same ${one.feature}`),
    el("span", { class: "tag" }, one.events ? `${duration(one.seconds_since)} and ${count(one.events_since)} events ago` : ""),
    el("span", { class: "num" }, one.events ? `${count(one.events)} ×` : "never"))));
}

function precedingList(meetings, events) {
  const ofItem = new Map(); // an item may stand among the recent events several times: the newest, the first, speaks for all
  events.forEach((event, place) => { if (meetings[place] && !ofItem.has(event.item)) ofItem.set(event.item, [event, meetings[place]]); });
  return el("ul", { class: "shares" }, [...ofItem.values()].sort((a, b) => b[1] - a[1]).slice(0, NUM_SHOWN).map(([event, number]) => el("li", {},
    el("span", {}, itemName(event), el("span", { class: "tag" }, " · among the newest events")),
    el("span", { class: "tag word", title: `${moment(event.at)} UTC` }, day(event.at)), el("span", { class: "num" }, `${count(number)} ×`))));
}

function recentList(weights, events) {
  const best = largest(weights, NUM_SHOWN);
  if (!best.length) return el("p", { class: "note" }, "There are none.");
  return el("ul", { class: "shares" }, best.map(([weight, place]) => eventLine(events[place], weight)));
}

const eventLine = (event, share) => el("li", {},
  el("span", {}, itemName(event), event.action === null ? null : el("span", { class: "tag" }, ` · ${event.action}`)),
  el("span", { class: "tag word", title: `${moment(event.at)} UTC` }, day(event.at)), el("span", { class: "num" }, percent(share)));

function tokenPart(weights, tokens) {
  const place = el("div", { class: "stack tight" });
  show(place, "traces", () => tokens, (found) => (found.why_not ? el("p", { class: "note" }, found.why_not) : tokenTraces(weights, found)));
  return place;
}

function tokenTraces(weights, found) {
  const ofBin = (bin) => sum(weights.map((weight, token) => weight * found.tokens[token].by_bin[bin]));
  const byBin = Array.from({ length: found.num_bins }, (_, bin) => ofBin(bin));
  const reached = sum(byBin) / (sum(weights) || 1);
  return [
    el("figure", { class: "chart" },
      bars(byBin, `What was looked at through summary tokens, by place in the history; ${percent(reached)} of it can be traced`, 40),
      el("figcaption", { class: "axis" },
        el("span", {}, "oldest event"), el("span", {}, `${percent(reached)} traced`), el("span", {}, "newest"))),
    el("ul", { class: "traces" }, largest(weights, 3).map(([weight, number]) => tokenTrace(found.tokens[number], number, weight))),
  ];
}

function tokenTrace(token, number, weight) {
  return el("li", {},
    el("p", { class: "head" },
      el("span", {}, el("b", {}, `Token ${number + 1}`), el("span", { class: "tag" }, ` ${percent(token.traced)} of it traced`)),
      el("span", {}, percent(weight))),
    token.events.length
      ? el("ul", { class: "shares" }, token.events.map((event) => eventLine(event, event.share)))
      : el("p", { class: "note" }, "None of the events that wrote it is known any more."));
}
