// LiveReply: one answer as it comes. It may not know how it is drawn, but text arrives in the view
// some thirty times a second at the most, whatever the network does: nobody reads faster, and what
// is drawn between costs as much again.

import * as api from "../transport/api";
import { pause } from "../transport/backoff";
import { Following, type Errand, type Outcome, type Progress } from "../transport/follow";
import { persist } from "../transport/persist";
import { asProblem, Problem } from "../transport/problem";
import { socket } from "../transport/socket";
import type { Final } from "../transport/wire";
import { Pace } from "./pace";

const DRAW_MILLISECONDS = 30; // between two updates, at the least
const HIDDEN_MILLISECONDS = 250; // where no frames are drawn
const TAKEN_BACK_SECONDS_MAX = 4; // that who has stopped a turn waits for word of it

export type Phase = "sending" | "reading" | "speaking" | "over";

export class LiveReply {
  phase = $state<Phase>("sending");
  text = $state.raw("");
  progress = $state.raw<Progress | null>(null);
  tokensPerSecond = $state<number | null>(null); // of the last few seconds
  waiting = $state.raw<string | null>(null);
  problem = $state.raw<Problem | null>(null);
  final = $state.raw<Final | null>(null);
  id = $state.raw<string | null>(null); // the server's, once accepted
  turn = $state.raw<string | null>(null); // the user's turn that it answers
  stopping = $state(false);
  readonly began = performance.now();
  readonly #pace = new Pace();
  #said = "";
  #drawing = false;
  #drawn = 0; // when, by performance.now()
  readonly #leaving = new AbortController();
  #stop = new AbortController(); // of the asking for its end that is under way
  readonly #errand: Errand;
  #following: Following | null = null;

  /** text: what is known to have been said, until the stream tells. */
  constructor(errand: Errand, turn: string | null, text = "") {
    this.#errand = errand;
    this.turn = turn;
    this.id = errand.reply;
    if (text) this.#say(text);
    if (errand.reply !== null) this.phase = text ? "speaking" : "reading";
  }

  get conversation(): string {
    return this.#errand.conversation;
  }

  get over(): boolean {
    return this.phase === "over";
  }

  /** The body of the turn, while the server may not have it. */
  get unsent(): Record<string, unknown> | null {
    return this.id === null ? this.#errand.turn : null;
  }

  /** Follow it to its end. isAway: it is not shown. onAccepted: the server keeps the turn. */
  async run(isAway: () => boolean, onAccepted: (turn: string) => void): Promise<Outcome> {
    this.#following = new Following(
      this.#errand,
      {
        accepted: (turn, reply) => {
          const first = this.id === null;
          this.#pace.forget();
          this.tokensPerSecond = null;
          this.turn = turn;
          this.id = reply;
          if (this.phase === "sending") this.phase = "reading";
          if (first) onAccepted(turn);
          if (this.stopping) void this.#stopAtServer();
        },
        progress: (progress) => {
          this.progress = progress;
        },
        text: (text, whole, tokens) => {
          this.#say(whole ? text : this.#said + text);
          if (tokens !== null) this.tokensPerSecond = this.#pace.heard(tokens, performance.now());
        },
        waiting: (reason) => {
          this.waiting = reason;
          if (reason !== null && this.#isTakenBack) this.#leaving.abort();
        },
        isAside: () => this.#errand.turn === null || document.hidden || isAway(),
      },
      this.#leaving.signal,
    );
    const outcome = await this.#following.run();
    this.#leaving.abort(); // whoever waits for its end has it
    if (outcome.kind === "done") this.final = outcome.final;
    if (outcome.kind === "failed") {
      this.problem = outcome.problem;
      this.final = outcome.final;
    }
    if (outcome.kind === "left" && this.stopping) this.problem = new Problem("Not sent.");
    this.text = this.#said;
    this.waiting = null;
    this.phase = "over";
    return outcome;
  }

  /** End it with what it has said. What the server does not have yet is not sent any more. */
  async stop(): Promise<void> {
    if (this.over || this.stopping) return;
    this.stopping = true;
    if (this.id !== null) await this.#stopAtServer();
    else {
      await pause(this.waiting === null ? TAKEN_BACK_SECONDS_MAX : 0, this.#leaving.signal);
      if (this.#isTakenBack) this.#leaving.abort();
    }
  }

  /** Stopped before the server has it, as far as one knows. What is on its way may arrive yet. */
  get #isTakenBack(): boolean {
    return this.stopping && this.id === null;
  }

  /** Look away; the reply goes on at the server. */
  leave(): void {
    this.#leaving.abort();
  }

  /** It may be followed in another way, now that one can, or that nobody looks. */
  reconsider(): void {
    this.#following?.reconsider();
  }

  /** Ask for its end until that is heard of, or is here. */
  async #stopAtServer(): Promise<void> {
    const { id } = this;
    if (id === null) return;
    this.#stop.abort(); // a server that took the reply up since has not heard of it
    this.#stop = new AbortController();
    const signal = AbortSignal.any([this.#leaving.signal, this.#stop.signal]);
    try {
      await socket
        .stop(id, signal)
        .catch(() => persist(() => api.stop(id), () => undefined, signal));
    } catch (error) {
      // 404: it has ended meanwhile, and its last event says how.
      if (!signal.aborted && asProblem(error).status !== 404) this.stopping = false;
    }
  }

  #say(text: string): void {
    this.#said = text;
    if (this.#drawing) return;
    this.#drawing = true;
    const draw = (): void => {
      this.#drawing = false;
      this.#drawn = performance.now();
      this.text = this.#said;
      if (this.#said && !this.over) this.phase = "speaking";
    };
    if (document.hidden) setTimeout(draw, HIDDEN_MILLISECONDS);
    else {
      const wait = this.#drawn + DRAW_MILLISECONDS - performance.now();
      if (wait > 0) setTimeout(() => requestAnimationFrame(draw), wait);
      else requestAnimationFrame(draw);
    }
  }
}
