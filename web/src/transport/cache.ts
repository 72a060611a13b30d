// What an admin asks of the cache, and does to it. Every call raises Problem.

import { call, request } from "./api";
import { Backoff, pause } from "./backoff";
import {
  cachedOf,
  countsOf,
  mapsOf,
  sampleOf,
  samplesOf,
  sharedOf,
  type CachedConversation,
  type PageMaps,
  type Sample,
  type SharedPrefixes,
} from "./cache_wire";
import { asProblem, Problem, UNREACHABLE } from "./problem";
import { events } from "./sse";

const AT = "/admin/cache";
const FORGET_SECONDS = 4;
const SILENCE_SECONDS_MAX = 20; // a sample comes every second

export type Counts = Record<string, number>;

export async function pages(): Promise<PageMaps> {
  return mapsOf(await call("GET", `${AT}/pages`));
}

export async function conversations(
  after: string | null,
  limit: number,
): Promise<{ conversations: CachedConversation[]; next: string | null }> {
  const query = new URLSearchParams({ limit: String(limit) });
  if (after !== null) query.set("after", after);
  return cachedOf(await call("GET", `${AT}/conversations?${query}`));
}

/** limit: so many prefixes at the most, 1 to 100. */
export async function prefixes(limit: number): Promise<SharedPrefixes> {
  return sharedOf(await call("GET", `${AT}/prefixes?limit=${limit}`));
}

export async function flush(): Promise<Counts> {
  return countsOf(await call("POST", `${AT}/flush`, {}));
}

/** seconds: 0 ends it. */
export async function lease(conversation: string, seconds: number): Promise<Counts> {
  return countsOf(await call("POST", `${AT}/lease`, { conversation, seconds }));
}

export async function warm(conversation: string): Promise<Counts> {
  return countsOf(await call("POST", `${AT}/warm`, { conversation }));
}

export async function evict(conversation: string): Promise<Counts> {
  return countsOf(await call("POST", `${AT}/evict`, { conversation }));
}

/** Delete it, whoever owns it. A deletion that had to wait for a busy disk or store is under way: it
 * is asked for again for some seconds, and has been done where there is nothing left to delete. */
export async function forget(conversation: string): Promise<Counts> {
  const end = Date.now() + FORGET_SECONDS * 1000;
  const wait = new Backoff(0.5, 2);
  for (let again = false; ; again = true) {
    try {
      return countsOf(await call("POST", `${AT}/forget`, { conversation }));
    } catch (error) {
      const problem = asProblem(error);
      if (again && problem.status === 404) return { conversations: 1 };
      if (!problem.passing || Date.now() > end) throw problem;
    }
    await pause(wait.next() + 0.2, new AbortController().signal);
  }
}

/** count: so many pages of the disk, 1 to 4,096. */
export async function verify(count: number): Promise<Counts> {
  return countsOf(await call("POST", `${AT}/verify`, { pages: count }));
}

export interface Watcher {
  /** In the order they were taken; some may have been told before. */
  samples: (taken: Sample[]) => void;
  /** null: it is heard again. */
  problem: (problem: Problem | null) => void;
}

/** Tell the watcher of samples until the signal, over however many connections. Ends by itself
 * where the server says that it will not tell. */
export async function watch(watcher: Watcher, signal: AbortSignal): Promise<void> {
  const wait = new Backoff(0.5, 8);
  while (!signal.aborted) {
    try {
      await watchOnce(watcher, signal, () => wait.reset());
      // The server drains; another one may be there soon.
      watcher.problem(new Problem(UNREACHABLE));
    } catch (error) {
      if (signal.aborted) return;
      const problem = asProblem(error);
      watcher.problem(problem);
      if (!problem.passing) return;
    }
    await pause(wait.next() + 0.2, signal);
  }
}

async function watchOnce(watcher: Watcher, signal: AbortSignal, heard: () => void): Promise<void> {
  // A connection that is half dead says nothing and does not end.
  const silence = new AbortController();
  let timer: ReturnType<typeof setTimeout> | undefined;
  const restart = (): void => {
    clearTimeout(timer);
    timer = setTimeout(() => silence.abort(), SILENCE_SECONDS_MAX * 1000);
  };
  restart();
  try {
    const both = AbortSignal.any([signal, silence.signal]);
    const response = await request("GET", `${AT}/events`, undefined, { signal: both });
    if (response.body === null) return;
    for await (const { event, data } of events(response.body, restart)) {
      heard();
      watcher.problem(null);
      const value: unknown = JSON.parse(data);
      watcher.samples(event === "history" ? samplesOf(value) : [sampleOf(value)]);
    }
  } finally {
    clearTimeout(timer);
  }
}
