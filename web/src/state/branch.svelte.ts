// Branch: the tree of turns as far as it is known, and the branch of it that is shown.

import type { OpenReply, Tree, Turn } from "../transport/wire";
import { childrenOf, leafBelow, pathTo } from "./tree";

export class Branch {
  leaf = $state.raw<string | null>(null); // the turn that is shown last
  broken = $state.raw<ReadonlyMap<string, OpenReply>>(new Map()); // by the turn they should answer
  #turns = $state.raw<ReadonlyMap<string, Turn>>(new Map());
  readonly children = $derived(childrenOf(this.#turns));
  readonly path = $derived(pathTo(this.#turns, this.leaf));

  get isEmpty(): boolean {
    return this.#turns.size === 0;
  }

  turn(id: string | null): Turn | undefined {
    return id === null ? undefined : this.#turns.get(id);
  }

  /** The newest branch through a turn. */
  show(turn: string): void {
    this.leaf = leafBelow(this.children, turn);
  }

  add(turn: Turn): void {
    this.#turns = new Map(this.#turns).set(turn.id, turn);
  }

  take(tree: Tree): void {
    this.#turns = new Map(tree.turns.map((turn) => [turn.id, turn]));
    const broken = tree.replies.filter((reply) => reply.state !== "running");
    this.broken = new Map(broken.map((reply) => [reply.turn, reply]));
  }

  /** Whether a branch with that end holds this turn. */
  leads(leaf: string | null, through: string): boolean {
    return pathTo(this.#turns, leaf).some(({ id }) => id === through);
  }
}
