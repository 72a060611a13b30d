// The minimal chat page: one conversation, kept in this tab, streamed from /v1/chat/completions.
//
// Model text is untrusted: it only ever becomes text nodes, never markup. The conversation is the
// array `history`; the page shows it and nothing is stored. One reply is under way at most.

const element = (id) => document.getElementById(id);
const [log, input, send, stop, fresh] = ["log", "input", "send", "stop", "fresh"].map(element);
const scroller = element("scroller");
const door = element("door");

let model = null;
let history = [];
let running = null; // the AbortController of the reply under way

// -- the wire

/** Cuts a stream of text into server-sent events; holds back what is not yet a whole line. */
class EventReader {
  #tail = "";
  #data = [];

  /** The data of the events that are complete now. */
  push(text) {
    this.#tail += text;
    const events = [];
    // A CR at the very end may be the first half of a CRLF, so it waits too.
    const line = /([^\r\n]*)(\r\n|\n|\r(?!$))/gy;
    let used = 0;
    for (let found; (found = line.exec(this.#tail)); used = line.lastIndex) {
      this.#take(found[1], events);
    }
    this.#tail = this.#tail.slice(used);
    return events;
  }

  #take(line, events) {
    if (line === "") {
      if (this.#data.length) events.push(this.#data.join("\n"));
      this.#data = [];
    } else if (line.startsWith("data:")) {
      this.#data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}

class Problem extends Error {
  constructor(error, status = 0) {
    super(error?.message ?? "The server could not answer.");
    this.status = status;
  }
}

async function problemOf(response) {
  const body = await response.json().catch(() => null);
  return new Problem(body?.error, response.status);
}

/** Streams one reply; calls `onText` for each piece and gives the last chunk with the figures. */
async function complete(messages, signal, onText) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      model, messages, stream: true, stream_options: { include_usage: true },
    }),
    signal,
  });
  if (!response.ok) throw await problemOf(response);
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const events = new EventReader();
  let last = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Problem({ message: "The connection ended before the reply did." });
    for (const data of events.push(decoder.decode(value, { stream: true }))) {
      if (data === "[DONE]") return last;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem(chunk.error);
      if (chunk.usage) last = chunk;
      const text = chunk.choices[0]?.delta?.content;
      if (text) onText(text);
    }
  }
}

// -- the view

function addTurn(role, text = "") {
  element("welcome").hidden = true;
  fresh.hidden = false;
  const turn = document.createElement("li");
  turn.className = `turn ${role}`;
  const who = document.createElement("span");
  who.className = "hidden";
  who.textContent = role === "user" ? "You:" : "Reply:";
  const body = document.createElement("p");
  body.className = "text";
  body.append(document.createTextNode(text));
  turn.append(who, body);
  log.append(turn);
  return { turn, text: body.firstChild };
}

function addLine(turn, kind, text) {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  turn.append(line);
  return line;
}

/** Keeps the end in sight, unless the reader has scrolled away from it. */
function following(change) {
  const near = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  change();
  if (near) scroller.scrollTop = scroller.scrollHeight;
}

function figures(chunk, firstSeconds, totalSeconds) {
  const { usage, chatserve } = chunk;
  const first = chatserve?.timings?.to_first_token ?? firstSeconds;
  const total = chatserve?.timings?.total ?? totalSeconds;
  const parts = [];
  if (usage.completion_tokens > 1 && total > first) {
    parts.push(`${((usage.completion_tokens - 1) / (total - first)).toFixed(1)} tokens/s`);
  }
  parts.push(`first token after ${first.toFixed(2)} s`);
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  parts.push(`${cached} of ${usage.prompt_tokens} prompt tokens cached`);
  return parts.join(" · ");
}

function busy(controller) {
  running = controller;
  const waiting = controller !== null;
  stop.hidden = !waiting;
  send.hidden = waiting;
  log.setAttribute("aria-busy", String(waiting));
  refreshSend();
}

function refreshSend() {
  send.disabled = running !== null || model === null || input.value.trim() === "";
}

function announce(text) {
  element("announcer").textContent = text;
}

// -- what the user does

async function reply() {
  const controller = new AbortController();
  const conversation = history;
  const { turn, text } = addTurn("assistant");
  turn.classList.add("busy");
  scroller.scrollTop = scroller.scrollHeight;
  busy(controller);
  const began = performance.now();
  let firstSeconds = 0;
  try {
    const last = await complete(conversation, controller.signal, (piece) => {
      firstSeconds ||= (performance.now() - began) / 1000;
      following(() => text.appendData(piece));
    });
    const total = (performance.now() - began) / 1000;
    if (last) following(() => addLine(turn, "figures", figures(last, firstSeconds, total)));
    announce("The reply is complete.");
  } catch (error) {
    following(() => explain(turn, text.data !== "", controller.signal.aborted, error));
  } finally {
    turn.classList.remove("busy");
    if (text.data) conversation.push({ role: "assistant", content: text.data });
    if (running === controller) busy(null);
  }
}

function explain(turn, hasText, stopped, error) {
  if (stopped) {
    addLine(turn, "figures", "Stopped.");
    announce("Stopped.");
    return;
  }
  // fetch reports a lost connection as a TypeError with a text of the browser's own.
  const message = error instanceof Problem ? error.message : "The server cannot be reached.";
  const line = addLine(turn, "problem", message);
  announce(message);
  if (!hasText) {
    const again = document.createElement("button");
    again.type = "button";
    again.textContent = "Try again";
    again.addEventListener("click", () => {
      if (running) return;
      turn.remove();
      reply();
    });
    line.append(again);
  }
  if (error.status === 401) askForKey();
}

function say(content) {
  // After a failure without any text the last turn is the user's own: it is said again, longer.
  const last = history.at(-1);
  if (last?.role === "user") history[history.length - 1] = { role: "user", content: `${last.content}\n\n${content}` };
  else history.push({ role: "user", content });
  addTurn("user", content);
  reply();
}

function startAfresh() {
  running?.abort();
  history = [];
  log.replaceChildren();
  element("welcome").hidden = false;
  fresh.hidden = true;
  busy(null);
  input.focus();
}

function askForKey() {
  if (!door.open) door.showModal();
}

async function signIn() {
  const problem = element("door-error");
  problem.hidden = true;
  try {
    const response = await fetch("/api/session", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ key: element("key").value }),
    });
    if (!response.ok) throw await problemOf(response);
    element("key").value = "";
    door.close();
    await loadModel();
    input.focus();
  } catch (error) {
    problem.textContent = error instanceof Problem ? error.message : "The server cannot be reached.";
    problem.hidden = false;
    element("key").select();
  }
}

async function loadModel() {
  const label = element("model");
  try {
    const response = await fetch("/v1/models");
    if (!response.ok) throw await problemOf(response);
    model = (await response.json()).data[0].id;
    label.textContent = model;
    document.title = `${model} · chatserve`;
  } catch (error) {
    model = null;
    label.textContent = error.status === 401 ? "" : "The server cannot be reached.";
    if (error.status === 401) askForKey();
  }
  refreshSend();
}

input.addEventListener("input", refreshSend);
input.addEventListener("keydown", (event) => {
  // While an input method composes, Enter belongs to it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("composer").requestSubmit();
  }
});
element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = input.value.trim();
  if (send.disabled || !content) return;
  input.value = "";
  refreshSend();
  say(content);
});
stop.addEventListener("click", () => {
  running?.abort();
  input.focus();
});
fresh.addEventListener("click", startAfresh);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !door.open) running.abort();
});
element("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  signIn();
});

loadModel();
