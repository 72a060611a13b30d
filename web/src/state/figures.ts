// From samples to what charts show: plain functions.

import type { Sample } from "../transport/cache_wire";

export const KEPT_SECONDS = 300;

/** The samples after more have come, oldest first, none twice, none older than five minutes. */
export function joined(known: readonly Sample[], more: readonly Sample[]): Sample[] {
  const last = number(known.at(-1), "at") ?? -Infinity;
  const all = [...known, ...more.filter((each) => (number(each, "at") ?? -Infinity) > last)];
  const oldest = (number(all.at(-1), "at") ?? 0) - KEPT_SECONDS;
  const first = all.findIndex((each) => (number(each, "at") ?? 0) >= oldest);
  return first > 0 ? all.slice(first) : all;
}

export function number(sample: Sample | undefined, column: string): number | null {
  const value = sample?.[column];
  return typeof value === "number" ? value : null;
}

/** Of several columns; null where none of them is told. */
export function sum(sample: Sample | undefined, columns: readonly string[]): number | null {
  const told = columns.map((column) => number(sample, column)).filter((each) => each !== null);
  return told.length ? told.reduce((total, each) => total + each, 0) : null;
}

/** The share of the tokens asked for that were found, 0 to 1, over the samples of the last
 * `seconds`; null where none was asked for. */
export function hitRate(samples: readonly Sample[], seconds: number): number | null {
  const end = number(samples.at(-1), "at") ?? 0;
  let asked = 0;
  let found = 0;
  for (const each of samples) {
    if ((number(each, "at") ?? 0) <= end - seconds) continue;
    const length = number(each, "seconds") ?? 0;
    asked += (number(each, "query_tokens_a_second") ?? 0) * length;
    found += (number(each, "hit_tokens_a_second") ?? 0) * length;
  }
  return asked > 0 ? found / asked : null;
}

/** A round number that is not below: 1, 2 or 5 times a power of ten; with `binary`, a power of 2. */
export function roundUp(value: number, binary = false): number {
  if (!(value > 0)) return 1;
  if (binary) return 2 ** Math.ceil(Math.log2(value));
  const power = 10 ** Math.floor(Math.log10(value));
  return ([1, 2, 5].find((each) => each * power >= value) ?? 10) * power;
}
