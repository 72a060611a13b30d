// What of this tab outlives a reload: text that was typed and not sent, by conversation, and a turn
// that went out and was not acknowledged. In sessionStorage, so that two tabs are two tabs.

const TEXT = "chatserve.text.";
const TURN = "chatserve.turn.";

function put(name: string, value: string | null): void {
  try {
    if (value) sessionStorage.setItem(name, value);
    else sessionStorage.removeItem(name);
  } catch {
    // Full or refused: then it does not outlive a reload.
  }
}

function get(name: string): string | null {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

export const keepText = (conversation: string | null, text: string): void =>
  put(TEXT + (conversation ?? ""), text);

export const textKept = (conversation: string | null): string =>
  get(TEXT + (conversation ?? "")) ?? "";

/** A turn's body; null: it was acknowledged, or given up. */
export const keepTurn = (conversation: string, turn: Record<string, unknown> | null): void =>
  put(TURN + conversation, turn && JSON.stringify(turn));

export function turnKept(conversation: string): Record<string, unknown> | null {
  const found = get(TURN + conversation);
  return found === null ? null : (JSON.parse(found) as Record<string, unknown>);
}
