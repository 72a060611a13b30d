// Persist: ask until there is an answer that stands, over a lost network and a server that is away
// or full. For what is safe to be asked again.

import { Backoff, pause } from "./backoff";
import { asProblem, type Problem } from "./problem";

/** heard: what is in the way for now. Raises Problem: an answer that will not change, or whatever
 * there was when the signal ended it. */
export async function persist<T>(
  ask: () => Promise<T>,
  heard: (problem: Problem) => void,
  signal: AbortSignal,
): Promise<T> {
  const backoff = new Backoff(1, 10);
  for (;;) {
    try {
      return await ask();
    } catch (error) {
      const problem = asProblem(error);
      if (signal.aborted || !problem.passing) throw problem;
      heard(problem);
      await pause(Math.max(backoff.next(), problem.retryAfter), signal);
      if (signal.aborted) throw problem;
    }
  }
}
