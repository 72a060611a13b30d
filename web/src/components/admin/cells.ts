// The byte of a page, read: see chatserve/cache/page_map.py.

import type { Cells, PageMaps } from "../../transport/cache_wire";

/** How a page is painted: its state, or that several requests share it. */
export const KINDS = ["free", "cached", "sealed", "shared", "open", "loading", "leaving"] as const;
export type Kind = (typeof KINDS)[number];

export const MEANINGS: Record<Kind, string> = {
  free: "holds nothing",
  cached: "kept, used by nobody now",
  sealed: "full, in use by one",
  shared: "in use by two or more",
  open: "being written",
  loading: "on its way here",
  leaving: "gone once the step is over",
};

export interface Cell {
  kind: Kind;
  state: string;
  leased: boolean;
  owners: number;
}

export function cellOf(maps: PageMaps, byte: number): Cell {
  const state = maps.states[byte & maps.stateBits] ?? "free";
  const owners = byte >> maps.ownersShift;
  const known = KINDS.find((each) => each === state) ?? "free";
  return { kind: owners > 1 ? "shared" : known, state, leased: (byte & maps.leasedBit) !== 0, owners };
}

export interface Tally {
  kinds: Record<Kind, number>;
  leased: number;
}

const AREA = 90_000; // square pixels, about, for all cells together
const SIDE_MOST = 16;
const SIDE_LEAST = 2;
const SIDE_CLEAR = 6; // a single cell of this size can be seen, and pointed at

/** Which pages have a cell, in order, and how large each is. */
export interface Layout {
  pages: Uint32Array;
  side: number; // CSS pixels
  whole: boolean; // all pages have one; else the free ones have none
}

const sideOf = (count: number): number =>
  Math.max(SIDE_LEAST, Math.min(SIDE_MOST, Math.floor(Math.sqrt(AREA / Math.max(1, count)))));

/** All pages, where their cells are large enough to be seen; else those that are not free. */
export function layoutOf(maps: PageMaps, cells: Cells): Layout {
  const side = sideOf(cells.length);
  if (side < SIDE_CLEAR) {
    const free = Array.from({ length: 256 }, (_, byte) => cellOf(maps, byte).kind === "free");
    const pages = new Uint32Array(cells.length);
    let count = 0;
    for (const [page, byte] of cells.entries()) {
      if (!free[byte]) pages[count++] = page;
    }
    if (sideOf(count) > side) return { pages: pages.slice(0, count), side: sideOf(count), whole: false };
  }
  return { pages: Uint32Array.from(cells.keys()), side, whole: true };
}

/** The first place whose page is this one or a later one; `pages.length` where there is none. */
export function placeOf(pages: Uint32Array, page: number): number {
  let low = 0;
  let high = pages.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((pages[middle] ?? 0) < page) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Pages by how they are painted. */
export function tally(maps: PageMaps, cells: Cells): Tally {
  const bytes = new Uint32Array(256);
  for (const byte of cells) bytes[byte] = (bytes[byte] ?? 0) + 1;
  const kinds = Object.fromEntries(KINDS.map((kind) => [kind, 0])) as Record<Kind, number>;
  let leased = 0;
  for (const [byte, count] of bytes.entries()) {
    if (count === 0) continue;
    const cell = cellOf(maps, byte);
    kinds[cell.kind] += count;
    if (cell.leased) leased += count;
  }
  return { kinds, leased };
}

/** What one page is, in words. */
export function told(maps: PageMaps, cells: Cells, page: number): string {
  const cell = cellOf(maps, cells[page] ?? 0);
  const most = cell.owners >= maps.ownersMost ? " or more" : "";
  const owners =
    cell.owners === 0 ? "" : `, used by ${cell.owners}${most}`;
  return `Page ${page}: ${cell.state}${owners}${cell.leased ? ", leased" : ""}`;
}
