// Server-sent events out of a response's body. It may not know what the events mean.
//
// A chunk is not a frame: text is decoded as a stream and what is not yet a whole line is held back.

export interface ServerEvent {
  event: string;
  id: string | null;
  data: string;
}

/** An event with what its data says. */
export interface Told {
  event: string;
  id: string | null;
  said: Record<string, unknown>;
}

export class EventReader {
  #tail = "";
  #event = "";
  #id: string | null = null;
  #data: string[] = [];

  /** The events that are complete now. */
  push(text: string): ServerEvent[] {
    this.#tail += text;
    const events: ServerEvent[] = [];
    // A CR at the very end may be the first half of a CRLF, so it waits too.
    const line = /([^\r\n]*)(\r\n|\n|\r(?!$))/gy;
    let used = 0;
    for (let found; (found = line.exec(this.#tail)); used = line.lastIndex) {
      this.#take(found[1] ?? "", events);
    }
    this.#tail = this.#tail.slice(used);
    return events;
  }

  #take(line: string, events: ServerEvent[]): void {
    if (line === "") {
      if (this.#data.length) {
        events.push({ event: this.#event, id: this.#id, data: this.#data.join("\n") });
      }
      this.#event = "";
      this.#id = null;
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    if (colon <= 0) return; // a comment: the server's sign of life
    const name = line.slice(0, colon);
    const value = line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (name === "event") this.#event = value;
    else if (name === "id") this.#id = value;
    else if (name === "data") this.#data.push(value);
  }
}

/** The events of a body until it ends. heard: called for every chunk, comments too. */
export async function* events(
  body: ReadableStream<Uint8Array>,
  heard: () => void,
): AsyncGenerator<ServerEvent, void, undefined> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const lines = new EventReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      heard();
      yield* lines.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    // Whoever leaves the loop leaves the connection too.
    reader.cancel().catch(() => undefined);
  }
}
