// Which view is shown, from what stands behind the # of the address.

import { api } from "./api.js";
import { el } from "./dom.js";
import { operatorView } from "./operator.js";
import { userView } from "./user.js";

const STATUS_MS = 10000;
const main = document.getElementById("content");
let leave = () => {};

/** { user, item } or { operator: "" } */
export const place = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

function route() {
  if (location.hash === "#content") return main.focus();
  leave();
  const at = place();
  const view = "operator" in at ? "operator" : "user";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = view === "operator" ? "Operator · VISTA" : at.user ? `${at.user} · VISTA` : "VISTA";
  leave = (view === "operator" ? operatorView(main) : userView(main, at)) ?? (() => {});
}

async function tellStatus() {
  const line = document.getElementById("server");
  try {
    const found = await api.status();
    line.replaceChildren(
      el("span", { class: found.problem ? "dot bad" : "dot" }),
      found.problem ? `Not ready: ${found.problem}` : "Ready",
      el("span", { class: "mono", title: "Model version that answers" }, found.model.version));
  } catch (error) {
    line.replaceChildren(el("span", { class: "dot bad" }), error.message);
  }
  setTimeout(tellStatus, STATUS_MS);
}

addEventListener("hashchange", route);
route();
tellStatus();
