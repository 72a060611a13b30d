// Loading: a conversation as a whole, asked for until there is an answer that counts.
//
// Loads take turns: one at a time, and one more for all who ask meanwhile, so no answer overtakes a
// later one. And while an answer is on its way the page hears more: that a turn of its own is kept,
// that a reply has ended, that a change was made. What was asked for before may lack that, however
// late it comes, and so may a failure be out of date: then it is asked for again. So nothing that
// is known to be kept is taken out by an older answer.

import * as api from "../transport/api";
import { asProblem, type Problem } from "../transport/problem";
import type { Tree } from "../transport/wire";

export class Loading {
  isUnderWay = $state(false);
  #known = 0; // how often something was heard that an answer under way may lack
  #seen = 0; // the newest revision that we were told of
  #asking = new AbortController();
  #now: Promise<void> | null = null;
  #next: Promise<void> | null = null; // for who asked while the other was under way

  constructor(readonly heard: (told: Tree | Problem) => void) {}

  /** Load what is there now, or later. */
  run(conversation: string | null): Promise<void> {
    if (conversation === null) return Promise.resolve();
    if (this.#next !== null) return this.#next;
    if (this.#now === null) {
      return (this.#now = this.#load(conversation).finally(() => (this.#now = null)));
    }
    const next = (): Promise<void> => {
      this.#next = null;
      return this.run(conversation);
    };
    return (this.#next = this.#now.then(next, next));
  }

  /** Load it where a newer revision is known of. has: the one that is here; null: that is no time to
   * load it. */
  async catchUp(conversation: string | null, has: () => number | null): Promise<void> {
    // What is under way may bring it.
    for (let other = this.#next ?? this.#now; other !== null; other = this.#next ?? this.#now) await other;
    if (this.#seen > (has() ?? Infinity)) await this.run(conversation);
  }

  /** Word of a revision. */
  saw(revision: number): void {
    this.#seen = Math.max(this.#seen, revision);
  }

  /** What is asked for already may lack something. */
  outdate(): void {
    this.#known += 1;
  }

  /** Word that there is nothing to be loaded any more: what is under way tells nothing. */
  drop(): void {
    this.#asking.abort();
  }

  async #load(conversation: string): Promise<void> {
    const { signal } = (this.#asking = new AbortController());
    this.isUnderWay = true;
    let told: Tree | Problem;
    let known: number;
    do {
      known = this.#known;
      told = await api.open(conversation, signal).catch(asProblem);
    } while (known !== this.#known && !signal.aborted);
    this.isUnderWay = false;
    if (!signal.aborted) this.heard(told);
  }
}
