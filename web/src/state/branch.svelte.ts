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

  /** What is said next follows it. After a message without an answer nothing can follow: there it
   * takes the place of that. */
  get end(): string | null {
    const last = this.path.at(-1);
    return last?.role === "user" ? last.parent : this.leaf;
  }

  turn(id: string | null): Turn | undefined {
    return id === null ? undefined : this.#turns.get(id);
  }

  /** The newest branch through a turn; its end. */
  show(turn: string): string {
    return (this.leaf = leafBelow(this.children, turn));
  }

  add(turn: Turn): void {
    this.#turns = new Map(this.#turns).set(turn.id, turn);
  }

  /** moved: its leaf is to be shown. fixed: a turn that stays in sight where it is. */
  take(tree: Tree, moved: boolean, fixed: string | null): void {
    this.#turns = new Map(tree.turns.map((turn) => [turn.id, turn]));
    const broken = tree.replies.filter((reply) => reply.state !== "running");
    this.broken = new Map(broken.map((reply) => [reply.turn, reply]));
    const { leaf } = tree.conversation;
    if (!this.turn(this.leaf) || (moved && this.may(leaf, fixed))) this.leaf = leaf;
  }

  /** Whether a branch with that end may be shown. */
  may(leaf: string | null, fixed: string | null): boolean {
    return fixed === null || pathTo(this.#turns, leaf).some(({ id }) => id === fixed);
  }
}
