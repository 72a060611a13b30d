// The title that the server will give a conversation for its first message: its first line with
// words, cut at a word (`title_of` in chatserve/chat/conversations/outcome.py). Lengths are of code
// points, and what counts as a space or as printable is what does in Python.

const CHARACTERS_MAX = 60;
const LINE_ENDS = /\r\n|[\n-\r\x1c-\x1e\x85\u2028\u2029]/;
const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/;
const UNPRINTABLE = /(?! )[\p{C}\p{Z}]/gu;

export function titleOf(text: string): string {
  const words = text.split(LINE_ENDS).map((line) => line.split(SPACES).filter((word) => word !== ""));
  const first = words.find((line) => line.length > 0) ?? [];
  const line = first.join(" ").replace(UNPRINTABLE, "").trim();
  const characters = [...line];
  if (characters.length <= CHARACTERS_MAX) return line;
  const cut = characters.slice(0, CHARACTERS_MAX - 1);
  const space = cut.lastIndexOf(" ");
  return (space > CHARACTERS_MAX / 2 ? cut.slice(0, space) : cut).join("") + "…";
}
