// Unsent: the turns of one conversation that the server refused. What they say is not lost: it is
// shown with the reason, outlives a reload, and can be sent again or taken back into the field.

import { keepUnsent, unsentKept, type Refused } from "./kept";

export class Unsent {
  turns = $state.raw<readonly Refused[]>([]); // oldest first

  recall(conversation: string): void {
    if (this.turns.length === 0) this.turns = unsentKept(conversation);
  }

  /** A turn without words of its own is only a wish for another answer, and is not kept. */
  keep(conversation: string, body: Record<string, unknown>, reason: string): void {
    if (body.content !== undefined) this.#set(conversation, [...this.turns, { body, reason }]);
  }

  drop(conversation: string, refused: Refused): void {
    this.#set(conversation, this.turns.filter((each) => each !== refused));
  }

  /** A message that was taken back may have reached the server all the same: then it is not unsent.
   * The ids of such. */
  arrived(conversation: string, isThere: (turn: string) => boolean): Set<string> {
    this.recall(conversation);
    const arrived = this.turns.filter(({ body }) => isThere(String(body.id)));
    for (const each of arrived) this.drop(conversation, each);
    return new Set(arrived.map(({ body }) => String(body.id)));
  }

  #set(conversation: string, turns: readonly Refused[]): void {
    this.turns = turns;
    keepUnsent(conversation, turns);
  }
}
