// What of this tab outlives a reload: text that was typed and not sent, by conversation, a turn that
// went out and was not acknowledged, turns that were refused, a text that is being changed, and
// settings that the server does not have. In sessionStorage, so that two tabs are two tabs.
//
// It is one user's: until the server has said who is here nothing of it is shown, and what is typed
// meanwhile waits in memory; what was another's is forgotten.

import type { Settings } from "../transport/wire";

const ALL = "chatserve.";
const OWNER = "chatserve.owner";
const TEXT = "chatserve.text.";
const TURN = "chatserve.turn.";
const UNSENT = "chatserve.unsent.";
const FIRST = "chatserve.first";
const EDIT = "chatserve.edit.";
const FORM = "chatserve.form.";
const NEW = "chatserve.new";

/** A turn that the server does not have and will not be sent by itself. reason: in words. */
export interface Refused {
  body: Record<string, unknown>;
  reason: string;
}

let isOwned = false;
const early = new Map<string, string>(); // by its name, while nobody is known

/** What is kept is this user's from now on. Whether this tab was another's before. */
export function keepFor(owner: string): boolean {
  isOwned = true;
  const before = get(OWNER);
  if (before !== owner) forgetKept();
  put(OWNER, owner);
  // The page was left before the conversation of this message was made.
  keepText(null, joined(firstKept(), textKept(null)));
  keepFirst("");
  for (const [name, text] of early)
    put(name, name.startsWith(TEXT) ? joined(get(name) ?? "", text) : text);
  early.clear();
  return before !== null && before !== owner;
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

/** A text that is put in the place of a turn's. open: it is still being changed. */
export interface Edit {
  turn: string;
  text: string;
  open: boolean;
}

/** The settings of a conversation as they were typed, and not saved. */
export interface Form {
  system: string;
  values: Record<string, number | null>;
  stop: string;
}

/** What a conversation that is not made yet will be made with. */
export interface Beginning {
  system: string | null;
  settings: Settings;
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

function putValue(name: string, value: object | null): void {
  put(name, value && JSON.stringify(value));
}

function value<T>(name: string): T | null {
  const found = get(name);
  return found ? (JSON.parse(found) as T) : null;
}

export const keepText = (conversation: string | null, text: string): void =>
  put(TEXT + (conversation ?? ""), text);

export const textKept = (conversation: string | null): string =>
  get(TEXT + (conversation ?? "")) ?? "";

/** A turn's body; null: it was acknowledged, or given up. */
export const keepTurn = (conversation: string, turn: Record<string, unknown> | null): void =>
  putValue(TURN + conversation, turn);

export const turnKept = (conversation: string): Record<string, unknown> | null =>
  value(TURN + conversation);

export const keepUnsent = (conversation: string, unsent: readonly Refused[]): void =>
  putValue(UNSENT + conversation, unsent.length > 0 ? unsent : null);

export const unsentKept = (conversation: string): readonly Refused[] =>
  value<Refused[]>(UNSENT + conversation) ?? [];

/** A first message whose conversation is being made; "": it is made, or was refused. */
export const keepFirst = (text: string): void => put(FIRST, text);

const firstKept = (): string => get(FIRST) ?? "";

/** null: it was sent, or given up. */
export const keepEdit = (conversation: string, edit: Edit | null): void =>
  putValue(EDIT + conversation, edit);

export const editKept = (conversation: string): Edit | null => value(EDIT + conversation);

/** null: it was saved, or given up. */
export const keepForm = (conversation: string | null, form: Form | null): void =>
  putValue(FORM + (conversation ?? ""), form);

export const formKept = (conversation: string | null): Form | null =>
  value(FORM + (conversation ?? ""));

export const keepBeginning = (beginning: Beginning): void => putValue(NEW, beginning);

export const beginningKept = (): Beginning | null => value(NEW);

/** A conversation is made: the next one begins without anything of it. */
export function keepMade(conversation: string): void {
  put(NEW, null);
  keepForm(conversation, formKept(null));
  keepForm(null, null);
}
