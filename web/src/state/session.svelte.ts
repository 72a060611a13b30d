// Who we are to the server, and what it is to us: its model, whether it wants a key, and whether
// it can be reached.

import * as api from "../transport/api";
import { asProblem, type Problem } from "../transport/problem";
import type { Model } from "../transport/wire";

const RETRY_SECONDS = 2;
const SIGNED_IN = "chatserve.signed-in";

class Session {
  model = $state.raw<Model | null>(null);
  problem = $state.raw<Problem | null>(null); // why there is no model
  wantsKey = $state(false);
  isAdmin = $state(false); // as far as is known
  hasKey = $state(false); // this browser signed in, so it can sign out
  #waiting: (() => void)[] = [];
  #onSignIn: () => void = () => undefined;

  get isDemonstration(): boolean {
    return this.model?.id === "chatserve-demonstration";
  }

  /** then: what is to be done at each sign-in. */
  async begin(then: () => void): Promise<void> {
    this.#onSignIn = then;
    try {
      this.hasKey = localStorage.getItem(SIGNED_IN) === "yes";
    } catch {
      this.hasKey = false;
    }
    api.onUnauthorized(() => {
      this.wantsKey = true;
    });
    await this.#loadModel();
  }

  async signIn(key: string): Promise<void> {
    await api.signInWith(key);
    this.wantsKey = false;
    this.#note(true);
    await this.#loadModel();
    this.#onSignIn();
    for (const go of this.#waiting.splice(0)) go();
  }

  async signOut(): Promise<void> {
    await api.signOut();
    this.#note(false);
    location.hash = "";
    location.reload();
  }

  /** Resolves at the next sign-in. */
  signedIn(): Promise<void> {
    this.wantsKey = true;
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  async #loadModel(): Promise<void> {
    try {
      this.model = await api.model();
      this.problem = null;
      void this.#askRole();
    } catch (error) {
      this.problem = asProblem(error);
      if (this.problem.passing) setTimeout(() => void this.#loadModel(), RETRY_SECONDS * 1000);
    }
  }

  async #askRole(): Promise<void> {
    try {
      this.isAdmin = await api.isAdmin();
    } catch {
      this.isAdmin = false; // then the page does not offer what is for admins
    }
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

export const session = new Session();
