// The tree of a conversation's turns, and the paths through it. Plain functions of plain values.

import type { Turn } from "../transport/wire";

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

/** The turn that this body of a request asks for; null: it says nothing of its own. */
export function said(body: Record<string, unknown>, parent: string | null): Turn | null {
  const { id, content } = body;
  if (typeof content !== "string") return null;
  return { id: String(id), parent, role: "user", content, created: 0, final: null };
}
