// What a person has chosen for this browser. Kept in localStorage; where that is refused the
// choices last as long as the page.

export type Theme = "auto" | "light" | "dark";

const NAME = "chatserve.preferences";

interface Kept {
  theme: Theme;
  drafts: boolean;
  sidebar: boolean;
}

function kept(): Partial<Kept> {
  try {
    return JSON.parse(localStorage.getItem(NAME) ?? "{}") as Partial<Kept>;
  } catch {
    return {};
  }
}

class Preferences {
  theme = $state<Theme>("auto");
  drafts = $state(true); // what is typed is sent ahead, so that the server can begin to read
  sidebar = $state(true); // of wide windows; narrow ones open it over the chat

  constructor() {
    const { sidebar } = kept();
    if (typeof sidebar === "boolean") this.sidebar = sidebar;
    this.#take();
    // What is chosen in another tab counts here at once; the list is each window's own.
    addEventListener("storage", (event) => {
      if (event.key === NAME || event.key === null) this.#take();
    });
  }

  set(changes: Partial<Kept>): void {
    Object.assign(this, changes);
    this.#show();
    const { theme, drafts, sidebar } = this;
    try {
      localStorage.setItem(NAME, JSON.stringify({ theme, drafts, sidebar }));
    } catch {
      // A browser that keeps nothing for us still shows what was chosen.
    }
  }

  #take(): void {
    const { theme, drafts } = kept();
    this.theme = theme === "light" || theme === "dark" ? theme : "auto";
    this.drafts = typeof drafts === "boolean" ? drafts : true;
    this.#show();
  }

  #show(): void {
    const { dataset } = document.documentElement;
    if (this.theme === "auto") delete dataset.theme;
    else dataset.theme = this.theme;
  }
}

export const preferences = new Preferences();
