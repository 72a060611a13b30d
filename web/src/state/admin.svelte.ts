// Admin: what the admin page shows. Samples come by themselves; the page map, shared prefixes and
// the list of conversations are asked for every few seconds, while somebody can see them.

import * as cache from "../transport/cache";
import type { CachedConversation, PageMaps, Sample, SharedPrefixes } from "../transport/cache_wire";
import { asProblem, type Problem } from "../transport/problem";
import { joined } from "./figures";
import { session } from "./session.svelte";

const POLL_SECONDS = 2;
const LIST_EVERY = 3; // polls
const LIST_LENGTH = 20;
const PREFIXES_MOST = 40;
const NOTICE_SECONDS = 12;

class Admin {
  samples = $state.raw<readonly Sample[]>([]);
  maps = $state.raw<PageMaps | null>(null);
  prefixes = $state.raw<SharedPrefixes | null>(null);
  conversations = $state.raw<readonly CachedConversation[]>([]);
  more = $state(false); // there are older ones
  listed = $state(false);
  #unheard = $state.raw<Problem | null>(null); // why there are no samples
  #unseen = $state.raw<Problem | null>(null); // why the map and the list are old
  refused = $state(false); // signed in, and no admin
  notice = $state.raw("");
  #length = LIST_LENGTH;
  #polls = 0;
  #busy = false;
  #stale = false; // look again as soon as this look is over
  #watching: AbortController | undefined;
  #noticeTimer: ReturnType<typeof setTimeout> | undefined;

  readonly last = $derived(this.samples.at(-1));
  readonly problem = $derived(this.#unheard ?? this.#unseen);

  begin(): void {
    session.begin(() => this.#restart());
    setInterval(() => void this.#poll(), POLL_SECONDS * 1000);
    document.addEventListener("visibilitychange", () => void this.#poll());
  }

  /** Do something to the cache and tell what came of it. What it changed is looked at from then on:
   * that may take as long as it likes. Raises Problem. */
  async act(what: () => Promise<string>): Promise<void> {
    this.tell(await what());
    this.#polls = 0;
    this.#stale = this.#busy; // what is being asked for now may be of before
    void this.#poll();
  }

  tell(notice: string): void {
    this.notice = notice;
    clearTimeout(this.#noticeTimer);
    this.#noticeTimer = setTimeout(() => (this.notice = ""), NOTICE_SECONDS * 1000);
  }

  async showMore(): Promise<void> {
    this.#length += LIST_LENGTH;
    try {
      await this.#list();
    } catch (error) {
      this.#unseen = this.#taken(asProblem(error));
    }
  }

  // -- inside

  #restart(): void {
    this.refused = false;
    this.#unheard = this.#unseen = null;
    this.#polls = 0;
    this.#watching?.abort();
    this.#watching = new AbortController();
    const { signal } = this.#watching;
    const watcher = {
      samples: (taken: Sample[]) => (this.samples = joined(this.samples, taken)),
      problem: (problem: Problem | null) => (this.#unheard = this.#taken(problem)),
    };
    void cache.watch(watcher, signal);
    void this.#poll();
  }

  async #poll(): Promise<void> {
    if (document.hidden || this.#busy || this.refused || session.owner === null) return;
    this.#busy = true;
    try {
      this.maps = await cache.pages();
      if (this.#polls++ % LIST_EVERY === 0) {
        this.prefixes = await cache.prefixes(PREFIXES_MOST);
        await this.#list();
      }
      this.#unseen = null;
    } catch (error) {
      this.#unseen = this.#taken(asProblem(error));
    } finally {
      this.#busy = false;
    }
    if (this.#stale) {
      this.#stale = false;
      this.#polls = 0;
      void this.#poll();
    }
  }

  async #list(): Promise<void> {
    const found: CachedConversation[] = [];
    let after: string | null = null;
    do {
      const page = await cache.conversations(after, Math.min(100, this.#length - found.length));
      found.push(...page.conversations);
      after = page.next;
    } while (after !== null && found.length < this.#length);
    this.conversations = found;
    this.more = after !== null;
    this.listed = true;
  }

  #taken(problem: Problem | null): Problem | null {
    if (problem?.status === 401) return null; // the sign-in is open
    if (problem?.status === 403) this.refused = true;
    return problem;
  }
}

export const admin = new Admin();
