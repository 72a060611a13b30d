// Where the focus goes when what had it is taken away by what it did, or by news.

/** What had the focus is gone or switched off, so that keys go nowhere. */
export function astray(): boolean {
  const at = document.activeElement;
  return at === null || at === document.body || (at instanceof HTMLButtonElement && at.disabled);
}

export const labelOf = (button: HTMLElement): string =>
  button.getAttribute("aria-label") ?? button.textContent.trim();

// At the first or the last version one of the two is off.
const NEIGHBOUR: Record<string, string> = {
  "Previous version": "Next version",
  "Next version": "Previous version",
};

/** The button of that name in this place, or the one that is as near; undefined: neither is on. */
export function buttonIn(place: HTMLElement, label: string): HTMLButtonElement | undefined {
  const all = [...place.querySelectorAll<HTMLButtonElement>("button:enabled")];
  const named = (name: string | undefined) => all.find((each) => labelOf(each) === name);
  return named(label) ?? named(NEIGHBOUR[label]);
}
