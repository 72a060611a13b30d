// A reply followed to its end over however many connections: the page's side of "Events" in
// docs/conversations.md. It may not know what is shown.
//
// Theory of operation. Until `accepted` the turn is sent, again and again with the same id, which
// makes that safe; from then on its events are asked for from the last id on, by HTTP, or through
// the tab's socket where nobody waits for them at their source: six streams would be all that a
// browser opens to one server, whatever its tabs have to say. A cursor says how many
// code points are before it, so text that has a gap or comes twice is noticed: then the reply is
// asked for anew without an id, and comes whole. A connection that is silent for longer than the
// server ever is (it comments every 15 s) counts as lost.
//
//     WANTED ── POST turn | GET events | attach ──▶ OPEN ── final event ──▶ over
//        ▲                                           │
//        ├────────── backoff ◀── lost, 429, 503 ─────┤     another refusal ──▶ over
//        └────────────── moved to the socket ────────┘

import { request } from "./api";
import { Backoff, pause } from "./backoff";
import { asProblem, Problem } from "./problem";
import { socket } from "./socket";
import { events, type Told } from "./sse";
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
  /** Whether it is watched rather than waited for: another tab's, or out of sight. */
  isAside(): boolean;
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

const MOVED = "moved";
// What a socket's `accepted` says where all has been seen, and an answer without a body means.
const ENDED: Told = { event: "accepted", id: null, said: { ended: true } };

export class Following {
  #cursor: string | null = null;
  #length = 0; // code points that the viewer has
  #reply: string | null;
  #inDoubt = false;
  #trustsSocket = true; // false: what it could not say HTTP will
  #stream: AbortController | null = null; // of the connection that there is by HTTP
  readonly #backoff = new Backoff(0.2, 10);

  constructor(
    readonly errand: Errand,
    readonly viewer: Viewer,
    readonly signal: AbortSignal,
  ) {
    this.#reply = errand.reply;
  }

  async run(): Promise<Outcome> {
    for (;;) {
      if (this.signal.aborted) return { kind: "left" };
      const outcome = await this.#once();
      if (outcome !== null) return outcome;
    }
  }

  /** The socket is there, or the reply has gone out of sight: it may go on over there. */
  reconsider(): void {
    if (!socket.isOpen) return;
    this.#trustsSocket = true;
    if (this.#belongsToSocket) this.#stream?.abort(MOVED);
  }

  get #belongsToSocket(): boolean {
    return this.#trustsSocket && this.#reply !== null && this.viewer.isAside();
  }

  /** One connection. null: come back. */
  async #once(): Promise<Outcome | null> {
    if (this.#belongsToSocket) await socket.settled(this.signal);
    const reply = this.#belongsToSocket && socket.isOpen ? this.#reply : null;
    const stream = (this.#stream = reply === null ? new AbortController() : null);
    const told =
      stream === null
        ? socket.attach(reply ?? "", this.#cursor, this.signal)
        : this.#streamed(stream);
    try {
      for await (const event of told) {
        const outcome = this.#take(event);
        if (outcome !== null) return outcome;
      }
      throw new Problem("The connection was lost.");
    } catch (error) {
      if (stream?.signal.reason === MOVED) return null;
      this.#trustsSocket = stream !== null;
      return stream === null ? null : await this.#trouble(asProblem(error));
    } finally {
      this.#stream = null;
    }
  }

  async *#streamed(stream: AbortController): AsyncGenerator<Told, void, undefined> {
    const leave = (): void => stream.abort();
    this.signal.addEventListener("abort", leave);
    let timer = setTimeout(leave, SILENCE_SECONDS_MAX * 1000);
    const heard = (): void => {
      clearTimeout(timer);
      timer = setTimeout(leave, SILENCE_SECONDS_MAX * 1000);
    };
    try {
      const response = await this.#ask(stream.signal);
      if (response.status === 204 || response.body === null) yield ENDED;
      else {
        for await (const { event, id, data } of events(response.body, heard)) {
          yield { event, id, said: fields(JSON.parse(data)) };
        }
      }
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

  #take({ event, id, said }: Told): Outcome | null {
    this.#backoff.reset();
    switch (event) {
      case "accepted": {
        if (said.ended === true) return { kind: "ended" };
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
