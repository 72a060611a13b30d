// The one WebSocket of a tab: hints to the server (`focus`, `draft`), word of what changed, replies
// that are only watched here (`attach`), and `stop`. It takes up none of the few connections that a
// browser has to a server for all its tabs.
//
// Nothing depends on it. Replies come over SSE too, lists can be asked for; where a proxy blocks
// sockets the page works without, and this tries again with growing waits. Of `focus` and `draft`
// only the newest counts, so nothing is queued: after a reconnection the focus is told again, a
// draft is not. What an `attach` or a `stop` cannot have here, or loses, is to be asked for by HTTP,
// which says why.
//
// A socket may be open and pass nothing: a proxy that buffers, a line that has died without a word.
// So it counts from the first frame that came through it, which answers the ping that it begins with;
// and while somebody waits for something here, two seconds of silence are asked about with another,
// and two more without a word are its end.

import { Backoff, pause } from "./backoff";
import { Problem } from "./problem";
import type { Told } from "./sse";
import { fields } from "./wire";

const SUBPROTOCOL = "chatserve.v1";
const SIGNED_OUT = 4401;
const LOST = "The connection was lost.";
const DRAFT_SECONDS_MIN = 0.25;
const DRAFT_LENGTH_MAX = 256 * 1024;
const IDLE_SECONDS_MAX = 20; // of silence, until it is asked about
const WATCHED_SECONDS_MAX = 2; // the same, while somebody waits for an answer or watches a reply
const ANSWER_SECONDS_MAX = 2;
const CONNECT_SECONDS_MAX = 2; // that who would rather use the socket waits for it
const STEADY_SECONDS = 20; // so long a connection has to last until the next one is made at once

/** Where something is typed. conversation null: a new one, which will have `system`. parent: as in a
 * turn; undefined: at the leaf. */
export interface Place {
  conversation: string | null;
  parent?: string | null;
  system?: string | null;
}

export interface SocketOwner {
  opened(): void; // and something has come through
  closed(): void;
  changed(conversation: string | null, revision: number | null): void;
  refused(): void; // it was not let in, as far as one can tell
  signedOut(): void;
}

type Fields = Record<string, unknown>;
/** null: the connection was lost. */
type Hear = (frame: Fields | null) => void;

const NOBODY: SocketOwner = {
  opened: () => undefined,
  closed: () => undefined,
  changed: () => undefined,
  refused: () => undefined,
  signedOut: () => undefined,
};

export class Socket {
  owner = NOBODY;
  #socket: WebSocket | null = null;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #watch: ReturnType<typeof setInterval> | undefined;
  #patience: ReturnType<typeof setTimeout> | undefined; // until a ping counts as unanswered
  #begun = 0; // when it was last connected, by performance.now()
  #heard = 0; // and when it has last been heard
  #wasOpen = false;
  #passes = false; // something has come through this connection
  #focus: Place | null = null;
  #draft: { place: Place; text: string } | null = null;
  #drafting: ReturnType<typeof setTimeout> | undefined;
  #requests = 0;
  readonly #backoff = new Backoff(1, 60);
  readonly #asked = new Map<string, Hear>(); // by request, until its asker is done
  readonly #viewings = new Map<string, string>(); // requests by the reply that they look at

  get isOpen(): boolean {
    return this.#passes && this.#socket?.readyState === WebSocket.OPEN;
  }

  /** Connect, now. */
  open(): void {
    clearTimeout(this.#timer);
    if (this.#socket !== null) return;
    const url = new URL("/api/socket", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url, SUBPROTOCOL);
    this.#socket = socket;
    this.#begun = performance.now();
    socket.addEventListener("open", () => this.#opened());
    // One that was given up may say something yet, and is long in closing.
    socket.addEventListener("message", (event) => {
      if (socket === this.#socket) this.#take(event.data);
    });
    socket.addEventListener("close", (event) => {
      if (socket === this.#socket) this.#closed(event.code);
    });
  }

  focus(place: Place): void {
    this.#focus = place;
    this.#tellFocus();
  }

  /** What stands in the composer. It goes out a moment later, the newest alone. */
  draft(place: Place, text: string): void {
    if (text.length > DRAFT_LENGTH_MAX) return;
    this.#draft = { place, text };
    this.#drafting ??= setTimeout(() => this.#tellDraft(), DRAFT_SECONDS_MIN * 1000);
  }

  /** What is typed stays here from now on. */
  dropDraft(): void {
    this.#draft = null;
  }

  /** Wait for a connection that is being made, for a while from its beginning. */
  async settled(signal: AbortSignal): Promise<void> {
    const socket = this.#socket;
    const seconds = CONNECT_SECONDS_MAX - (performance.now() - this.#begun) / 1000;
    if (socket === null || this.#passes || seconds <= 0) return;
    const over = new AbortController();
    const end = (): void => over.abort();
    for (const kind of ["message", "close"]) socket.addEventListener(kind, end, { once: true });
    await pause(seconds, AbortSignal.any([signal, over.signal]));
  }

  /** A reply's events from a cursor on. Raises Problem. */
  async *attach(
    reply: string,
    after: string | null,
    signal: AbortSignal,
  ): AsyncGenerator<Told, void, undefined> {
    const frames: (Fields | null)[] = [];
    let answered = false; // what comes before is of an older look
    let wake = (): void => undefined;
    const leave = (): void => wake();
    const request = this.#ask({ type: "attach", reply, ...(after && { after }) }, (frame) => {
      answered ||= frame === null || "request" in frame;
      if (answered) frames.push(frame);
      wake();
    });
    this.#viewings.set(reply, request);
    signal.addEventListener("abort", leave);
    try {
      while (!signal.aborted) {
        const frame = frames.shift();
        if (frame === undefined) await new Promise<void>((resolve) => (wake = resolve));
        else yield toldBy(frame);
      }
    } finally {
      signal.removeEventListener("abort", leave);
      this.#asked.delete(request);
      // A newer look at it has taken its place.
      if (this.#viewings.get(reply) === request) {
        this.#viewings.delete(reply);
        this.#send({ type: "detach", reply });
      }
    }
  }

  /** Ask for a reply's end, which the signal tells. Raises Problem: it may not be heard. */
  async stop(reply: string, signal: AbortSignal): Promise<void> {
    let request = "";
    try {
      await new Promise<void>((resolve, reject) => {
        signal.addEventListener("abort", () => resolve(), { once: true });
        request = this.#ask({ type: "stop", reply }, () => reject(new Problem(LOST)));
      });
    } finally {
      this.#asked.delete(request);
    }
  }

  #opened(): void {
    this.#wasOpen = true;
    this.#heard = performance.now();
    this.#watch = setInterval(() => this.#look(), WATCHED_SECONDS_MAX * 1000);
    this.#tellFocus();
    this.#send({ type: "ping" });
  }

  #closed(code: number): void {
    clearInterval(this.#watch);
    clearTimeout(this.#patience);
    this.#patience = undefined;
    const wasOpen = this.#wasOpen;
    this.#wasOpen = this.#passes = false;
    this.#socket = null;
    if (performance.now() - this.#begun > STEADY_SECONDS * 1000) this.#backoff.reset();
    this.#viewings.clear();
    for (const hear of [...this.#asked.values()]) hear(null);
    this.owner.closed();
    if (code === SIGNED_OUT) {
      this.owner.signedOut();
      return;
    }
    if (!wasOpen) this.owner.refused();
    this.#timer = setTimeout(() => this.open(), (0.5 + this.#backoff.next()) * 1000);
  }

  #take(data: unknown): void {
    this.#heard = performance.now();
    clearTimeout(this.#patience);
    this.#patience = undefined;
    if (!this.#passes) {
      this.#passes = true;
      this.owner.opened();
    }
    const frame = fields(JSON.parse(String(data)));
    if (frame.event !== "changed") {
      // Of a reply's events only `accepted`, or that there are none, says what it answers.
      const request = frame.request ?? this.#viewings.get(String(frame.reply));
      this.#asked.get(String(request))?.(frame);
      return;
    }
    const { conversation, revision } = frame;
    this.owner.changed(
      typeof conversation === "string" ? conversation : null,
      typeof revision === "number" ? revision : null,
    );
  }

  #look(): void {
    const silence = (performance.now() - this.#heard) / 1000;
    const most = this.#asked.size > 0 ? WATCHED_SECONDS_MAX : IDLE_SECONDS_MAX;
    if (silence >= most) this.#probe();
  }

  /** Ask for a sign of life: a line that is dead would stay open for many minutes. */
  #probe(): void {
    this.#send({ type: "ping" });
    this.#patience ??= setTimeout(() => {
      this.#socket?.close();
      this.#closed(0);
    }, ANSWER_SECONDS_MAX * 1000);
  }

  #tellFocus(): void {
    if (this.#focus !== null) this.#send({ type: "focus", ...placed(this.#focus, false) });
  }

  #tellDraft(): void {
    this.#drafting = undefined;
    const draft = this.#draft;
    this.#draft = null;
    if (draft !== null) this.#send({ type: "draft", ...placed(draft.place, true), text: draft.text });
  }

  #ask(frame: Fields, hear: Hear): string {
    if (!this.isOpen) throw new Problem(LOST);
    const request = this.#send(frame);
    this.#asked.set(request, hear);
    this.#probe();
    return request;
  }

  #send(frame: Fields): string {
    this.#requests += 1;
    const request = String(this.#requests);
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify({ ...frame, request }));
    return request;
  }
}

export const socket = new Socket();

function toldBy(frame: Fields | null): Told {
  if (frame === null) throw new Problem(LOST);
  const id = typeof frame.id === "string" ? frame.id : null;
  // Only a final event has a place in the reply.
  if (frame.event === "failed" && id === null) throw new Problem(String(frame.message));
  return { event: String(frame.event), id, said: frame };
}

function placed(place: Place, typed: boolean): Record<string, unknown> {
  if (place.conversation === null) return place.system ? { system: place.system } : {};
  const parent = typed && place.parent !== undefined ? { parent: place.parent } : {};
  return { conversation: place.conversation, ...parent };
}
