// SettingsForm: what was changed of one conversation's settings and is not saved. It outlives the
// dialog in which it is changed, and so does a save that is under way.

import type { Changes } from "../transport/api";
import { asProblem } from "../transport/problem";
import type { Settings } from "../transport/wire";
import type { Chat } from "./chat.svelte";
import { formKept, keepBeginning, keepForm, type Form } from "./kept";

export class SettingsForm {
  changed = $state.raw<Form | null>(null); // null: nothing
  problem = $state(""); // why it was not saved
  #saving = $state.raw<Form | null>(null); // as it is on its way

  constructor(readonly chat: Chat) {}

  get isSaving(): boolean {
    return this.#saving !== null;
  }

  /** There is something that is not on its way either. */
  get isUnsaved(): boolean {
    return this.changed !== null && this.changed !== this.#saving;
  }

  /** What was kept of it counts, unless more is known. */
  recall(): void {
    this.problem = "";
    if (!this.isSaving) this.changed = formKept(this.chat.place);
  }

  change(changes: Partial<Form>): void {
    this.changed = { values: {}, ...this.changed, ...changes };
    keepForm(this.chat.place, this.changed);
  }

  drop(): void {
    this.changed = null;
    keepForm(this.chat.place, null);
  }

  async save(): Promise<void> {
    const { chat, changed: form } = this;
    if (form === null || this.isSaving) return;
    this.problem = "";
    this.#saving = form;
    try {
      // The server takes settings as a whole, and another tab may have changed some.
      await chat.load();
      if (chat.name !== null && chat.problem) throw chat.problem;
      const changes: Changes = {};
      if (form.system !== undefined) changes.system = form.system.trim() || null;
      if (form.stop !== undefined || Object.keys(form.values).length > 0) {
        changes.settings = merged(form, chat.settings);
      }
      await chat.change(changes);
      if (chat.name === null) keepBeginning(chat.place, { system: chat.system, settings: chat.settings });
      if (this.changed === form) this.drop(); // or something was typed since
    } catch (error) {
      this.problem = asProblem(error).message;
    } finally {
      this.#saving = null;
    }
  }
}

/** What was changed, in what is there. */
function merged({ values, stop }: Form, present: Settings): Settings {
  const settings: Record<string, unknown> = { ...present };
  for (const [name, value] of Object.entries(values)) {
    if (value === null) delete settings[name];
    else settings[name] = value;
  }
  const words = stop?.split("\n").filter((line) => line !== "");
  if (words?.length) settings.stop = words;
  else if (words) delete settings.stop;
  return settings as Settings;
}
