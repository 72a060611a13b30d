// What of this tab outlives a reload: text that was typed and not sent, a turn that went out and
// was not acknowledged, turns that were refused, texts that are being changed, and settings that the
// server does not have. In sessionStorage, so that two tabs are two tabs.
//
// Each has its place: a conversation's id, or the name that one has here until it is made. Then all
// that is kept of it moves.
//
// It is one user's: until the server has said who is here nothing of it is shown, and what is typed
// meanwhile waits in memory; what was another's is forgotten.

import type { Settings } from "../transport/wire";
import { newName } from "./tree";

const ALL = "chatserve.";
const OWNER = "chatserve.owner";
const TEXT = "chatserve.text.";
const TURN = "chatserve.turn.";
const UNSENT = "chatserve.unsent.";
const FIRST = "chatserve.first.";
const EDITS = "chatserve.edits.";
const FORM = "chatserve.form.";
const BEGINNING = "chatserve.beginning.";
const NEW = "chatserve.new"; // the place of the next conversation

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
  const left = [get(NEW) ?? "", ...names(FIRST).map((name) => name.slice(FIRST.length))];
  for (const [name, text] of early)
    put(name, name.startsWith(TEXT) ? joined(get(name) ?? "", text) : text);
  early.clear();
  // The page was left before these were made: the next one has what they were to say.
  const place = newPlace();
  for (const each of left) if (each && each !== place) move(each, place);
  return before !== null && before !== owner;
}

/** Nothing is kept any more, and nothing shown of what is. */
export function keepNothing(): void {
  isOwned = false;
}

export function forgetKept(): void {
  for (const name of names(ALL)) sessionStorage.removeItem(name);
}

/** All that is kept of one conversation. */
export function forgetPlace(place: string): void {
  for (const kind of [TEXT, TURN, UNSENT, FIRST, EDITS, FORM, BEGINNING]) put(kind + place, null);
}

/** Where what the next conversation begins with is kept. */
export function newPlace(): string {
  const known = get(NEW);
  if (known && !get(FIRST + known)) return known; // or it is being made
  const place = newName();
  put(NEW, place);
  return place;
}

function move(from: string, to: string): void {
  keepText(to, joined(joined(get(FIRST + from) ?? "", textKept(from)), textKept(to)));
  for (const kind of [FORM, BEGINNING]) if (!get(kind + to)) put(kind + to, get(kind + from));
  forgetPlace(from);
}

/** Two texts as one. */
export function joined(first: string, second: string): string {
  return [first, second].filter((each) => each.trim() !== "").join("\n");
}

/** Texts in the place of turns', by turn. open: the one that is still being changed. */
interface Edits {
  open: string | null;
  texts: Record<string, string>;
}

/** Settings as they were changed, and not saved; what is not there was not changed. */
export interface Form {
  system?: string;
  values: Record<string, number | null>;
  stop?: string;
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

function names(prefix: string): string[] {
  try {
    return Object.keys(sessionStorage).filter((name) => name.startsWith(prefix));
  } catch {
    return []; // what a browser refuses to show it has not kept
  }
}

function putValue(name: string, value: object | null): void {
  put(name, value && JSON.stringify(value));
}

function value<T>(name: string): T | null {
  const found = get(name);
  return found ? (JSON.parse(found) as T) : null;
}

export const keepText = (place: string, text: string): void => put(TEXT + place, text);

export const textKept = (place: string): string => get(TEXT + place) ?? "";

/** A turn's body; null: it was acknowledged, or given up. */
export const keepTurn = (place: string, turn: Record<string, unknown> | null): void =>
  putValue(TURN + place, turn);

export const turnKept = (place: string): Record<string, unknown> | null => value(TURN + place);

export const keepUnsent = (place: string, unsent: readonly Refused[]): void =>
  putValue(UNSENT + place, unsent.length > 0 ? unsent : null);

export const unsentKept = (place: string): readonly Refused[] =>
  value<Refused[]>(UNSENT + place) ?? [];

const edits = (place: string): Edits => value<Edits>(EDITS + place) ?? { open: null, texts: {} };

/** text null: it was sent, or given up. open: it is still being changed. */
export function keepEdit(place: string, turn: string, text: string | null, open: boolean): void {
  const kept = edits(place);
  if (text === null) delete kept.texts[turn];
  else kept.texts[turn] = text;
  if (open) kept.open = turn;
  else if (kept.open === turn) kept.open = null;
  putValue(EDITS + place, Object.keys(kept.texts).length > 0 ? kept : null);
}

export const editKept = (place: string, turn: string): string | null =>
  edits(place).texts[turn] ?? null;

/** The turn whose text is still being changed. */
export const openEdit = (place: string): string | null => edits(place).open;

/** Another one is. */
export function closeEdit(place: string): void {
  const kept = edits(place);
  if (kept.open !== null) putValue(EDITS + place, { ...kept, open: null });
}

/** null: it was saved, or given up. */
export const keepForm = (place: string, form: Form | null): void => putValue(FORM + place, form);

export const formKept = (place: string): Form | null => value(FORM + place);

// -- of a conversation that is not made yet

export const keepBeginning = (place: string, beginning: Beginning): void =>
  putValue(BEGINNING + place, beginning);

export const beginningKept = (place: string): Beginning | null => value(BEGINNING + place);

/** Its first message, while it is being made; "": it was refused. */
export const keepFirst = (place: string, text: string): void => put(FIRST + place, text);

/** It is made: the next one begins without anything of it. */
export function keepMade(place: string, conversation: string): void {
  for (const kind of [FIRST, BEGINNING]) put(kind + place, null);
  move(place, conversation);
  if (get(NEW) === place) put(NEW, null);
}

/** It could not be made, and nobody looks at it any more: the next one has what it was to say. */
export function keepUnmade(place: string): void {
  const first = get(FIRST + place) ?? "";
  keepFirst(place, "");
  keepText(place, joined(first, textKept(place)));
  const next = newPlace();
  if (next !== place) move(place, next);
}
