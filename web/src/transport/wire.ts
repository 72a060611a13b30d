// What the server says, as types, and the doors through which it comes in. It may not know
// connections. Shapes are those of docs/conversations.md; an imported turn's `final` may say
// anything, so nothing of it has to be there.

export interface Settings {
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  max_tokens?: number;
  seed?: number;
  stop?: string[];
}

export interface Conversation {
  id: string;
  title: string;
  system: string | null;
  settings: Settings;
  created: number; // seconds since 1970
  updated: number;
  revision: number;
  leaf: string | null;
}

export interface Turn {
  id: string;
  parent: string | null;
  role: "user" | "assistant";
  content: string;
  created: number;
  final: Final | null;
}

/** A reply without a turn: it runs, or it ended with a fault. turn: the one it answers. */
export interface OpenReply {
  id: string;
  turn: string;
  state: "running" | "done" | "failed" | "interrupted";
  created: number;
  content: string;
  message: string | null;
}

export interface Tree {
  conversation: Conversation;
  turns: Turn[];
  replies: OpenReply[];
}

export interface Receipt {
  device: number; // prompt tokens, as are the next three
  host: number;
  disk: number;
  computed: number;
  saved: number | null; // seconds
  leftOut: number; // turns
  miss: { position: number; reason: string } | null;
}

export interface Final {
  reason: string;
  promptTokens: number;
  completionTokens: number;
  receipt: Receipt | null;
  toFirstToken: number | null; // seconds
  total: number; // seconds
}

export interface Model {
  id: string;
  contextLength: number; // tokens
}

/** A user of the server. name: of his key. */
export interface Visitor {
  name: string;
  isAdmin: boolean;
}

type Fields = Record<string, unknown>;

export function fields(value: unknown): Fields {
  return typeof value === "object" && value !== null ? (value as Fields) : {};
}

function list(value: unknown): unknown[] {
  return Array.isArray(value) ? value : [];
}

const text = (value: unknown, other = ""): string => (typeof value === "string" ? value : other);
const count = (value: unknown): number => (typeof value === "number" ? value : 0);
const maybe = (value: unknown): number | null => (typeof value === "number" ? value : null);

export function conversationOf(value: unknown): Conversation {
  const from = fields(value);
  return {
    id: text(from.id),
    title: text(from.title),
    system: typeof from.system === "string" ? from.system : null,
    settings: fields(from.settings) as Settings,
    created: count(from.created),
    updated: count(from.updated),
    revision: count(from.revision),
    leaf: typeof from.leaf === "string" ? from.leaf : null,
  };
}

export function treeOf(value: unknown): Tree {
  const from = fields(value);
  return {
    conversation: conversationOf(from),
    turns: list(from.turns).map(turnOf),
    replies: list(from.replies).map(replyOf),
  };
}

function turnOf(value: unknown): Turn {
  const from = fields(value);
  return {
    id: text(from.id),
    parent: typeof from.parent === "string" ? from.parent : null,
    role: from.role === "assistant" ? "assistant" : "user",
    content: text(from.content),
    created: count(from.created),
    final: from.final === undefined || from.final === null ? null : finalOf(from.final),
  };
}

function replyOf(value: unknown): OpenReply {
  const from = fields(value);
  const state = text(from.state);
  return {
    id: text(from.id),
    turn: text(from.turn),
    state: state === "running" || state === "done" || state === "interrupted" ? state : "failed",
    created: count(from.created),
    content: text(from.content),
    message: text(fields(from.final).message) || null,
  };
}

export function finalOf(value: unknown): Final {
  const from = fields(value);
  const usage = fields(from.usage);
  const timings = fields(from.timings);
  return {
    reason: text(from.finish_reason),
    promptTokens: count(usage.prompt_tokens),
    completionTokens: count(usage.completion_tokens),
    receipt: from.receipt === undefined ? null : receiptOf(from.receipt),
    toFirstToken: maybe(timings.to_first_token),
    total: count(timings.total),
  };
}

function receiptOf(value: unknown): Receipt {
  const from = fields(value);
  const miss = fields(from.miss);
  return {
    device: count(from.device),
    host: count(from.host),
    disk: count(from.disk),
    computed: count(from.computed),
    saved: maybe(from.saved),
    leftOut: count(from.left_out),
    miss:
      typeof miss.reason === "string"
        ? { position: count(miss.position), reason: miss.reason }
        : null,
  };
}

export function modelOf(value: unknown): Model | null {
  const [first] = list(fields(value).data);
  const from = fields(first);
  return typeof from.id === "string"
    ? { id: from.id, contextLength: count(from.max_model_len) }
    : null;
}

export function visitorOf(value: unknown): Visitor | null {
  const { name, role } = fields(value);
  return typeof name === "string" ? { name, isAdmin: role === "admin" } : null;
}

export function pageOf(value: unknown): { conversations: Conversation[]; next: string | null } {
  const from = fields(value);
  return {
    conversations: list(from.conversations).map(conversationOf),
    next: typeof from.next === "string" ? from.next : null,
  };
}
