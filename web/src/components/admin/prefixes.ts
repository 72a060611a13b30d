// Shared prefixes as rows of a picture: each begins where what it continues ends.

import type { SharedPrefix } from "../../transport/cache_wire";
import { pages, whole } from "../figures";

export interface Row {
  prefix: SharedPrefix;
  level: number; // of the tree, from 1 on
  start: number; // tokens before it
  above: number | null; // the row of what it continues
  place: number; // among those that continue the same, from 1 on
  beside: number; // how many those are
  last: boolean; // of those
}

/** In the order of a tree: after each what continues it, what saves most first, as it is given. */
export function rowsOf(prefixes: readonly SharedPrefix[]): Row[] {
  const under = new Map<number | null, number[]>();
  for (const [at, { above }] of prefixes.entries()) {
    const beside = under.get(above);
    if (beside) beside.push(at);
    else under.set(above, [at]);
  }
  const rows: Row[] = [];
  // What is still to be told, the next at the end: a tree may be deep.
  const rest: { at: number; level: number; start: number; above: number | null; place: number; beside: number }[] = [];
  const push = (above: number | null, row: number | null, level: number, start: number): void => {
    const beside = under.get(above) ?? [];
    for (let place = beside.length; place > 0; place -= 1) {
      rest.push({ at: beside[place - 1] ?? 0, level, start, above: row, place, beside: beside.length });
    }
  };
  push(null, null, 1, 0);
  for (let next = rest.pop(); next; next = rest.pop()) {
    const prefix = prefixes[next.at];
    if (!prefix) continue;
    const { level, start, above, place, beside } = next;
    rows.push({ prefix, level, start, above, place, beside, last: place === beside });
    push(next.at, rows.length - 1, level + 1, start + prefix.tokens);
  }
  return rows;
}

export const times = (count: number): string => (count === 1 ? "once" : count === 2 ? "twice" : `${whole(count)} times`);

const between = (prefix: SharedPrefix): string | null =>
  prefix.hitsLeast < prefix.hits ? whole(prefix.hitsLeast) : null;

/** How often it was found: "3", or "1–3" where its first pages were found more often. */
export const foundOf = ({ prefix }: Row): string =>
  [between(prefix), whole(prefix.hits)].filter((each) => each !== null).join("–");

export const ownerOf = (prefix: SharedPrefix): string => (prefix.isPublic ? "public" : (prefix.owner ?? ""));

/** Which one it is: a public prompt by its registered name, else a root by its label. */
export function nameOf({ prefix, above }: Row): string {
  if (prefix.prompts.length) return prefix.prompts.join(", ");
  return above === null ? prefix.label : "";
}

/** All of it, in words. */
export function told(row: Row): string {
  const { prefix } = row;
  const { copies } = prefix;
  const after = row.start ? `, after ${whole(row.start)} others` : "";
  const least = between(prefix);
  const found = least === null ? times(prefix.hits) : `${least} to ${times(prefix.hits)}`;
  const saved = `found ${found}, ${whole(prefix.saved)} tokens saved`;
  const more = prefix.savedUnder > prefix.saved ? `, ${whole(prefix.savedUnder)} with what continues it` : "";
  const now = `used by ${prefix.owners === 0 ? "nobody" : whole(prefix.owners)} now`;
  const branches = `${whole(prefix.branches)} ${prefix.branches === 1 ? "branch" : "branches"}`;
  const places = (["host", "disk"] as const).filter((place) => copies[place] > 0);
  const kept = places.length ? `copies: ${places.map((place) => `${whole(copies[place])} ${place}`).join(", ")}` : "no copies";
  const name = nameOf(row);
  return `${ownerOf(prefix)}${name && ` ${name}`}: ${whole(prefix.tokens)} tokens in ${pages(prefix.pages)}${after}; ${saved}${more}; ${now}, ${branches}; ${kept}`;
}
