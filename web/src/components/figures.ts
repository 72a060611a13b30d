// Numbers as people read them.

const numbers = new Intl.NumberFormat("en");

export const whole = (value: number): string => numbers.format(Math.round(value));

/** 0.4 → "0.40 s", 12.3 → "12.3 s", 75 → "1 min 15 s". */
export function seconds(value: number): string {
  if (value < 0.0095) return `${(value * 1000).toFixed(value < 0.00095 ? 1 : 0)} ms`;
  if (value < 10) return `${value.toFixed(2)} s`;
  if (value < 60) return `${value.toFixed(1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** "today", "yesterday", … of a time in seconds since 1970. */
export function age(then: number, now: Date): string {
  const midnight = new Date(now.getFullYear(), now.getMonth(), now.getDate()).getTime() / 1000;
  if (then >= midnight) return "Today";
  if (then >= midnight - 86_400) return "Yesterday";
  if (then >= midnight - 6 * 86_400) return "Last 7 days";
  if (then >= midnight - 29 * 86_400) return "Last 30 days";
  return "Older";
}
