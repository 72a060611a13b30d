// The one WebSocket of a tab: hints to the server (`focus`, `draft`) and word of what changed.
//
// Nothing depends on it. Replies come over SSE, lists can be asked for; where a proxy blocks sockets
// the page works without, and this tries again with growing waits. Of `focus` and `draft` only the
// newest counts, so nothing is queued: after a reconnection the focus is told again, a draft is not.

import { Backoff } from "./backoff";
import { fields } from "./wire";

const SUBPROTOCOL = "chatserve.v1";
const SIGNED_OUT = 4401;
const DRAFT_SECONDS_MIN = 0.25;
const DRAFT_LENGTH_MAX = 256 * 1024;
const PING_SECONDS = 20;

/** Where something is typed. conversation null: a new one, which will have `system`. parent: as in a
 * turn; undefined: at the leaf. */
export interface Place {
  conversation: string | null;
  parent?: string | null;
  system?: string | null;
}

export interface SocketOwner {
  opened(): void;
  closed(): void;
  changed(conversation: string | null, revision: number | null): void;
  refused(): void; // it was not let in, as far as one can tell
  signedOut(): void;
}

export class Socket {
  #socket: WebSocket | null = null;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #pinger: ReturnType<typeof setInterval> | undefined;
  #heard = true;
  #wasOpen = false;
  #focus: Place | null = null;
  #draft: { place: Place; text: string } | null = null;
  #drafting: ReturnType<typeof setTimeout> | undefined;
  #requests = 0;
  readonly #backoff = new Backoff(1, 60);

  constructor(readonly owner: SocketOwner) {}

  get isOpen(): boolean {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  /** Connect, now. */
  open(): void {
    clearTimeout(this.#timer);
    if (this.#socket !== null) return;
    const url = new URL("/api/socket", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url, SUBPROTOCOL);
    this.#socket = socket;
    socket.addEventListener("open", () => this.#opened());
    socket.addEventListener("message", (event) => this.#take(event.data));
    socket.addEventListener("close", (event) => this.#closed(event.code));
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

  #opened(): void {
    this.#backoff.reset();
    this.#wasOpen = true;
    this.#heard = true;
    this.#pinger = setInterval(() => this.#ping(), PING_SECONDS * 1000);
    this.#tellFocus();
    this.owner.opened();
  }

  #closed(code: number): void {
    clearInterval(this.#pinger);
    const wasOpen = this.#wasOpen;
    this.#wasOpen = false;
    this.#socket = null;
    this.owner.closed();
    if (code === SIGNED_OUT) {
      this.owner.signedOut();
      return;
    }
    if (!wasOpen) this.owner.refused();
    this.#timer = setTimeout(() => this.open(), (0.5 + this.#backoff.next()) * 1000);
  }

  #take(data: unknown): void {
    this.#heard = true;
    const frame = fields(JSON.parse(String(data)));
    if (frame.event !== "changed") return;
    const { conversation, revision } = frame;
    this.owner.changed(
      typeof conversation === "string" ? conversation : null,
      typeof revision === "number" ? revision : null,
    );
  }

  #ping(): void {
    // A line that is dead without a word would stay open for many minutes.
    if (!this.#heard) this.#socket?.close();
    this.#heard = false;
    this.#send({ type: "ping" });
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

  #send(frame: Record<string, unknown>): void {
    if (!this.isOpen) return;
    this.#requests += 1;
    this.#socket?.send(JSON.stringify({ ...frame, request: String(this.#requests) }));
  }
}

function placed(place: Place, typed: boolean): Record<string, unknown> {
  if (place.conversation === null) return place.system ? { system: place.system } : {};
  const parent = typed && place.parent !== undefined ? { parent: place.parent } : {};
  return { conversation: place.conversation, ...parent };
}
