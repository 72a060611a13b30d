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
    const { theme, drafts, sidebar } = kept();
    if (theme === "light" || theme === "dark") this.theme = theme;
    if (typeof drafts === "boolean") this.drafts = drafts;
    if (typeof sidebar === "boolean") this.sidebar = sidebar;
    this.#show();
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

  #show(): void {
    const { dataset } = document.documentElement;
    if (this.theme === "auto") delete dataset.theme;
    else dataset.theme = this.theme;
  }
}

export const preferences = new Preferences();
