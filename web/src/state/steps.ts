// The messages of a branch as they are shown, one step each: turns of the tree, then what is not a
// turn yet (said and not acknowledged, a reply that runs) or never became one (a reply that
// failed, a message that was not sent).

import type { Final, OpenReply, Turn } from "../transport/wire";
import type { Refused } from "./kept";
import type { LiveReply } from "./reply.svelte";

/** One message as it is shown. siblings: the ids at its place; place: its own there. */
export interface Step {
  key: string;
  role: "user" | "assistant";
  id: string | null;
  parent: string | null;
  text: string;
  final: Final | null;
  live: LiveReply | null;
  problem: string | null;
  unsent: Refused | null; // the server does not have it
  siblings: readonly string[];
  place: number;
}

/** What the server has. */
export interface Known {
  path: readonly Turn[];
  children: Children;
  broken: ReadonlyMap<string, OpenReply>; // by the turn that they should answer
}

export interface Beside {
  said: Turn | null;
  live: LiveReply | null;
  unsent: readonly Refused[];
}

type Children = ReadonlyMap<string, readonly string[]>;

export function stepsOf({ path, children, broken }: Known, { said, live, unsent }: Beside): Step[] {
  const steps = path.map((turn) => stepOf(turn, children));
  const last = path.at(-1);
  // News of it may come before its own acknowledgement.
  if (said !== null && !path.some(({ id }) => id === said.id)) {
    const siblings = [...(children.get(said.parent ?? "") ?? []), said.id];
    steps.push({ ...stepOf(said, children), siblings, place: siblings.length - 1 });
  }
  if (live !== null && (live.turn === null || live.turn === last?.id)) {
    const siblings = live.turn === null ? [] : (children.get(live.turn) ?? []);
    steps.push({
      // Its text is read where it is drawn, so that a word more does not draw all steps anew.
      ...blank(live.id ?? "sending", live.turn),
      live,
      siblings: [...siblings, "live"],
      place: siblings.length,
    });
  } else if (last?.role === "user" && said === null) {
    const failed = broken.get(last.id);
    const siblings = children.get(last.id) ?? [];
    steps.push({
      ...blank(failed?.id ?? `${last.id}.missing`, last.id),
      text: failed?.content ?? "",
      problem: failed?.message ?? "This message has no answer.",
      siblings: [...siblings, "missing"],
      place: siblings.length,
    });
  }
  for (const each of unsent) {
    const text = String(each.body.content);
    steps.push({ ...blank(String(each.body.id), null), role: "user", text, unsent: each });
  }
  return steps;
}

function stepOf(turn: Turn, children: Children): Step {
  const siblings = children.get(turn.parent ?? "") ?? [];
  return {
    ...blank(turn.id, turn.parent),
    role: turn.role,
    text: turn.content,
    final: turn.final,
    siblings,
    place: siblings.indexOf(turn.id),
  };
}

function blank(key: string, parent: string | null): Step {
  const nothing = { final: null, live: null, problem: null, unsent: null, siblings: [], place: 0 };
  return { key, id: key, role: "assistant", parent, text: "", ...nothing };
}
