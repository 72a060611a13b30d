// Choice: the branch that is shown, told to the server until it knows: over a lost network too,
// unless another branch is chosen or another turn sent meanwhile.

import { Backoff, pause } from "../transport/backoff";
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
    const { signal } = telling;
    const backoff = new Backoff(1, 10);
    this.#telling = telling;
    while (!signal.aborted) {
      const problem = await ask().then(() => null, asProblem);
      if (signal.aborted) return;
      heard(problem);
      if (!problem?.passing) break;
      await pause(Math.max(backoff.next(), problem.retryAfter), signal);
    }
    if (this.#telling === telling) this.#telling = null;
  }
}
