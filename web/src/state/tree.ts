// The tree of a conversation's turns, the paths through it, and what is asked to make it grow.
// Plain functions of plain values.

import type { Final, Turn } from "../transport/wire";

export type Turns = ReadonlyMap<string, Turn>;

/** From the first message to this turn. */
export function pathTo(turns: Turns, leaf: string | null): Turn[] {
  const path: Turn[] = [];
  let turn = leaf === null ? undefined : turns.get(leaf);
  while (turn !== undefined && path.length < turns.size) {
    path.push(turn);
    turn = turn.parent === null ? undefined : turns.get(turn.parent);
  }
  return path.reverse();
}

/** The ids of a turn's children, oldest first; of the first messages under "". */
export function childrenOf(turns: Turns): Map<string, string[]> {
  const children = new Map<string, string[]>();
  for (const turn of turns.values()) {
    const name = turn.parent ?? "";
    const known = children.get(name);
    if (known) known.push(turn.id);
    else children.set(name, [turn.id]);
  }
  return children;
}

/** The end of the newest branch through this turn. */
export function leafBelow(children: ReadonlyMap<string, string[]>, turn: string): string {
  let leaf = turn;
  for (let next = children.get(leaf)?.at(-1); next !== undefined; next = children.get(leaf)?.at(-1)) {
    leaf = next;
  }
  return leaf;
}

/** A name for what the server does not know yet. */
export const newName = (): string =>
  crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint32Array(4))).join("-");

/** The body of a request for a turn. isFirst: where a conversation begins there is no turn to name,
 * and null would mean a branch. */
export function asking(
  what: { content?: string; parent?: string | null },
  isFirst = false,
): Record<string, unknown> {
  const { parent, ...rest } = what;
  return isFirst ? { id: newName(), ...rest } : { id: newName(), parent, ...rest };
}

/** The turn that this body of a request asks for; null: it says nothing of its own. */
export function said(body: Record<string, unknown>, parent: string | null): Turn | null {
  const { id, content } = body;
  if (typeof content !== "string") return null;
  return { id: String(id), parent, role: "user", content, created: 0, final: null };
}

/** A reply that is over, as the turn that the server made of it. */
export const answered = (id: string, parent: string, content: string, final: Final): Turn => ({
  id,
  parent,
  role: "assistant",
  content,
  created: Date.now() / 1000,
  final,
});
