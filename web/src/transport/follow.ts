// A reply followed to its end over however many connections: the page's side of "Events" in
// docs/conversations.md. It may not know what is shown.
//
// Theory of operation. Until `accepted` the turn is sent, again and again with the same id, which
// makes that safe; from then on its events are asked for from the last id on. A cursor says how many
// code points are before it, so text that has a gap or comes twice is noticed: then the reply is
// asked for anew without an id, and comes whole. A connection that is silent for longer than the
// server ever is (it comments every 15 s) counts as lost.
//
//     WANTED ── POST turn | GET events ──▶ OPEN ── final event ──▶ over
//        ▲                                  │
//        └──── backoff ◀── lost, 429, 503 ──┘        another refusal ──▶ over

import { request } from "./api";
import { Backoff, pause } from "./backoff";
import { asProblem, Problem } from "./problem";
import { events, type ServerEvent } from "./sse";
import { fields, finalOf, type Final } from "./wire";

const SILENCE_SECONDS_MAX = 40;
const RETRY_AFTER_SECONDS_MAX = 60;
const CURSOR = /^([1-9][0-9]*)-([0-9]+)$/;

export interface Progress {
  queued: number;
  promptTokens: number;
  computed: number;
}

export interface Viewer {
  accepted(turn: string, reply: string): void;
  progress(progress: Progress): void;
  /** whole: in the place of all that was said. tokens: of the reply so far, where it is told. */
  text(text: string, whole: boolean, tokens: number | null): void;
  waiting(reason: string | null): void; // null: that is over
}

export type Outcome =
  | { kind: "done"; final: Final }
  | { kind: "failed"; problem: Problem; final: Final | null }
  | { kind: "ended" } // before we came back, or it is not there: the conversation tells
  | { kind: "left" };

/** turn: the body of a POST, for a turn that the server may not have yet. reply: its id, else. */
export interface Errand {
  conversation: string;
  turn: Record<string, unknown> | null;
  reply: string | null;
}

export async function follow(
  errand: Errand,
  viewer: Viewer,
  signal: AbortSignal,
): Promise<Outcome> {
  const following = new Following(errand, viewer, signal);
  for (;;) {
    if (signal.aborted) return { kind: "left" };
    const outcome = await following.once();
    if (outcome !== null) return outcome;
  }
}

class Following {
  #cursor: string | null = null;
  #length = 0; // code points that the viewer has
  #reply: string | null;
  #inDoubt = false;
  readonly #backoff = new Backoff(0.2, 10);

  constructor(
    readonly errand: Errand,
    readonly viewer: Viewer,
    readonly signal: AbortSignal,
  ) {
    this.#reply = errand.reply;
  }

  /** One connection. null: come back. */
  async once(): Promise<Outcome | null> {
    const quiet = new AbortController();
    const leave = (): void => quiet.abort();
    this.signal.addEventListener("abort", leave);
    let timer = setTimeout(leave, SILENCE_SECONDS_MAX * 1000);
    const heard = (): void => {
      clearTimeout(timer);
      timer = setTimeout(leave, SILENCE_SECONDS_MAX * 1000);
    };
    try {
      const response = await this.#ask(quiet.signal);
      if (response.status === 204 || response.body === null) return { kind: "ended" };
      for await (const event of events(response.body, heard)) {
        const outcome = this.#take(event);
        if (outcome !== null) return outcome;
      }
      throw new Problem("The connection was lost.");
    } catch (error) {
      return await this.#trouble(asProblem(error));
    } finally {
      clearTimeout(timer);
      this.signal.removeEventListener("abort", leave);
    }
  }

  #ask(signal: AbortSignal): Promise<Response> {
    if (this.#reply === null) {
      const path = `/api/conversations/${encodeURIComponent(this.errand.conversation)}/turns`;
      return request("POST", path, this.errand.turn, { signal });
    }
    const headers: Record<string, string> =
      this.#cursor === null ? {} : { "Last-Event-ID": this.#cursor };
    const path = `/api/replies/${encodeURIComponent(this.#reply)}/events`;
    return request("GET", path, undefined, { signal, headers });
  }

  #take({ event, id, data }: ServerEvent): Outcome | null {
    const said = fields(JSON.parse(data));
    this.#backoff.reset();
    switch (event) {
      case "accepted": {
        this.#reply = String(said.reply);
        this.viewer.accepted(String(said.turn), this.#reply);
        this.viewer.waiting(null);
        // Without an id the reply comes from its beginning.
        if (this.#cursor === null) this.#forget();
        return null;
      }
      case "progress":
        this.viewer.progress({
          queued: Number(said.queued),
          promptTokens: Number(said.prompt_tokens),
          computed: Number(said.computed),
        });
        return null;
      case "delta":
      case "snapshot": {
        const text = String(said.text);
        const whole = event === "snapshot";
        const end = (whole ? 0 : this.#length) + codePoints(text);
        if (id === null || end !== seqOf(id)) throw this.#gap();
        this.#cursor = id;
        this.#length = end;
        this.viewer.text(text, whole, typeof said.tokens === "number" ? said.tokens : null);
        return null;
      }
      case "done":
      case "failed": {
        // The end is one further than the last text.
        if (id === null || seqOf(id) !== this.#length + 1) throw this.#gap();
        const final = said.usage === undefined ? null : finalOf(said);
        if (event === "done") return { kind: "done", final: final ?? finalOf({}) };
        const problem = new Problem(String(said.message), 500, String(said.code));
        return { kind: "failed", problem, final };
      }
      default:
        return null; // a newer server's
    }
  }

  #gap(): Problem {
    this.#cursor = null;
    return new Problem("A part of the reply was missing.");
  }

  #forget(): void {
    if (this.#length > 0) this.viewer.text("", true, null);
    this.#length = 0;
  }

  async #trouble(problem: Problem): Promise<Outcome | null> {
    if (this.signal.aborted) return { kind: "left" };
    if (problem.status === 404 && this.#reply !== null) return { kind: "ended" };
    // A full server has kept nothing of a turn that it never had.
    const refused = problem.status === 429 && this.#reply === null && !this.#inDoubt;
    // Without a sign-in the page is about to ask for one: until then it is neither sent nor lost.
    const passing = problem.passing || problem.status === 401;
    if (refused || !passing) return { kind: "failed", problem, final: null };
    this.#inDoubt = true;
    this.viewer.waiting(problem.message);
    const asked = Math.min(problem.retryAfter, RETRY_AFTER_SECONDS_MAX);
    await pause(Math.max(this.#backoff.next(), asked), this.signal);
    return null;
  }
}

function seqOf(id: string): number {
  const found = CURSOR.exec(id);
  return found ? Number(found[2]) : -1;
}

function codePoints(text: string): number {
  let pairs = 0;
  for (let place = 0; place < text.length; place += 1) {
    const unit = text.charCodeAt(place);
    if (unit >= 0xd800 && unit < 0xdc00) pairs += 1;
  }
  return text.length - pairs;
}
