// What of this tab outlives a reload: text that was typed and not sent, by conversation, a turn that
// went out and was not acknowledged, and turns that were refused. In sessionStorage, so that two
// tabs are two tabs.
//
// It is one user's: until the server has said who is here nothing of it is shown, and what is typed
// meanwhile waits in memory; what was another's is forgotten.

const ALL = "chatserve.";
const OWNER = "chatserve.owner";
const TEXT = "chatserve.text.";
const TURN = "chatserve.turn.";
const UNSENT = "chatserve.unsent.";
const FIRST = "chatserve.first";

/** A turn that the server does not have and will not be sent by itself. reason: in words. */
export interface Refused {
  body: Record<string, unknown>;
  reason: string;
}

let isOwned = false;
const early = new Map<string, string>(); // by its name, while nobody is known

/** What is kept is this user's from now on. */
export function keepFor(owner: string): void {
  isOwned = true;
  if (get(OWNER) !== owner) forgetKept();
  put(OWNER, owner);
  // The page was left before the conversation of this message was made.
  keepText(null, joined(firstKept(), textKept(null)));
  keepFirst("");
  for (const [name, text] of early) put(name, joined(get(name) ?? "", text));
  early.clear();
}

/** Nothing is kept any more, and nothing shown of what is. */
export function keepNothing(): void {
  isOwned = false;
}

export function forgetKept(): void {
  try {
    const names = Object.keys(sessionStorage).filter((name) => name.startsWith(ALL));
    for (const name of names) sessionStorage.removeItem(name);
  } catch {
    // What a browser refuses to show it has not kept.
  }
}

/** Two texts as one. */
export function joined(first: string, second: string): string {
  return [first, second].filter((each) => each.trim() !== "").join("\n");
}

function put(name: string, value: string | null): void {
  if (!isOwned) {
    early.set(name, value ?? "");
    return;
  }
  try {
    if (value) sessionStorage.setItem(name, value);
    else sessionStorage.removeItem(name);
  } catch {
    // Full or refused: then it does not outlive a reload.
  }
}

function get(name: string): string | null {
  if (!isOwned) return early.get(name) ?? null;
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

export const keepText = (conversation: string | null, text: string): void =>
  put(TEXT + (conversation ?? ""), text);

export const textKept = (conversation: string | null): string =>
  get(TEXT + (conversation ?? "")) ?? "";

/** A turn's body; null: it was acknowledged, or given up. */
export const keepTurn = (conversation: string, turn: Record<string, unknown> | null): void =>
  put(TURN + conversation, turn && JSON.stringify(turn));

export function turnKept(conversation: string): Record<string, unknown> | null {
  const found = get(TURN + conversation);
  return found === null ? null : (JSON.parse(found) as Record<string, unknown>);
}

export const keepUnsent = (conversation: string, unsent: readonly Refused[]): void =>
  put(UNSENT + conversation, unsent.length > 0 ? JSON.stringify(unsent) : null);

export const unsentKept = (conversation: string): readonly Refused[] =>
  JSON.parse(get(UNSENT + conversation) ?? "[]") as Refused[];

/** A first message whose conversation is being made; "": it is made, or was refused. */
export const keepFirst = (text: string): void => put(FIRST, text);

const firstKept = (): string => get(FIRST) ?? "";
