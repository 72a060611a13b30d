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
