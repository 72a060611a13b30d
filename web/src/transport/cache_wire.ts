// What an admin is told of the cache, as types, and the doors through which it comes in. It may not
// know connections. What a column of a sample means is told in chatserve/api/samples.py.

import { fields } from "./wire";

export type Value = number | string | boolean | null;

/** One second of the server, by column. */
export type Sample = Readonly<Record<string, Value>>;

/** One pool of memory: a byte a page. */
export type Cells = Uint8Array;

export interface PageMaps {
  pageTokens: number;
  states: string[];
  stateBits: number;
  leasedBit: number;
  ownersShift: number;
  ownersMost: number; // what a page shows that has so many owners or more
  device: Cells;
  host: Cells | null; // null: there is no host memory for pages
}

/** Pages of a conversation, each once, by the fastest place that has it. */
export interface Residence {
  device: number;
  host: number;
  disk: number;
  nowhere: number;
}

export interface CachedConversation {
  id: string;
  owner: string;
  updated: number; // seconds since 1970
  pages: Residence | null; // null: the store's record of them is damaged
}

/** Pages of the device that more than one request used, one after the other. */
export interface SharedPrefix {
  above: number | null; // the place of what it continues, before its own
  page: number; // its first one, as in the page map
  label: string; // a short name of no meaning, the same as long as the server runs
  prompts: string[]; // registered public prompts that it belongs to
  owner: string | null; // a key's name; null: public
  isPublic: boolean;
  pages: number;
  tokens: number;
  owners: number; // requests that use it now
  hits: number; // requests that found its first page
  hitsLeast: number; // and its last
  saved: number; // tokens
  savedUnder: number; // with what continues it
  branches: number; // what continues it, shared or not
  copies: { host: number; disk: number; none: number }; // pages, by the fastest place under the device
}

export interface SharedPrefixes {
  sharedTokens: number; // of all that is shared
  savedTokens: number;
  more: boolean; // there are others
  prefixes: SharedPrefix[];
}

const count = (value: unknown): number => (typeof value === "number" ? value : 0);
const text = (value: unknown): string => (typeof value === "string" ? value : "");
const list = (value: unknown): unknown[] => (Array.isArray(value) ? value : []);

function valueOf(value: unknown): Value {
  const plain = typeof value === "string" || typeof value === "boolean";
  return plain || (typeof value === "number" && Number.isFinite(value)) ? value : null;
}

/** A `sample` event's data. */
export function sampleOf(value: unknown): Sample {
  return Object.fromEntries(
    Object.entries(fields(value)).map(([column, each]) => [column, valueOf(each)]),
  );
}

/** A `history` event's data, oldest first. */
export function samplesOf(value: unknown): Sample[] {
  const from = fields(value);
  const columns = list(from.columns).map(text);
  return list(from.rows).map((row) => {
    const values = list(row);
    return Object.fromEntries(columns.map((column, place) => [column, valueOf(values[place])]));
  });
}

export function mapsOf(value: unknown): PageMaps {
  const from = fields(value);
  return {
    pageTokens: count(from.page_tokens),
    states: list(from.states).map(text),
    stateBits: count(from.state_bits),
    leasedBit: count(from.leased_bit),
    ownersShift: count(from.owners_shift),
    ownersMost: count(from.owners_most),
    device: cellsOf(fields(from.device).cells),
    host: from.host === null || from.host === undefined ? null : cellsOf(fields(from.host).cells),
  };
}

function cellsOf(value: unknown): Cells {
  return Uint8Array.from(atob(text(value)), (letter) => letter.charCodeAt(0));
}

export function cachedOf(value: unknown): { conversations: CachedConversation[]; next: string | null } {
  const from = fields(value);
  return {
    conversations: list(from.conversations).map((each) => {
      const one = fields(each);
      const pages = one.pages === null || one.pages === undefined ? null : fields(one.pages);
      return {
        id: text(one.id),
        owner: text(one.owner),
        updated: count(one.updated),
        pages: pages && {
          device: count(pages.device),
          host: count(pages.host),
          disk: count(pages.disk),
          nowhere: count(pages.nowhere),
        },
      };
    }),
    next: typeof from.next === "string" ? from.next : null,
  };
}

export function sharedOf(value: unknown): SharedPrefixes {
  const from = fields(value);
  return {
    sharedTokens: count(from.shared_tokens),
    savedTokens: count(from.saved_tokens),
    more: from.more === true,
    prefixes: list(from.prefixes).map((each) => {
      const one = fields(each);
      const copies = fields(one.copies);
      return {
        above: typeof one.above === "number" ? one.above : null,
        page: count(one.page),
        label: text(one.label),
        prompts: list(one.prompts).map(text),
        owner: typeof one.owner === "string" ? one.owner : null,
        isPublic: one.public === true,
        pages: count(one.pages),
        tokens: count(one.tokens),
        owners: count(one.owners),
        hits: count(one.hits),
        hitsLeast: count(one.hits_least),
        saved: count(one.saved_tokens),
        savedUnder: count(one.saved_tokens_under),
        branches: count(one.branches),
        copies: { host: count(copies.host), disk: count(copies.disk), none: count(copies.none) },
      };
    }),
  };
}

/** An action's outcome: numbers of pages by name. */
export function countsOf(value: unknown): Record<string, number> {
  return Object.fromEntries(
    Object.entries(fields(value)).map(([name, each]) => [name, count(each)]),
  );
}
