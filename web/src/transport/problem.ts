// Problem: why something did not work, in words for the user. status 0: nobody answered.

import { fields } from "./wire";

export class Problem extends Error {
  constructor(
    message: string,
    readonly status = 0,
    readonly code = "",
    readonly retryAfter = 0, // seconds
  ) {
    super(message);
  }

  /** The same may work a little later: the server is away, full, or between two processes. */
  get passing(): boolean {
    return [0, 429, 502, 503, 504].includes(this.status);
  }
}

export const GONE = "This conversation was deleted.";
export const UNREACHABLE = "The server cannot be reached.";

export async function problemOf(response: Response): Promise<Problem> {
  const body: unknown = await response.json().catch(() => null);
  const error = fields(fields(body).error);
  const message =
    typeof error.message === "string" ? error.message : `The server answered ${response.status}.`;
  const seconds = Number(response.headers.get("retry-after") ?? 0);
  const code = typeof error.code === "string" ? error.code : "";
  return new Problem(message, response.status, code, Number.isFinite(seconds) ? seconds : 0);
}

export function asProblem(error: unknown): Problem {
  return error instanceof Problem ? error : new Problem(UNREACHABLE);
}
