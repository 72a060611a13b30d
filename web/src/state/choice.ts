// Choice: the branch that is shown, told to the server until it knows: over a lost network too,
// unless another branch is chosen or another turn sent meanwhile.

import { persist } from "../transport/persist";
import { asProblem, type Problem } from "../transport/problem";

export class Choice {
  #telling: AbortController | null = null;

  /** The server may not know it yet. */
  get pending(): boolean {
    return this.#telling !== null;
  }

  cancel(): void {
    this.#telling?.abort();
    this.#telling = null;
  }

  /** ask: may raise Problem. heard: what is in the way; null: nothing any more. */
  async tell(ask: () => Promise<void>, heard: (problem: Problem | null) => void): Promise<void> {
    this.cancel();
    const telling = new AbortController();
    this.#telling = telling;
    const problem = await persist(ask, heard, telling.signal).then(() => null, asProblem);
    if (telling.signal.aborted) return;
    heard(problem);
    if (this.#telling === telling) this.#telling = null;
  }
}
