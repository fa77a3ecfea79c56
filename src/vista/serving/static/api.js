// The server's own endpoints, with the token of this tab where one is asked for.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const TOKEN = "vista-token";
const ASKED_MS = 30000;
const BUSY = [429, 503, 504]; // asked once more, after a pause
const PAUSE_MS = 1000;
let asking = null;

/** Ask the person for the token; whoever asks meanwhile waits for the same answer. */
function askForToken(problem) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("token");
    const input = document.getElementById("token-value");
    document.getElementById("token-problem").textContent = problem;
    dialog.addEventListener("close", () => {
      if (input.value) sessionStorage.setItem(TOKEN, input.value);
      input.value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** JSON in which integers beyond 2^53 stay exact, as strings: ids have 64 bits, and "7" and 7 are one id. */
export function parse(text) {
  const exact = text.replace(/"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g,
    (part) => (/^-?\d{16,}$/.test(part) ? `"${part}"` : part));
  return JSON.parse(exact);
}

async function request(path, options = {}, isAgain = false) {
  const sent = sessionStorage.getItem(TOKEN);
  const headers = sent ? { authorization: `Bearer ${sent}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, signal: AbortSignal.timeout(ASKED_MS) });
  } catch {
    throw new Refused(0, "The server does not answer.");
  }
  if (answer.status === 401) {
    const now = sessionStorage.getItem(TOKEN);
    if (now === sent) {
      sessionStorage.removeItem(TOKEN);
      await askForToken(sent ? "That token was refused." : "");
      if (!sessionStorage.getItem(TOKEN)) throw new Refused(401, "No token was given.");
    }
    return request(path, options);
  }
  if (BUSY.includes(answer.status) && !isAgain) {
    await new Promise((go) => setTimeout(go, PAUSE_MS));
    return request(path, options, true);
  }
  const text = await answer.text();
  if (answer.ok) return text;
  let message = `The server answered ${answer.status}.`;
  try {
    message = JSON.parse(text).error;
  } catch { /* not JSON: the status is all there is */ }
  throw new Refused(answer.status, message);
}

const post = async (path, body) => parse(await request(path, { method: "POST", body: JSON.stringify(body) }));
const get = async (path) => parse(await request(path));
const named = (user) => encodeURIComponent(user);

export const api = {
  users: () => get("v1/users?limit=48"),
  user: (user) => get(`v1/users/${named(user)}`),
  history: (user, limit, before) => get(`v1/history/${named(user)}?limit=${limit}${before === undefined ? "" : `&before=${before}`}`),
  tokens: (user) => get(`v1/tokens/${named(user)}?events=3`),
  recommend: (user, k, at, skipSeen) => post("v1/recommend", { user, k, at, filters: { exclude_seen: skipSeen } }),
  explain: (user, candidates, at) => post("v1/explain", { user, candidates, at }),
  status: () => get("v1/status"),
  metrics: () => request("metrics"),
};
