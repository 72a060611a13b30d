// Markdown to markup that is safe to show. Model text is untrusted.
//
// Theory of operation: HTML in the text is text, images are links, code blocks are left to their own
// component (blocks.ts). What marked makes is sanitised after rendering, by a list of what markdown
// needs: no attribute that could carry style, a name or an event, links to http, https and mailto
// alone, which open elsewhere and do not tell where from.

import DOMPurify from "dompurify";
import { Lexer, Marked, type Tokens } from "marked";

const SAFE_URL = /^(https?:\/\/|mailto:)/i;
const TAGS = [
  ...["a", "p", "br", "hr", "em", "strong", "del", "code", "pre", "blockquote", "span", "sup"],
  ...["h2", "h3", "h4", "h5", "h6", "ul", "ol", "li"],
  ...["table", "thead", "tbody", "tr", "th", "td"],
];
const ATTRIBUTES = ["href", "title", "start", "align", "class", "target", "rel", "dir"];
const CLASSES = /^(task|hljs-[a-z_-]+)$/;

const escapes: Record<string, string> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};

export function escaped(text: string): string {
  return text.replace(/[&<>"']/g, (character) => escapes[character] ?? "");
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // The page has a title of its own, under which a reply stands.
    heading({ tokens, depth }: Tokens.Heading) {
      const name = `h${Math.min(6, depth + 1)}`;
      return `<${name}>${this.parser.parseInline(tokens)}</${name}>\n`;
    },
    html: ({ text }: Tokens.HTML | Tokens.Tag) => escaped(text),
    // A picture would tell its server who reads this. Its address can be followed, as any other.
    image: ({ href, text }: Tokens.Image) =>
      `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }: Tokens.Checkbox) => `<span class="task">${checked ? "☑" : "☐"}</span> `,
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.hasAttribute("class") && !CLASSES.test(node.getAttribute("class") ?? "")) {
    node.removeAttribute("class");
  }
  if (node.tagName !== "A") return;
  if (!SAFE_URL.test(node.getAttribute("href") ?? "")) {
    node.removeAttribute("href");
    return;
  }
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** Markup of our own making, or of marked's or highlight.js's, without what could do anything. */
export function sanitised(html: string): string {
  return DOMPurify.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ATTRIBUTES,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    ALLOWED_URI_REGEXP: SAFE_URL,
  });
}

/** What `[text][name]` points at, by name as marked folds it. It has no prototype: a name is model
 * text too. */
export type Links = Record<string, Pick<Tokens.Link, "href" | "title">>;

export const noLinks = (): Links => Object.create(null) as Links;

/** Safe markup of one or more blocks of markdown. links: those that other blocks define. */
export function rendered(markdown: string, links: Links): string {
  const lexer = new Lexer(marked.defaults);
  Object.assign(lexer.tokens.links, links);
  return sanitised(marked.parser(lexer.lex(markdown)));
}

export const lexed = (markdown: string) => marked.lexer(markdown);
