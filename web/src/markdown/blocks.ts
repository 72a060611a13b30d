// A text of markdown, cut into blocks as it grows, so that only the last one is drawn anew.
//
// Theory of operation. What stands before the last block of complete lines cannot change any more:
// it is settled, rendered once, and not looked at again. The rest, the tail, is rendered at each
// step, with what is half open in it closed (remend). Code is no markup: a fence grows as plain text
// and is coloured when it closes. A list or a paragraph may grow as long as a whole reply, and
// rendering it anew for each word would take longer with each word; so a long list is cut between
// its items, and any other long tail is shown as plain text until it ends.
//
// Blocks are rendered apart, but a link's address may stand in another one (`[text][name]`, and at
// the end `[name]: https://…`). Definitions are gathered as they settle; blocks that wait for one
// are rendered once more when it has come.

import { Lexer, type Token, type Tokens } from "marked";
import remend from "remend";
import { escaped, lexed, noLinks, rendered } from "./render";

const LIST_LENGTH_MAX = 3_000; // characters, of what is rendered at each step
const TAIL_LENGTH_MAX = 8_000;

export interface Block {
  key: number;
  html: string;
  code: { language: string; text: string; closed: boolean } | null;
  markdown: string; // what html was made of
}

// What may refer to a definition: `[text][name]`, `[name][]`, `[name]`.
const REFERENCE = /\[([^[\]]+)\]/g;
const FENCE = /^ {0,3}(`{3,}|~{3,})[^\n]*\n?/;

export class Blocks {
  settled: readonly Block[] = [];
  tail: Block | null = null;
  #text = "";
  #place = 0; // where the tail begins
  #looked = 0; // up to which line's end it was looked for settled blocks
  #links = noLinks();

  /** The blocks of this text; what it has in common with the one before is not done again. */
  update(text: string, over: boolean): void {
    if (!text.startsWith(this.#text.slice(0, this.#place))) {
      this.settled = [];
      this.#links = noLinks();
      this.#place = this.#looked = 0;
    }
    this.#text = text;
    const end = over ? text.length : text.lastIndexOf("\n") + 1;
    if (end > this.#looked || over) this.#settle(end, over);
    const rest = text.slice(this.#place);
    const tail = rest.trim() === "" ? null : this.#tail(rest);
    this.tail = tail?.html === "" && tail.code === null ? null : tail; // a definition shows nothing
  }

  #settle(end: number, over: boolean): void {
    this.#looked = end;
    const part = this.#text.slice(this.#place, end);
    // A fence that is open swallows all that follows; there is nothing to be found in it.
    const fence = FENCE.exec(part);
    if (!over && fence && !closes(part, fence[1] ?? "")) return;
    const tokens: Token[] = lexed(part);
    let last = tokens.length - 1;
    while (last >= 0 && tokens[last]?.type === "space") last -= 1;
    if (complete(tokens[last], tokens[last + 1])) last += 1; // any other may grow
    const whole = over ? tokens : tokens.slice(0, Math.max(0, last));
    this.#define(whole);
    const blocks: Block[] = [];
    let length = 0;
    for (const token of whole) {
      length += token.raw.length;
      if (token.type !== "space" && token.type !== "def") blocks.push(this.#block(token, blocks.length));
    }
    const open = over ? undefined : tokens[last];
    if (open?.type === "list" && open.raw.length > LIST_LENGTH_MAX) {
      const items = (open as Tokens.List).items.slice(0, -1);
      const raw = items.map((item) => item.raw).join("");
      blocks.push(this.#markup(raw, blocks.length));
      length += raw.length;
    }
    // marked counts lines that end in CR LF, or hold tabs, in its own way.
    if (part.startsWith(whole.map((token) => token.raw).join(""))) this.#place += length;
    else if (over) this.#place = this.#text.length;
    else return;
    if (blocks.length) this.settled = [...this.settled, ...blocks];
  }

  /** Take the definitions among these, and mend what has waited for them. */
  #define(tokens: readonly Token[]): void {
    const fresh = new Set<string>();
    for (const token of tokens) {
      if (token.type !== "def") continue;
      const { tag, href, title } = token as Tokens.Def;
      if (tag in this.#links) continue; // the first one counts
      this.#links[tag] = { href, title };
      fresh.add(tag);
    }
    if (fresh.size === 0) return;
    const waits = ({ markdown }: Block): boolean =>
      [...markdown.matchAll(REFERENCE)].some(([, name = ""]) => fresh.has(folded(name)));
    this.settled = this.settled.map((block) =>
      waits(block) ? { ...block, html: rendered(block.markdown, this.#links) } : block,
    );
  }

  #tail(rest: string): Block {
    const fence = FENCE.exec(rest);
    if (fence && !closes(rest, fence[1] ?? "")) {
      const [head = "", mark = ""] = fence;
      const language = head.trim().slice(mark.length).trim();
      return this.#code(language, rest.slice(head.length), false, 0);
    }
    if (rest.length > TAIL_LENGTH_MAX) {
      return { key: this.settled.length, html: `<p>${escaped(rest)}</p>`, code: null, markdown: "" };
    }
    const tokens = Lexer.lex(rest).filter((token) => token.type !== "space");
    const [only] = tokens;
    if (tokens.length === 1 && only?.type === "code" && fence) return this.#block(only, 0);
    return this.#markup(remend(rest), 0);
  }

  #block(token: Token, offset: number): Block {
    if (token.type === "code") {
      const { lang = "", text } = token as Tokens.Code;
      return this.#code(lang, text, true, offset);
    }
    return this.#markup(token.raw, offset);
  }

  #markup(markdown: string, offset: number): Block {
    const html = rendered(markdown, this.#links);
    return { key: this.settled.length + offset, html, code: null, markdown };
  }

  #code(info: string, text: string, closed: boolean, offset: number): Block {
    const language = info.split(/\s/, 1)[0] ?? "";
    return { key: this.settled.length + offset, html: "", code: { language, text, closed }, markdown: "" };
  }
}

/** A name as marked compares it. */
const folded = (name: string): string =>
  name.trim().replace(/\s+/g, " ").toLowerCase().toUpperCase().toLowerCase();

/** Whether a block will not grow: a definition before an empty line, or a fence that is closed. */
function complete(token: Token | undefined, next: Token | undefined): boolean {
  if (token?.type === "def") return next?.type === "space";
  if (token?.type !== "code") return false;
  const fence = FENCE.exec(token.raw);
  return fence !== null && closes(token.raw, fence[1] ?? "");
}

/** Whether a fence that this text begins with ends in it. */
function closes(text: string, mark: string): boolean {
  const end = new RegExp(`\n {0,3}${mark[0] === "~" ? "~" : "`"}{${mark.length},} *(\n|$)`);
  return end.test(text);
}
