// Who we are to the server, and what it is to us: its model, whether it wants a key, and whether
// it can be reached.
//
// Nothing that needs a key is asked before the server has said who is here, and nothing of one user
// is there for the next. A page whose user has gone, by a sign-out here or in another tab, by a key
// that counts no more, by somebody else's sign-in, shows nothing from that moment and loads itself
// anew: so whatever it had in memory is gone. What was typed and not sent waits for its writer where
// the sign-in has merely ended, and goes where he signed out, or where somebody else comes. The
// tabs of a browser tell each other:
//
//     look   ask who is here        out   the user has signed out

import * as api from "../transport/api";
import { asProblem, type Problem } from "../transport/problem";
import type { Model, Visitor } from "../transport/wire";
import { forgetKept, keepFor, keepNothing } from "./kept";

const RETRY_SECONDS = 2;
const SIGNED_IN = "chatserve.signed-in";
const CHANNEL = "chatserve.session";

class Session {
  owner = $state.raw<string | null>(null); // whose page this is, once that is known
  model = $state.raw<Model | null>(null);
  problem = $state.raw<Problem | null>(null); // why there is no model
  wantsKey = $state(false);
  isAdmin = $state(false);
  hasKey = $state(false); // this browser signed in, so it can sign out
  #onEnter: () => void = () => undefined;
  #signingOut = false;
  #gone = false; // the user is, and the page about to be loaded anew
  readonly #tabs = new BroadcastChannel(CHANNEL);

  get isDemonstration(): boolean {
    return this.model?.id === "chatserve-demonstration";
  }

  /** then: what is to be done once it is known whose page this is, and at a sign-in. */
  begin(then: () => void): void {
    this.#onEnter = then;
    try {
      this.hasKey = localStorage.getItem(SIGNED_IN) === "yes";
    } catch {
      this.hasKey = false;
    }
    api.onUnauthorized(() => void this.look().then(() => this.#gone && this.#tell("look")));
    this.#tabs.addEventListener("message", ({ data }) => {
      if (data !== "out") void this.look();
      else if (this.owner === null) forgetKept();
      else this.#leave(true);
    });
    // A page that the browser has put aside hears nothing.
    addEventListener("pageshow", ({ persisted }) => {
      if (persisted) void this.look();
    });
    void this.#begin();
  }

  async signIn(key: string): Promise<void> {
    const visitor = await api.signInWith(key);
    this.#note(true);
    this.#take(visitor);
    this.#tell("look");
  }

  /** Raises Problem. */
  async signOut(): Promise<void> {
    this.#signingOut = true;
    await api.signOut();
    this.signedOut();
  }

  /** The sign-in was ended: here, or wherever else it was used. */
  signedOut(): void {
    if (this.#gone) return;
    if (this.#signingOut) this.#tell("out");
    this.#note(false);
    this.#leave(true);
  }

  /** Ask who is here, as it may have changed. */
  async look(): Promise<void> {
    try {
      this.#take(await api.visitor());
    } catch {
      // Whoever is refused next asks again.
    }
  }

  async #begin(): Promise<void> {
    try {
      this.#take(await api.visitor());
    } catch (error) {
      this.#trouble(error, () => this.#begin());
    }
  }

  #take(visitor: Visitor | null): void {
    if (this.#gone) return;
    if (this.owner !== null && this.owner !== visitor?.name) {
      this.#leave(visitor !== null);
      return;
    }
    this.problem = null;
    this.wantsKey = visitor === null;
    this.isAdmin = visitor?.isAdmin ?? false;
    if (visitor === null || this.owner !== null) return;
    if (keepFor(visitor.name)) forgetAddress();
    this.owner = visitor.name;
    this.#onEnter();
    void this.#loadModel();
  }

  /** forget: what was typed and not sent, and which conversation was open. */
  #leave(forget: boolean): void {
    if (this.#gone) return;
    this.#gone = true;
    keepNothing();
    if (forget) {
      forgetKept();
      forgetAddress();
    }
    document.title = "chatserve";
    document.body.replaceChildren();
    location.reload();
  }

  async #loadModel(): Promise<void> {
    try {
      this.model = await api.model();
      this.problem = null;
    } catch (error) {
      this.#trouble(error, () => this.#loadModel());
    }
  }

  #trouble(error: unknown, again: () => Promise<void>): void {
    this.problem = asProblem(error);
    if (this.problem.passing) setTimeout(() => void again(), RETRY_SECONDS * 1000);
  }

  #tell(news: "look" | "out"): void {
    this.#tabs.postMessage(news);
  }

  #note(signedIn: boolean): void {
    this.hasKey = signedIn;
    try {
      if (signedIn) localStorage.setItem(SIGNED_IN, "yes");
      else localStorage.removeItem(SIGNED_IN);
    } catch {
      // Then the page does not offer to sign out after a reload.
    }
  }
}

/** Which conversation is open is its reader's alone. */
function forgetAddress(): void {
  history.replaceState(null, "", location.pathname);
}

export const session = new Session();
