// One user: what is recommended and why, what the summary tokens are made of, and the history.

import { api } from "./api.js";
import { bars, heat } from "./chart.js";
import { ago, bar, count, day, duration, el, itemName, moment, momentWords, percent, score, show } from "./dom.js";
import { whyView } from "./why.js";

const PAGE_EVENTS = 20;
const OLD_S = 30 * 86400;
const asked = { k: 10, skipSeen: true, when: "" };

const address = (user, item) => `#${new URLSearchParams(item === undefined ? { user } : { user, item })}`;
const panel = (title, ...children) => el("section", { class: "panel" }, el("header", {}, el("h2", {}, title)), children);

export function userView(main, { user, item }) {
  main.replaceChildren(findForm(user ?? ""));
  if (user === undefined || user === "") return void main.append(someUsers());
  const place = el("div", { class: "stack" });
  main.append(place);
  show(place, "user", () => api.user(user).catch(whenUnknown), (known) => parts(user, item, known));
}

/** A user the store does not know is a designed case: the model has an answer to an empty history. */
function whenUnknown(error) {
  if (error.status === 404) return null;
  throw error;
}

function findForm(user) {
  const input = el("input", { id: "user", name: "user", value: user, required: true, autocomplete: "off", spellcheck: "false" });
  const go = (event) => {
    event.preventDefault();
    location.hash = address(input.value.trim());
  };
  return el("form", { class: "find", onsubmit: go, role: "search" },
    el("div", { class: "field wide" }, el("label", { for: "user" }, "User id"), input),
    el("button", { class: "primary" }, "Look up"));
}

function someUsers() {
  const place = el("div");
  const link = (one) => el("li", {}, el("a", { href: address(one.user) }, el("span", { class: "name" }, one.user),
    el("span", { class: "tag" }, `${count(one.num_events)} events`), el("span", { class: "tag" }, `newest ${ago(one.as_of)}`)));
  const longestFirst = (users) => users.sort((a, b) => b.num_events - a.num_events);
  show(place, "users", api.users, ({ users }) => (users.length
    ? el("ul", { class: "users" }, longestFirst(users).map(link))
    : el("p", { class: "note" }, "The store holds no user of this model version yet. Run vista summarize, or post events.")));
  return panel("Some users of the store", place);
}

function parts(user, item, known) {
  if (known === null) {
    return [
      el("section", { class: "panel stack" }, el("h1", {}, el("span", { class: "tag" }, "User "), user),
        el("p", { class: "notice" },
          "The store does not know this user. What follows is a cold start: the model's answer to an empty history.")),
      ranking(user, item, null, null),
    ];
  }
  const tokens = api.tokens(user);
  tokens.catch(() => {}); // each place that shows them says what went wrong
  return [facts(user, known), ranking(user, item, known, tokens), memoryPanel(user, tokens), historyPanel(user)];
}

function facts(user, known) {
  const fact = (name, value, more) => el("div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, more) : null));
  const { number, width, codec } = known.tokens;
  return el("section", { class: "panel stack" },
    el("h1", {}, el("span", { class: "tag" }, "User "), user),
    el("dl", { class: "facts" },
      fact("Events in the summary", count(known.num_events), `newest ${count(known.recent_events.length)} kept as they are`),
      fact("Newest event", ago(known.as_of), `${moment(known.as_of)} UTC`),
      fact("Summary tokens", count(number), number ? `${width} wide, ${codec}` : "this model has none"),
      fact("Model version", el("span", { class: "mono" }, known.model_version))));
}

// -- what is recommended, and why

function ranking(user, item, known, tokens) {
  const list = el("div");
  const why = el("section", { class: "panel stack why", "aria-label": "Why" });
  const newest = known?.as_of ?? null;
  const isOld = newest !== null && (Date.now() - Date.parse(newest)) / 1000 > OLD_S;
  const when = asked.when || (isOld ? "newest" : "now");
  const load = () => {
    why.replaceChildren(el("p", { class: "note" }, "Choose an item to see why it has its score."));
    show(list, "recommendations", () => ranked(user, item, moments(choice.value, newest)),
      (found) => rankingList(user, item, found, why, tokens));
  };
  const choice = el("select", { id: "when", onchange: () => { asked.when = choice.value; load(); } },
    el("option", { value: "now" }, "now"),
    newest === null ? null : el("option", { value: "newest" }, "just after the newest event"));
  choice.value = newest === null ? "now" : when;
  const number = el("select", { id: "k", onchange: () => { asked.k = Number(number.value); load(); } },
    [10, 20, 50].map((k) => el("option", { value: k }, k)));
  number.value = asked.k;
  const seen = el("input", { type: "checkbox", checked: asked.skipSeen, onchange: () => { asked.skipSeen = seen.checked; load(); } });
  const options = el("div", { class: "options" },
    el("label", { for: "when" }, "As of ", choice), el("label", { for: "k" }, "Items ", number),
    el("label", { class: "check" }, seen, "Leave out what the state names as seen"));
  load();
  return el("div", { class: "columns" }, panel("Recommended", el("div", { class: "stack" }, options, list, otherItem(user))), why);
}

function moments(when, newest) {
  return when === "newest" ? new Date(Date.parse(newest) + 1000).toISOString() : new Date().toISOString();
}

/** The best items, and the one the address names; all explained as of one moment. */
async function ranked(user, item, at) {
  const found = await api.recommend(user, asked.k, at, asked.skipSeen);
  const items = found.items.map((one) => one.item);
  const isExtra = item !== undefined && !items.map(String).includes(item);
  const wanted = isExtra ? [...items, item] : items;
  if (!wanted.length) return { ...found, candidates: [] };
  const explained = await api.explain(user, wanted, at);
  const extra = isExtra ? explained.candidates.filter((one) => String(one.item) === item) : [];
  const best = explained.candidates.filter((one) => !extra.includes(one));
  return { ...explained, num_scored: found.num_scored, is_exact: found.is_exact, candidates: [...best, ...extra], extra };
}

function rankingList(user, item, found, why, tokens) {
  if (!found.candidates.length) return el("p", { class: "note" }, "No item is left to recommend.");
  const task = found.tasks[0];
  const most = Math.max(...found.candidates.map((one) => one.scores[task]));
  const press = (number) => ({ type: "button", "aria-pressed": "false", onclick: () => choose(number) });
  const buttons = found.candidates.map((one, number) => el("button", press(number),
    el("span", { class: "place" }, found.extra?.includes(one) ? "·" : number + 1),
    el("span", {}, itemName(one), found.extra?.includes(one) ? el("span", { class: "tag" }, " (asked for)") : null),
    el("span", { class: "num" }, score(one.scores[task])),
    el("span", { class: "meter" }, bar(one.scores[task] / most))));
  function choose(number, isByHand = true) {
    buttons.forEach((button, other) => button.setAttribute("aria-pressed", String(other === number)));
    const one = found.candidates[number];
    if (isByHand) history.replaceState(null, "", address(user, one.item));
    why.replaceChildren(...whyView(one, found, tokens));
    if (isByHand && matchMedia("(max-width: 979px)").matches) why.scrollIntoView({ block: "start" });
  }
  const first = found.candidates.findIndex((one) => String(one.item) === item);
  choose(Math.max(first, 0), false);
  const number = count(found.num_scored);
  const scored = found.is_exact ? `All ${number} items were scored` : `A first stage chose ${number} items to score`;
  return [
    found.is_degraded ? el("p", { class: "notice" }, "The store is away: this is the answer to an empty history.") : null,
    el("ol", { class: "ranking" }, buttons.map((button) => el("li", {}, button))),
    el("p", { class: "note" }, `${scored}, as of ${moment(found.at)} UTC. The number is the probability of “${task}”.`),
  ];
}

function otherItem(user) {
  const input = el("input", { id: "item", required: true, autocomplete: "off", spellcheck: "false" });
  const go = (event) => {
    event.preventDefault();
    location.hash = address(user, input.value.trim());
  };
  return el("form", { class: "find", onsubmit: go },
    el("div", { class: "field wide" }, el("label", { for: "item" }, "Another item, by id"), input), el("button", {}, "Explain"));
}

// -- the memory

function memoryPanel(user, tokens) {
  const place = el("div", { class: "stack tight" });
  show(place, "summary tokens", () => tokens, (found) => memoryParts(found));
  return panel("What the summary tokens are made of", place);
}

function memoryParts(found) {
  if (found.why_not) return el("p", { class: "note" }, found.why_not);
  const traced = found.tokens.reduce((sum, one) => sum + one.traced, 0) / Math.max(found.tokens.length, 1);
  const label = `${found.tokens.length} summary tokens by ${found.num_bins} stretches of the history; on average ${percent(traced)} `
    + "of a token can be traced.";
  return [
    el("p", { class: "note" },
      `One row per token, token 1 on top, and one column per ${found.num_bins}th of the ${count(found.num_summarized)} summarized `
      + "events. The stronger the colour, the more of the token the events of that stretch wrote."),
    el("figure", { class: "chart" }, heat(found.tokens.map((one) => one.by_bin), label),
      el("figcaption", { class: "axis" }, el("span", {}, "oldest event"), el("span", {}, "newest closed segment"))),
    el("p", {}, el("b", {}, percent(traced)), " of the average token can be traced to events; ",
      found.num_traced < found.num_summarized
        ? `${count(found.num_summarized - found.num_traced)} older events are in the tokens as sums, and cannot be told apart any more. `
        : "every summarized event is known. ",
      found.note),
  ];
}

// -- the history

function historyPanel(user) {
  const place = el("div", { class: "stack" });
  show(place, "history", () => api.history(user, PAGE_EVENTS), (found) => historyParts(user, found));
  return panel("History", place);
}

function historyParts(user, found) {
  if (!found.events.length) return el("p", { class: "note" }, "No event yet.");
  const shown = count(found.num_events - found.num_missing);
  const spanS = (Date.parse(found.last_at) - Date.parse(found.first_at)) / 1000;
  const most = count(Math.max(...found.by_time));
  const body = el("tbody", {}, found.events.map(eventRow));
  const more = el("div", { class: "options" });
  offerMore(user, found, body, more);
  return [
    el("figure", { class: "chart" },
      bars(found.by_time, `${shown} events from ${day(found.first_at)} to ${day(found.last_at)}, by time`),
      el("figcaption", { class: "axis" }, el("span", { class: "word" }, day(found.first_at)),
        el("span", {}, `${shown} events over ${duration(spanS)}, at most ${most} in ${duration(spanS / found.by_time.length)}`),
        el("span", { class: "word" }, day(found.last_at)))),
    found.num_missing ? el("p", { class: "notice" }, `${count(found.num_missing)} older events are not shown. ${found.note}`) : null,
    el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, el("th", { class: "num", scope: "col" }, "No."), el("th", { scope: "col" }, "Time (UTC)"),
        el("th", { scope: "col" }, "Item"), el("th", { scope: "col" }, "Action"))), body)),
    more,
  ];
}

const eventRow = (one) => el("tr", {},
  el("td", { class: "num tag" }, count(one.place + 1)), el("td", { class: "when" }, momentWords(one.at)), el("td", {}, itemName(one)),
  el("td", {}, one.action ?? "–"));

function offerMore(user, found, body, place) {
  if (found.next_before === null || !found.events.length) return place.replaceChildren();
  const button = el("button", { type: "button" }, "Show older events");
  button.addEventListener("click", () => {
    show(place, "older events", () => api.history(user, PAGE_EVENTS, found.next_before), (older) => {
      body.append(...older.events.map(eventRow));
      offerMore(user, older, body, place);
      return [...place.childNodes].filter((node) => !node.classList?.contains("busy"));
    });
  });
  place.replaceChildren(button);
}
