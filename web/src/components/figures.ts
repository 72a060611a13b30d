// Numbers as people read them.

const numbers = new Intl.NumberFormat("en");

export const whole = (value: number): string => numbers.format(Math.round(value));

export const pages = (count: number): string => `${whole(count)} ${count === 1 ? "page" : "pages"}`;

/** 0.0043 → "4.3 ms", 0.043 → "43 ms", 0.4 → "0.40 s", 12.3 → "12.3 s", 75 → "1 min 15 s". */
export function seconds(value: number): string {
  if (value < 0.00995) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.0995) return `${(value * 1000).toFixed(0)} ms`;
  if (value < 9.995) return `${value.toFixed(2)} s`;
  if (value < 59.95) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** 4.26 → "4.3 tokens/s", 42.6 → "43 tokens/s". */
export const pace = (value: number): string => `${value.toFixed(value < 9.95 ? 1 : 0)} tokens/s`;

/** "today", "yesterday", … of a time in seconds since 1970. */
export function age(then: number, now: Date): string {
  const midnight = new Date(now.getFullYear(), now.getMonth(), now.getDate()).getTime() / 1000;
  if (then >= midnight) return "Today";
  if (then >= midnight - 86_400) return "Yesterday";
  if (then >= midnight - 6 * 86_400) return "Last 7 days";
  if (then >= midnight - 29 * 86_400) return "Last 30 days";
  return "Older";
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** 1536 → "1.5 KiB". */
export function bytes(value: number): string {
  let place = 0;
  for (; value >= 1024 && place < UNITS.length - 1; place += 1) value /= 1024;
  return `${value.toFixed(place === 0 || value >= 100 ? 0 : 1)} ${UNITS[place]}`;
}

/** 0.123 → "12.3 %". */
export function share(value: number): string {
  return `${(100 * value).toFixed(value > 0 && value < 0.9995 ? 1 : 0)} %`;
}

/** "5 s ago", "3 min ago", … */
export function ago(then: number, now: number): string {
  const passed = Math.max(0, now - then);
  if (passed < 60) return `${Math.round(passed)} s ago`;
  if (passed < 3_600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86_400) return `${Math.floor(passed / 3_600)} h ago`;
  const days = Math.floor(passed / 86_400);
  return days === 1 ? "yesterday" : `${whole(days)} days ago`;
}

/** 0, 0.25, 12.3, 1,234. */
export function rate(value: number): string {
  if (value === 0 || value >= 99.95) return whole(value);
  return value.toFixed(value < 1 ? 2 : 1);
}
