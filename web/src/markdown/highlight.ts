// Colours for code, loaded when the first fence closes. What highlight.js makes is sanitised too.

import { sanitised } from "./render";

type Colours = typeof import("./languages");

let loading: Promise<Colours> | null = null;
const LENGTH_MAX = 40_000; // characters; what is longer stays plain, since colouring blocks the page

/** Safe markup of this code, or null where its language is not known. */
export async function highlighted(code: string, language: string): Promise<string | null> {
  if (!language || code.length > LENGTH_MAX) return null;
  loading ??= import("./languages");
  try {
    const html = (await loading).coloured(code, language.toLowerCase());
    return html === null ? null : sanitised(html);
  } catch {
    loading = null; // the network was away; the next fence tries again
    return null;
  }
}
