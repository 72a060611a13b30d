// What a model thinks aloud before it answers, apart from the answer: `<think>…</think>` in front.

const OPEN = "<think>";
const CLOSE = "</think>";

export interface Parts {
  reasoning: string;
  answer: string;
}

export function parted(text: string): Parts {
  const begin = text.trimStart();
  if (!begin.startsWith(OPEN)) {
    // While the mark itself is coming, it is not shown as the answer's first letters.
    return { reasoning: "", answer: begin !== "" && OPEN.startsWith(begin) ? "" : text };
  }
  const end = begin.indexOf(CLOSE);
  if (end < 0) return { reasoning: begin.slice(OPEN.length), answer: "" };
  return {
    reasoning: begin.slice(OPEN.length, end).trim(),
    answer: begin.slice(end + CLOSE.length).trimStart(),
  };
}
