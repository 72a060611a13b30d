// What an action did, in a sentence.

import type { Counts } from "../../transport/cache";
import { pages, whole } from "../figures";

const of = (counts: Counts, name: string): number => counts[name] ?? 0;

export function flushed(counts: Counts): string {
  return `Flushed: ${pages(of(counts, "pages"))} left the device, ${whole(of(counts, "host_pages"))} host memory.`;
}

export function warmed(counts: Counts): string {
  const parts = [`${pages(of(counts, "device"))} on the device`, `${whole(of(counts, "coming"))} on the way there`];
  if (of(counts, "below")) parts.push(`${whole(of(counts, "below"))} left below for want of room`);
  if (of(counts, "nowhere")) parts.push(`${whole(of(counts, "nowhere"))} nowhere`);
  return `Warm, its current branch: ${parts.join(", ")}.`;
}

export function leased(counts: Counts, seconds: number): string {
  const where = `${pages(of(counts, "pages"))} on the device and ${whole(of(counts, "host_pages"))} in host memory`;
  return seconds === 0 ? `The lease is over: ${where}.` : `Leased: ${where}.`;
}

export function evicted(counts: Counts): string {
  const stayed = [of(counts, "pages_stayed"), of(counts, "host_pages_stayed")] as const;
  const rest = stayed.some((each) => each > 0)
    ? ` ${pages(stayed[0])} stayed on the device, ${whole(stayed[1])} in host memory: in use, shared, or without a copy on disk.`
    : "";
  return `Evicted: ${pages(of(counts, "pages"))} left the device, ${whole(of(counts, "host_pages"))} host memory.${rest}`;
}

export function forgotten(counts: Counts): string {
  return of(counts, "conversations") ? "Forgotten: nothing of it is kept." : "There was nothing to forget.";
}

export function verified(counts: Counts): string {
  const bad = of(counts, "wrong") + of(counts, "unreadable") + of(counts, "different");
  const checked = `${pages(of(counts, "checked"))} of the disk checked`;
  const compared = `${whole(of(counts, "compared"))} compared with the device's`;
  if (bad === 0) return `${checked}, ${compared}: all good.`;
  return `${checked}: ${whole(of(counts, "wrong"))} wrong, ${whole(of(counts, "unreadable"))} unreadable; ${compared}, ${whole(of(counts, "different"))} different. These were dropped.`;
}
