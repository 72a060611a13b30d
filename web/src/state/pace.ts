// Pace: how fast a reply comes just now, from counts of its tokens. A number that changes with each
// word cannot be read, so it is told twice a second, of the last few seconds.

const TELL_MILLISECONDS = 500;
const SPAN_MILLISECONDS = 3_000;

export class Pace {
  #marks: { at: number; tokens: number }[] = [];
  #told: number | null = null;

  /** tokens: so far. at: a clock's milliseconds. Tokens a second; null until there is something to
   * tell them from. */
  heard(tokens: number, at: number): number | null {
    const last = this.#marks.at(-1);
    if (last && at - last.at < TELL_MILLISECONDS) return this.#told;
    this.#marks.push({ at, tokens });
    // The one before the span stays while it is the only one: a halt counts as slowness.
    while (this.#marks.length > 2 && (this.#marks[0]?.at ?? at) < at - SPAN_MILLISECONDS) this.#marks.shift();
    const first = this.#marks[0];
    if (first && at > first.at) this.#told = (1000 * (tokens - first.tokens)) / (at - first.at);
    return this.#told;
  }

  /** A new connection brings at once what was said meanwhile: no pace can be told from that. */
  forget(): void {
    this.#marks = [];
    this.#told = null;
  }
}
