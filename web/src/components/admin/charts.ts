// Which charts there are: from columns of samples to lines.

import type { Sample } from "../../transport/cache_wire";
import { number, sum } from "../../state/figures";
import { bytes, rate, seconds, whole } from "../figures";

export interface Line {
  name: string;
  color: string;
  of: (sample: Sample) => number | null;
}

export interface ChartKind {
  title: string;
  note: string;
  lines: Line[];
  stacked?: boolean;
  limit?: (last: Sample | undefined) => number | null; // more there cannot be
  binary?: boolean; // the scale ends at a power of two
  show: (value: number) => string;
}

const line = (name: string, color: string, ...columns: string[]): Line => ({
  name,
  color: `var(--${color})`,
  of: (sample) => sum(sample, columns),
});

const byState = (tier: string, states: readonly string[]): Line[] =>
  states.map((state) => line(state, state === "held" ? "sealed" : state === "filling" ? "loading" : state, `${tier}_${state}_pages`));

export const charts: ChartKind[] = [
  {
    title: "Device memory",
    note: "pages by state",
    lines: byState("device", ["sealed", "open", "loading", "leaving", "cached"]),
    stacked: true,
    limit: (last) => number(last, "device_pages"),
    show: whole,
  },
  {
    title: "Host memory",
    note: "pages by state",
    lines: byState("host", ["held", "filling", "cached"]),
    stacked: true,
    limit: (last) => number(last, "host_pages"),
    show: whole,
  },
  {
    title: "Disk",
    note: "what the pages on the disk take",
    lines: [line("used", "disk", "disk_bytes")],
    stacked: true,
    binary: true,
    show: bytes,
  },
  {
    title: "Traffic",
    note: "a second, between the tiers",
    lines: [
      line("device to host", "host", "host_saved_bytes_a_second"),
      line("host to device", "device", "host_promoted_bytes_a_second"),
      line("to disk", "disk", "disk_written_bytes_a_second"),
      line("from disk", "open", "disk_read_bytes_a_second"),
    ],
    binary: true,
    show: (value) => `${bytes(value)}/s`,
  },
  {
    title: "Prompt tokens",
    note: "a second: looked up, and found",
    lines: [
      line("looked up", "faint", "query_tokens_a_second"),
      line("found", "device", "hit_tokens_a_second"),
    ],
    show: rate,
  },
  {
    title: "Sharing",
    note: "pages that requests refer to, and pages that exist",
    lines: [
      line("logical", "shared", "logical_pages"),
      line("physical", "device", "physical_pages"),
    ],
    show: whole,
  },
  {
    title: "Evictions",
    note: "pages a second, of all tiers, by reason",
    lines: [
      line("space", "open", "device_evicted_for_space_a_second", "host_evicted_for_space_a_second", "disk_evicted_for_space_a_second"),
      line("flush", "host", "device_evicted_by_flush_a_second", "host_evicted_by_flush_a_second"),
      line("age", "disk", "device_evicted_by_age_a_second", "disk_evicted_by_age_a_second"),
      line("by name", "named", "device_evicted_by_name_a_second", "disk_evicted_by_name_a_second"),
      line("damaged, orphaned", "leaving", "disk_evicted_as_bad_a_second", "disk_evicted_as_orphan_a_second"),
    ],
    show: rate,
  },
  {
    title: "Step time",
    note: "mean of each second; 99th percentile of the last minute",
    lines: [
      line("99th percentile", "leaving", "step_99th_percentile_seconds"),
      line("mean", "host", "step_mean_seconds"),
    ],
    show: seconds,
  },
  {
    title: "Queue",
    note: "requests",
    lines: [
      line("running", "device", "running"),
      line("waiting", "open", "waiting", "accepted_waiting"),
      line("following", "disk", "following"),
    ],
    show: whole,
  },
  {
    title: "Streams",
    note: "answers that are open now",
    lines: [line("open", "host", "streams_open"), line("replies of chats", "device", "replies_running")],
    show: whole,
  },
  {
    title: "Tokens",
    note: "a second",
    lines: [
      line("of prompts", "host", "prompt_tokens_a_second"),
      line("generated", "device", "generated_tokens_a_second"),
    ],
    show: rate,
  },
  {
    title: "Store",
    note: "mean time of a call",
    lines: [line("a call", "disk", "store_call_mean_seconds")],
    show: seconds,
  },
];
