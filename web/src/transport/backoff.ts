// Backoff with full jitter: before try n a random time up to first * 2**n seconds, bounded.

export class Backoff {
  #tries = 0;

  constructor(
    readonly first: number,
    readonly most: number,
  ) {}

  next(): number {
    const step = Math.min(this.most, this.first * 2 ** Math.min(this.#tries, 30));
    this.#tries += 1;
    return step * Math.random();
  }

  reset(): void {
    this.#tries = 0;
  }
}

/** Wait; a network that is back, or a signal, ends it early. */
export function pause(seconds: number, signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    const end = (): void => {
      clearTimeout(timer);
      window.removeEventListener("online", end);
      signal.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, seconds * 1000);
    window.addEventListener("online", end);
    signal.addEventListener("abort", end);
  });
}
