// Chat: the conversation that is open in this tab, its tree of turns, and the branch that is shown.
//
// The server's tree is the truth; what is shown before it answers is put in its place when it has.
// A reply that runs is a LiveReply beside the tree until it has ended; then it is a turn.

import * as api from "../transport/api";
import { GONE, Problem } from "../transport/problem";
import type { Conversation, Settings, Tree, Turn } from "../transport/wire";
import { Branch } from "./branch.svelte";
import { Choice } from "./choice";
import { keepMade, keepTurn, turnKept, type Refused } from "./kept";
import { Loading } from "./loading.svelte";
import { Making } from "./making.svelte";
import { LiveReply } from "./reply.svelte";
import { SettingsForm } from "./settings_form.svelte";
import { stepsOf } from "./steps";
import { titleOf } from "./title";
import { answered, asking, said } from "./tree";
import { Unsent } from "./unsent.svelte";

export class Chat {
  name = $state<string | null>(null); // null: a new one, not made yet
  conversation = $state.raw<Conversation | null>(null); // null: not made, or not loaded
  system = $state<string | null>(null);
  settings = $state.raw<Settings>({});
  problem = $state.raw<Problem | null>(null);
  live = $state.raw<LiveReply | null>(null); // the one that is shown, running or ended badly
  gone = $state(false); // deleted, here or elsewhere
  editing = $state<string | null>(null); // the turn whose text the user changes
  isAway = false; // another one is shown
  readonly #unsent = new Unsent();
  readonly choice = new Choice();
  readonly making = new Making();
  readonly form = new SettingsForm(this);
  readonly #loading = new Loading((told) => this.#heard(told));
  #optimistic = $state.raw<Turn | null>(null); // what was said and is not acknowledged
  #branch = $state.raw(new Branch());
  readonly path = $derived(this.#branch.path);
  readonly steps = $derived(
    stepsOf(this.#branch, {
      said: this.#optimistic,
      live: this.live,
      unsent: this.#unsent.turns,
    }),
  );
  /** As the server names it; before that, as it will. */
  readonly title = $derived(
    this.conversation?.title || titleOf((this.path[0] ?? this.#optimistic)?.content ?? ""),
  );
  /** How many turns from the first on the model did not see any more, at its last reply. */
  readonly leftOut = $derived(
    this.path.findLast((turn) => turn.final?.receipt)?.final?.receipt?.leftOut ?? 0,
  );

  constructor(
    id: string | null,
    readonly unmade: string, // where what is kept of a new one is
    readonly onMade: (made: Conversation, chat: Chat) => void,
    readonly onChange: () => void,
  ) {
    this.name = id;
  }

  get #revision(): number {
    return this.conversation?.revision ?? 0;
  }

  get running(): boolean {
    return this.live !== null && !this.live.over;
  }

  /** There may be something to be shown, and is not yet. */
  get loading(): boolean {
    return this.#loading.isUnderWay && this.#branch.isEmpty;
  }

  /** Where what is kept of it is. */
  get place(): string {
    return this.name ?? this.unmade;
  }

  // -- from the server

  load = (): Promise<void> => this.#loading.run(this.name);

  #heard(told: Tree | Problem): void {
    const isTree = !(told instanceof Problem);
    this.problem = isTree ? null : told;
    if (isTree) this.#take(told);
    else if (told.status === 404) this.#lose();
    this.#unsent.recall(this.place);
    const pending = turnKept(this.place);
    if (pending !== null && !this.live && isTree) this.#send(pending);
  }

  /** It is not there, or not for who asks: so nothing of it is. */
  #lose(): void {
    this.gone = true;
    this.live?.leave();
    this.live = this.#optimistic = this.editing = this.conversation = this.system = null;
    this.settings = {};
    this.#branch = new Branch();
  }

  /** Word that it has changed. */
  async refresh(revision: number | null): Promise<void> {
    if (revision === null) {
      this.problem = new Problem(GONE, 404);
      this.gone = true;
      this.live?.leave();
      this.#loading.drop();
      return;
    }
    this.#loading.saw(revision);
    await this.#catchUp();
  }

  #catchUp(): Promise<void> {
    return this.#loading.catchUp(this.name, () => (this.running ? null : this.#revision));
  }

  #take(tree: Tree): void {
    // A turn whose text is being changed stays in sight, and so does what was chosen or said.
    const fixed = this.path.find((turn) => turn.id === this.editing)?.id ?? null;
    const { conversation } = tree;
    const isHeld = this.choice.pending || this.running;
    const moved = conversation.leaf !== this.conversation?.leaf && !isHeld;
    const { id, system, settings } = conversation;
    Object.assign(this, { conversation, system, settings, gone: false });
    const branch = this.#branch;
    branch.take(tree, moved, fixed);
    const arrived = this.#unsent.arrived(id, (turn) => !!branch.turn(turn));
    if (this.live?.over && branch.turn(this.live.id)) this.live = null;
    if (this.running) return;
    const shown = new Set(this.path.map((turn) => turn.id));
    const open = tree.replies.find((reply) => reply.state === "running" && shown.has(reply.turn));
    if (open && branch.may(open.turn, fixed)) {
      branch.leaf = open.turn;
      const errand = { conversation: id, turn: null, reply: open.id };
      this.#follow(new LiveReply(errand, open.turn, open.content));
      if (arrived.has(open.turn)) this.stop();
    }
  }

  // -- what the user does

  /** Say something at the leaf. Raises Problem where a new conversation could not be made. */
  async say(content: string): Promise<void> {
    const body = asking({ content, parent: this.#branch.end }, this.#branch.isEmpty);
    await this.#make(body);
    this.#send(body);
  }

  /** Say something else in the place of a turn: a branch. */
  edit(turn: Turn, content: string): void {
    this.#send(asking({ content, parent: turn.parent }));
  }

  /** Answer a user's turn once more. */
  regenerate(turn: string): void {
    this.#send(asking({ parent: turn }));
  }

  /** Try again what has failed. */
  again(): void {
    const live = this.live;
    if (!live?.over) {
      const last = this.path.at(-1);
      if (last?.role === "user") this.regenerate(last.id);
    } else if (live.unsent !== null) {
      this.#send(live.unsent);
    } else if (live.turn !== null) {
      this.regenerate(live.turn);
    }
  }

  /** Send once more what was refused. */
  sendAgain(refused: Refused): void {
    if (this.running) return;
    this.drop(refused);
    this.#send(refused.body);
  }

  /** It is not to be sent any more. */
  drop(refused: Refused): void {
    this.#unsent.drop(this.place, refused);
  }

  turn(id: string): Turn | undefined {
    return this.#branch.turn(id);
  }

  /** End what runs, or take back what has not arrived. */
  stop(): void {
    this.making.stop();
    void this.live?.stop();
  }

  /** Show the newest branch through this turn. */
  async show(turn: string): Promise<void> {
    if (this.running) return;
    this.live = null;
    const leaf = this.#branch.show(turn);
    await this.choice.tell(() => this.change({ leaf }), (problem) => (this.problem = problem));
  }

  /** Change what is kept with it. Of a new one it is kept here until it is made. Raises Problem. */
  async change(changes: api.Changes): Promise<void> {
    if (this.name !== null) {
      this.conversation = await api.change(this.name, changes);
      this.#loading.outdate();
      this.onChange();
    }
    if (changes.system !== undefined) this.system = changes.system;
    if (changes.settings !== undefined) this.settings = changes.settings;
  }

  /** Look away. */
  close(): void {
    this.choice.cancel();
    this.live?.leave();
  }

  // -- turns

  async #make(first: Record<string, unknown>): Promise<void> {
    if (this.name !== null) return;
    this.#optimistic = said(first, null);
    const title = titleOf(this.#optimistic?.content ?? "") || null; // for other tabs too
    const what = () => ({ title, system: this.system, settings: this.settings });
    try {
      this.conversation = await this.making.run(what, (problem) => (this.problem = problem));
    } catch (error) {
      this.#optimistic = null;
      throw error;
    }
    keepMade(this.place, this.conversation.id);
    this.name = this.conversation.id;
    this.onMade(this.conversation, this);
  }

  #send(body: Record<string, unknown>): void {
    if (this.name === null) return;
    if (this.running) {
      this.#unsent.keep(this.name, body, "Another reply is running.");
      return;
    }
    // Without a parent it follows what is there.
    const branch = this.#branch;
    const parent = body.parent === undefined ? branch.leaf : (body.parent as string | null);
    this.problem = null;
    this.choice.cancel();
    const before = branch.leaf;
    branch.leaf = parent;
    this.#optimistic = said(body, parent);
    keepTurn(this.name, body);
    const errand = { conversation: this.name, turn: body, reply: null };
    this.#follow(new LiveReply(errand, this.#optimistic === null ? parent : null), before);
  }

  /** before: the leaf to go back to where the turn is refused. */
  #follow(live: LiveReply, before = this.#branch.leaf): void {
    this.live = live;
    void this.#run(live, before);
  }

  async #run(live: LiveReply, before: string | null): Promise<void> {
    const branch = this.#branch;
    const outcome = await live.run(() => this.isAway, (turn) => {
      keepTurn(live.conversation, null);
      this.#loading.outdate();
      const own = this.#optimistic;
      this.#optimistic = null;
      if (own !== null && !branch.turn(turn)) branch.add({ ...own, id: turn, created: Date.now() / 1000 });
      branch.leaf = turn;
      this.onChange();
    });
    if (outcome.kind === "left" && !live.stopping) return;
    this.#loading.outdate();
    if (live.id === null) keepTurn(live.conversation, null);
    const isShown = live.unsent?.content === undefined && !["done", "ended"].includes(outcome.kind);
    if (this.live === live && !isShown) this.live = null;
    if (live.unsent?.content !== undefined) {
      this.#optimistic = null;
      branch.leaf = before;
      this.#unsent.keep(live.conversation, live.unsent, outcome.kind === "failed" ? outcome.problem.message : "");
    }
    if (outcome.kind === "done" && live.id !== null && live.turn !== null) {
      branch.add(answered(live.id, live.turn, live.text, outcome.final));
      if (branch.leaf === live.turn) branch.leaf = live.id;
    }
    if (outcome.kind === "ended") await this.load();
    else {
      // Its title comes with its first answer, and others may have said something meanwhile.
      if (!this.conversation?.title) this.#loading.saw(1 + this.#revision);
      await this.#catchUp();
    }
    this.onChange();
  }
}
