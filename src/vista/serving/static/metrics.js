// Prometheus's text, as numbers; rates and quantiles between two readings of it.

/** { name: [{ labels, value }] } */
export function parseMetrics(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    (found[match[1]] ??= []).push({ labels, value: Number(match[3].replace("+Inf", "Infinity")) });
  }
  return found;
}

const fits = (labels, wanted) => Object.entries(wanted).every(([name, value]) =>
  (typeof value === "function" ? value(labels[name]) : labels[name] === value));

/** The sum of a name's series that fit. */
export const total = (metrics, name, wanted = {}) =>
  (metrics?.[name] ?? []).filter((one) => fits(one.labels, wanted)).reduce((sum, one) => sum + one.value, 0);

/** How much a sum has grown from one reading to the next; a server that began anew counts from 0. */
export function growth(before, after, name, wanted = {}) {
  const now = total(after, name, wanted);
  const then = total(before, name, wanted);
  return now < then ? now : now - then;
}

/** [{ le, number }] of what was observed between two readings, not cumulated. */
export function observed(before, after, name, wanted = {}) {
  const bounds = [...new Set((after[`${name}_bucket`] ?? []).map((one) => one.labels.le))];
  const ordered = bounds.map((le) => [le === "+Inf" ? Infinity : Number(le), le]).sort((a, b) => a[0] - b[0]);
  let below = 0;
  return ordered.map(([value, le]) => {
    const upTo = growth(before, after, `${name}_bucket`, { ...wanted, le });
    const number = Math.max(upTo - below, 0);
    below = upTo;
    return { le: value, number };
  });
}

/** The value below which a share of the observations lies, between its bucket's bounds; Infinity beyond the last, null without any. */
export function quantile(buckets, share) {
  const all = buckets.reduce((sum, one) => sum + one.number, 0);
  if (!all) return null;
  let left = share * all, low = 0;
  for (const { le, number } of buckets) {
    if (number >= left && number > 0) return le === Infinity ? Infinity : low + (le - low) * (left / number);
    left -= number;
    low = le;
  }
  return low;
}
