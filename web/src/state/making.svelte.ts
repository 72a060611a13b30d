// Making: a new conversation, asked for until the server has made it. It has the client's name, so
// that the same conversation that is asked for again is the same one there.

import * as api from "../transport/api";
import { persist } from "../transport/persist";
import { Problem } from "../transport/problem";
import type { Conversation } from "../transport/wire";
import { newName } from "./tree";

export class Making {
  isUnderWay = $state(false);
  readonly #name = newName();
  #asking = new AbortController();

  /** heard: what is in the way; null: nothing any more. Raises Problem. */
  async run(what: api.Begun, heard: (problem: Problem | null) => void): Promise<Conversation> {
    const { signal } = (this.#asking = new AbortController());
    this.isUnderWay = true;
    try {
      return await persist(
        () => api.create(this.#name, what, signal),
        ({ message, status }) => heard(new Problem(`${message} Trying again…`, status)),
        signal,
      );
    } catch (error) {
      throw signal.aborted ? new Problem("Not sent.") : error;
    } finally {
      this.isUnderWay = false;
      heard(null);
    }
  }

  stop(): void {
    this.#asking.abort();
  }
}
