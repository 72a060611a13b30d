// Library: the list of the user's conversations, latest first, as far as it was asked for.

import * as api from "../transport/api";
import { asProblem, type Problem } from "../transport/problem";
import type { Conversation } from "../transport/wire";

const PAGE = 40;
const SETTLE_MILLISECONDS = 150; // of typing, and of news that come in a crowd

class Library {
  conversations = $state.raw<Conversation[]>([]);
  next = $state.raw<string | null>(null);
  search = $state("");
  loaded = $state(false);
  problem = $state.raw<Problem | null>(null);
  #asked = 0;
  #newest: { search: string; answer: Promise<boolean> } | null = null; // question
  #answered: string | null = null; // the search whose answer the list is
  #timer: ReturnType<typeof setTimeout> | undefined;

  /** Ask for the first page, and for what of the list was shown behind it. Whether that is the list
   * now; not where another question came after it. */
  refresh(): Promise<boolean> {
    clearTimeout(this.#timer);
    const search = this.search.trim();
    const answer = this.#ask(search);
    this.#newest = { search, answer };
    return answer;
  }

  async #ask(search: string): Promise<boolean> {
    const asked = ++this.#asked;
    try {
      const limit = Math.min(100, Math.max(PAGE, this.conversations.length));
      const page = await api.list(search, null, limit);
      if (asked !== this.#asked) return false; // a later question is under way
      this.conversations = page.conversations;
      this.next = page.next;
      this.#answered = search;
      this.loaded = true;
      this.problem = null;
      return true;
    } catch (error) {
      if (asked === this.#asked) {
        this.problem = asProblem(error);
        this.#newest = null;
      }
      return false;
    }
  }

  refreshSoon(): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.refresh(), SETTLE_MILLISECONDS);
  }

  searchFor(text: string): void {
    this.search = text;
    this.refreshSoon();
  }

  /** The first that is found, when that is known; none where the search is another one by then. */
  async first(): Promise<Conversation | undefined> {
    const search = this.search.trim();
    const isAsked = (): boolean => this.search.trim() === search;
    // News ask anew meanwhile, and Enter may come twice: a question that is under way is waited for.
    while (this.#answered !== search && isAsked()) {
      await (this.#newest?.search === search ? this.#newest.answer : this.refresh());
      if (this.#newest === null) return undefined; // it has failed
    }
    return isAsked() ? this.conversations[0] : undefined;
  }

  /** Somebody has found what he looked for, or does something else. */
  endSearch(): void {
    if (this.search) this.searchFor("");
  }

  async more(): Promise<void> {
    const after = this.next;
    if (after === null) return;
    this.next = null; // one question at a time
    const asked = this.#asked;
    try {
      const page = await api.list(this.search.trim(), after, PAGE);
      if (asked !== this.#asked) return; // it follows a list that is not shown any more
      const known = new Set(this.conversations.map((each) => each.id));
      const fresh = page.conversations.filter((each) => !known.has(each.id));
      this.conversations = [...this.conversations, ...fresh];
      this.next = page.next;
    } catch (error) {
      if (asked !== this.#asked) return;
      this.next = after;
      this.problem = asProblem(error);
    }
  }

  async rename(id: string, title: string): Promise<void> {
    const renamed = await api.change(id, { title });
    this.conversations = this.conversations.map((each) => (each.id === id ? renamed : each));
  }

  async remove(id: string): Promise<void> {
    await api.remove(id);
    this.conversations = this.conversations.filter((each) => each.id !== id);
  }

  add(made: Conversation): void {
    this.endSearch();
    this.conversations = [made, ...this.conversations.filter((each) => each.id !== made.id)];
  }
}

export const library = new Library();
