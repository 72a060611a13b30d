// App: which conversation is open, and what passes between the socket, the list and the open chat.
//
// The address is `#<conversation>`, so that back, forward and reload do what they should. A chat
// that is left while its reply runs is followed in the background, a few at a time: a reply that
// nobody looks at is stopped by the server after a while.

import { socket, type Place } from "../transport/socket";
import type { Conversation } from "../transport/wire";
import { Chat } from "./chat.svelte";
import { beginningKept, forgetPlace, newPlace } from "./kept";
import { library } from "./library.svelte";
import { preferences } from "./preferences.svelte";
import { session } from "./session.svelte";

const AWAY_MAX = 3; // a browser has six connections to a server
const POLL_SECONDS = 20; // while there is no socket to tell of changes
const NARROW = "(max-width: 52rem)";

export type Dialog = "none" | "chat" | "preferences";

class App {
  chat = $state.raw(this.#chat(null));
  dialog = $state<Dialog>("none");
  drawer = $state(false); // the list over the chat, in a narrow window
  narrow = $state(false);
  live = $state(false); // the socket is open, and something comes through
  notice = $state.raw("");
  announcement = $state.raw("");
  searching = $state(false); // the search is asked for, and does not have the focus yet
  #away = $state.raw<ReadonlyMap<string, Chat>>(new Map());
  #noticeTimer: ReturnType<typeof setTimeout> | undefined;

  begin(): void {
    socket.owner = {
      opened: () => {
        this.live = true;
        this.#reconsider();
        void this.#refresh();
      },
      closed: () => {
        this.live = false;
      },
      changed: (conversation, revision) => this.#changed(conversation, revision),
      refused: () => void session.look(),
      signedOut: () => session.signedOut(),
    };
    const narrow = matchMedia(NARROW);
    this.narrow = narrow.matches;
    narrow.addEventListener("change", () => {
      this.narrow = narrow.matches;
      this.drawer = false;
    });
    addEventListener("hashchange", () => this.#go());
    addEventListener("online", () => {
      if (session.owner === null) return;
      socket.open();
      void this.#refresh();
    });
    document.addEventListener("visibilitychange", () => {
      this.#reconsider();
      this.#poll();
    });
    setInterval(() => this.#poll(), POLL_SECONDS * 1000);
    this.chat = this.#chat(this.#addressed);
    session.begin(() => {
      this.chat = this.#begun(this.#addressed); // with what was kept of it
      void this.chat.load();
      void library.refresh();
      this.#tellFocus();
      socket.open();
    });
  }

  /** null: a new conversation. */
  open(id: string | null): void {
    this.drawer = false;
    const hash = id === null ? "" : `#${encodeURIComponent(id)}`;
    if (location.hash === hash) this.#go();
    else if (hash) location.hash = hash;
    else {
      history.pushState(null, "", location.pathname);
      this.#go();
    }
  }

  /** Its reply is running, here or in the background. */
  isRunning(id: string): boolean {
    if (this.chat.name === id) return this.chat.running;
    return this.#away.get(id)?.running ?? false;
  }

  /** What is known here of a title that the server has not given yet. */
  titleOf(id: string): string {
    const chat = this.chat.name === id ? this.chat : this.#away.get(id);
    return chat?.title ?? "";
  }

  /** The conversation is gone. */
  forget(id: string): void {
    this.#away.get(id)?.close();
    if (this.chat.name === id) this.open(null);
    forgetPlace(id);
  }

  typed(text: string, parent?: string | null): void {
    if (!preferences.drafts) return;
    const { name, system } = this.chat;
    const place: Place = { conversation: name, system };
    if (parent !== undefined && name !== null) place.parent = parent;
    socket.draft(place, text);
  }

  sent(): void {
    socket.dropDraft();
  }

  tell(notice: string): void {
    this.notice = notice;
    this.announcement = notice;
    clearTimeout(this.#noticeTimer);
    this.#noticeTimer = setTimeout(() => (this.notice = ""), 6000);
  }

  toggleList(): void {
    if (this.narrow) this.drawer = !this.drawer;
    else preferences.set({ sidebar: !preferences.sidebar });
  }

  showSearch(): void {
    if (this.narrow) this.drawer = true;
    else preferences.set({ sidebar: true });
    this.searching = true;
  }

  // -- inside

  #chat(id: string | null): Chat {
    return new Chat(
      id,
      id === null ? newPlace() : "",
      (made, chat) => this.#made(made, chat),
      () => library.refreshSoon(),
    );
  }

  /** With what was chosen for it, where it is a new one. */
  #begun(id: string | null): Chat {
    const chat = this.#chat(id);
    if (id === null) Object.assign(chat, beginningKept(chat.place));
    return chat;
  }

  #made(made: Conversation, chat: Chat): void {
    library.add(made);
    if (chat !== this.chat) {
      // The user has gone elsewhere meanwhile: its first reply is followed from there.
      this.#away = new Map(this.#away).set(made.id, chat);
      return;
    }
    history.replaceState(null, "", `#${encodeURIComponent(made.id)}`);
    this.#tellFocus();
  }

  get #addressed(): string | null {
    return named(location.hash.slice(1));
  }

  #go(): void {
    const id = this.#addressed;
    if (id !== null) library.endSearch();
    if (id !== null && id === this.chat.name) return;
    const left = this.chat;
    left.editing = null;
    if (left.gone) forgetPlace(left.place);
    if (this.dialog === "chat") this.dialog = "none"; // it was opened for the one that is left
    const away = new Map([...this.#away].filter(([, chat]) => unfinished(chat)));
    if (unfinished(left) && left.name !== null) away.set(left.name, left);
    else left.close();
    const known = id === null ? undefined : away.get(id);
    if (known) away.delete(known.name ?? "");
    for (const [name, chat] of [...away].slice(0, Math.max(0, away.size - AWAY_MAX))) {
      chat.close();
      away.delete(name);
    }
    this.#away = away;
    left.isAway = true;
    this.chat = known ?? this.#begun(id);
    this.chat.isAway = false;
    this.#reconsider();
    if (!known && session.owner !== null) void this.chat.load();
    this.#tellFocus();
  }

  #reconsider(): void {
    for (const chat of [this.chat, ...this.#away.values()]) chat.live?.reconsider();
  }

  #tellFocus(): void {
    socket.focus({ conversation: this.chat.name, system: this.chat.system });
  }

  #changed(conversation: string | null, revision: number | null): void {
    library.refreshSoon();
    if (conversation === null) void this.chat.load();
    else if (conversation === this.chat.name) void this.chat.refresh(revision);
    else if (revision === null) forgetPlace(conversation);
  }

  /** The list tells of what is open too, so that it is loaded again only where it has changed. */
  async #refresh(): Promise<void> {
    const { chat } = this;
    const isList = await library.refresh();
    if (chat !== this.chat) return;
    const listed = library.conversations.find(({ id }) => id === chat.name);
    if (isList && listed && chat.problem === null) await chat.refresh(listed.revision);
    else if (!chat.running) await chat.load();
  }

  #poll(): void {
    if (document.hidden || this.live || session.owner === null) return;
    void this.#refresh();
  }
}

/** What it is at goes on while another is shown. */
const unfinished = (chat: Chat): boolean => chat.running || chat.choice.pending || chat.form.isSaving;

function named(hash: string): string | null {
  try {
    return decodeURIComponent(hash) || null;
  } catch {
    return hash; // no name of ours; the server says that it is not there
  }
}

export const app = new App();
