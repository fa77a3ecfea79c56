// Elements, and values as people read them. Text goes in as text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const el = (tag, props, ...children) => fill(document.createElement(tag), props, children);
export const svg = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

/** An element whose width is a share of its parent's: set as a property, which the page's policy allows. */
export function bar(share) {
  const node = el("i");
  node.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return node;
}

export const count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));
export const score = (value) => value.toFixed(3);
export const percent = (value) => (value > 0 && value < 0.001 ? "<0.1 %" : `${(value * 100).toFixed(1)} %`);

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const steps = [[31557600, "y"], [2629800, "mo"], [86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, unit] = steps.find(([size]) => seconds >= size) ?? [1, "s"];
  const value = seconds / size;
  return `${value >= 10 || Number.isInteger(value) ? Math.round(value) : value.toFixed(1)} ${unit}`;
}

export function latency(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const ms = seconds * 1000;
  if (ms >= 1000) return `${seconds.toFixed(2)} s`;
  return `${ms >= 10 ? Math.round(ms) : ms.toFixed(1)} ms`;
}

export const ago = (at) => (at === null ? "never" : `${duration(Math.max(0, (Date.now() - Date.parse(at)) / 1000))} ago`);

/** "2024-05-01 10:30", in UTC as the server has it. */
export const moment = (at) => (at === null ? "–" : at.slice(0, 16).replace("T", " "));
/** The same as two words, between which alone a line may end. */
export const momentWords = (at) => moment(at).split(" ").flatMap((word) => [el("span", { class: "word" }, word), " "]);
export const day = (at) => (at === null ? "–" : at.slice(0, 10));

/** The name of an item, and what the catalogue knows of it. */
export function itemName(one) {
  const features = Object.entries(one.features ?? {}).map(([name, value]) => (typeof value === "string" ? value : `${name} ${value}`));
  const id = one.item === null ? "item not in the catalogue" : String(one.item);
  return [el("span", { class: "name" }, id), features.length ? el("span", { class: "tag" }, ` ${features.join(" · ")}`) : null];
}

/** Put what a promise brings into a place: a word while it lasts, and what went wrong with a way to try again. */
export async function show(place, what, load, render) {
  const turn = Symbol(what);
  place.turn = turn;
  place.replaceChildren(el("p", { class: "busy", role: "status" }, `Loading ${what} …`));
  try {
    const value = await load();
    if (place.turn === turn) place.replaceChildren(...[render(value)].flat(Infinity).filter(Boolean));
  } catch (error) {
    if (place.turn !== turn) return;
    const again = el("button", { type: "button", onclick: () => show(place, what, load, render) }, "Try again");
    place.replaceChildren(el("div", { class: "problem", role: "alert" }, el("p", {}, `${what}: ${error.message}`), again));
  }
}
