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

  /** what: as it is to be now. heard: what is in the way; null: nothing any more. Raises
   * Problem. */
  async run(
    what: () => api.Begun,
    heard: (problem: Problem | null) => void,
  ): Promise<Conversation> {
    const { signal } = (this.#asking = new AbortController());
    this.isUnderWay = true;
    let told = what();
    let made: Conversation | null = null;
    // Asked for in other words it would be another one: what is changed meanwhile is told after it.
    const ask = async (): Promise<Conversation> => {
      made ??= await api.create(this.#name, told, signal);
      for (let now = what(); differ(now, told); now = what()) {
        made = await api.change(made.id, { system: now.system, settings: now.settings }, signal);
        told = now;
      }
      return made;
    };
    try {
      return await persist(
        ask,
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

const differ = (one: api.Begun, other: api.Begun): boolean =>
  one.system !== other.system || one.settings !== other.settings;
