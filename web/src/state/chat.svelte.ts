// Chat: the conversation that is open in this tab, its tree of turns, and the branch that is shown.
//
// The server's tree is the truth; what is shown before it answers is put in its place when it has.
// A reply that runs is a LiveReply beside the tree until it has ended; then it is a turn.

import * as api from "../transport/api";
import { asProblem, Problem } from "../transport/problem";
import type { Conversation, OpenReply, Settings, Tree, Turn } from "../transport/wire";
import { keepTurn, turnKept } from "./kept";
import { LiveReply } from "./reply.svelte";
import { stepsOf } from "./steps";
import { childrenOf, leafBelow, pathTo } from "./tree";

interface Sending {
  content?: string;
  parent?: string | null;
}

export class Chat {
  conversation = $state.raw<Conversation | null>(null); // null: a new one, not made yet
  system = $state<string | null>(null);
  settings = $state.raw<Settings>({});
  leaf = $state.raw<string | null>(null); // the turn that is shown last
  problem = $state.raw<Problem | null>(null);
  loading = $state(false);
  live = $state.raw<LiveReply | null>(null); // the one that is shown, running or ended badly
  #seen = 0; // the newest revision that we were told of
  #optimistic = $state.raw<Turn | null>(null); // what was said and is not acknowledged
  #turns = $state.raw<ReadonlyMap<string, Turn>>(new Map());
  #broken = $state.raw<ReadonlyMap<string, OpenReply>>(new Map()); // by the turn they should answer
  readonly #children = $derived(childrenOf(this.#turns));
  readonly path = $derived(pathTo(this.#turns, this.leaf));
  readonly steps = $derived(
    stepsOf(this.path, this.#children, { said: this.#optimistic, live: this.live, broken: this.#broken }),
  );
  /** How many turns from the first on the model did not see any more, at its last reply. */
  readonly leftOut = $derived(
    this.path.findLast((turn) => turn.final?.receipt)?.final?.receipt?.leftOut ?? 0,
  );

  constructor(
    readonly id: string | null,
    readonly onMade: (made: Conversation) => void,
    readonly onChange: () => void,
  ) {}

  get running(): boolean {
    return this.live !== null && !this.live.over;
  }

  get name(): string | null {
    return this.conversation?.id ?? this.id;
  }

  // -- from the server

  async load(): Promise<void> {
    if (this.name === null) return;
    this.loading = this.#turns.size === 0;
    try {
      this.#take(await api.open(this.name));
      this.problem = null;
    } catch (error) {
      this.problem = asProblem(error);
    } finally {
      this.loading = false;
    }
    const pending = turnKept(this.name);
    if (pending !== null && !this.live && this.problem === null) this.#send(pending);
  }

  /** Word that it has changed. */
  async refresh(revision: number | null): Promise<void> {
    if (revision === null) {
      this.problem = new Problem("This conversation was deleted.", 404);
      this.live?.leave();
      return;
    }
    this.#seen = Math.max(this.#seen, revision);
    if (!this.running) await this.#catchUp();
  }

  async #catchUp(): Promise<void> {
    if (this.#seen > (this.conversation?.revision ?? 0)) await this.load();
  }

  #take(tree: Tree): void {
    const moved = tree.conversation.leaf !== this.conversation?.leaf || this.leaf === null;
    this.conversation = tree.conversation;
    this.system = tree.conversation.system;
    this.settings = tree.conversation.settings;
    this.#turns = new Map(tree.turns.map((turn) => [turn.id, turn]));
    this.#broken = new Map(
      tree.replies.filter((reply) => reply.state !== "running").map((reply) => [reply.turn, reply]),
    );
    if (moved || !this.#turns.has(this.leaf ?? "")) this.leaf = tree.conversation.leaf;
    if (this.live?.over && this.live.id !== null && this.#turns.has(this.live.id)) this.live = null;
    if (this.running) return;
    const shown = new Set(this.path.map((turn) => turn.id));
    const open = tree.replies.find((reply) => reply.state === "running" && shown.has(reply.turn));
    if (open) {
      this.leaf = open.turn;
      const errand = { conversation: tree.conversation.id, turn: null, reply: open.id };
      this.#follow(new LiveReply(errand, open.turn, open.content));
    }
  }

  // -- what the user does

  /** Say something at the leaf. Raises Problem where a new conversation could not be made. */
  async say(content: string): Promise<void> {
    await this.#make();
    // After a message without an answer nothing can follow: this one takes its place.
    const last = this.path.at(-1);
    const parent = last?.role === "user" ? last.parent : this.leaf;
    this.#send(this.#turn({ content, parent }));
  }

  /** Say something else in the place of a turn: a branch. */
  edit(turn: Turn, content: string): void {
    this.#send(this.#turn({ content, parent: turn.parent }));
  }

  /** Answer a user's turn once more. */
  regenerate(turn: string): void {
    this.#send(this.#turn({ parent: turn }));
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

  turn(id: string): Turn | undefined {
    return this.#turns.get(id);
  }

  /** Show the newest branch through this turn. */
  async show(turn: string): Promise<void> {
    if (this.running) return;
    this.live = null;
    this.leaf = leafBelow(this.#children, turn);
    try {
      await this.change({ leaf: this.leaf });
    } catch (error) {
      this.problem = asProblem(error);
    }
  }

  /** Change what is kept with it. Of a new one it is kept here until it is made. Raises Problem. */
  async change(changes: api.Changes): Promise<void> {
    if (this.name !== null) {
      this.conversation = await api.change(this.name, changes);
      this.onChange();
    }
    if (changes.system !== undefined) this.system = changes.system;
    if (changes.settings !== undefined) this.settings = changes.settings;
  }

  /** Look away. */
  close(): void {
    this.live?.leave();
  }

  // -- turns

  async #make(): Promise<void> {
    if (this.name !== null) return;
    this.conversation = await api.create(this.system, this.settings);
    this.onMade(this.conversation);
  }

  #turn(what: Sending): Record<string, unknown> {
    const id = crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint32Array(4))).join("-");
    // Where a conversation begins there is no turn to name, and null would mean a branch.
    const { parent, ...rest } = what;
    return this.#turns.size === 0 ? { id, ...rest } : { id, parent, ...rest };
  }

  #send(body: Record<string, unknown>): void {
    if (this.running || this.name === null) return;
    const parent = (body.parent as string | null | undefined) ?? null;
    const content = body.content as string | undefined;
    this.problem = null;
    this.leaf = parent;
    this.#optimistic =
      content === undefined
        ? null
        : { id: String(body.id), parent, role: "user", content, created: 0, final: null };
    keepTurn(this.name, body);
    const errand = { conversation: this.name, turn: body, reply: null };
    this.#follow(new LiveReply(errand, content === undefined ? parent : null));
  }

  #follow(live: LiveReply): void {
    this.live = live;
    void this.#run(live);
  }

  async #run(live: LiveReply): Promise<void> {
    const outcome = await live.run((turn) => {
      keepTurn(live.conversation, null);
      const said = this.#optimistic;
      this.#optimistic = null;
      if (said !== null) this.#add({ ...said, id: turn, created: Date.now() / 1000 });
      this.leaf = turn;
      this.onChange();
    });
    if (outcome.kind === "left" && !live.stopping) return;
    if (live.id === null) keepTurn(live.conversation, null);
    if (outcome.kind === "done" && live.id !== null && live.turn !== null) {
      this.#add({
        id: live.id,
        parent: live.turn,
        role: "assistant",
        content: live.text,
        created: Date.now() / 1000,
        final: outcome.final,
      });
      if (this.leaf === live.turn) this.leaf = live.id;
      if (this.live === live) this.live = null;
    }
    if (outcome.kind === "ended") {
      if (this.live === live) this.live = null;
      await this.load();
    } else {
      // Its title comes with its first answer, and others may have said something meanwhile.
      if (!this.conversation?.title) this.#seen = Math.max(this.#seen, 1 + (this.conversation?.revision ?? 0));
      await this.#catchUp();
    }
    this.onChange();
  }

  #add(turn: Turn): void {
    this.#turns = new Map(this.#turns).set(turn.id, turn);
  }
}
