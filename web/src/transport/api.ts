// The server's routes that are asked and answered in one piece. Every call raises Problem.

import { asProblem, Problem, problemOf, UNREACHABLE } from "./problem";
import {
  conversationOf,
  modelOf,
  pageOf,
  treeOf,
  visitorOf,
  type Conversation,
  type Model,
  type Settings,
  type Tree,
  type Visitor,
} from "./wire";

const CALL_SECONDS_MAX = 30;

export interface Changes {
  title?: string;
  system?: string | null;
  settings?: Settings;
  leaf?: string;
}

/** What a conversation begins with. title null: the server gives it one with its first answer. */
export interface Begun {
  title: string | null;
  system: string | null;
  settings: Settings;
}

let signIn: (problem: Problem) => void = () => undefined;

/** Who is told when the server wants a key. */
export function onUnauthorized(tell: (problem: Problem) => void): void {
  signIn = tell;
}

/** fetch, whose refusals are Problems. body: becomes JSON. */
export async function request(
  method: string,
  path: string,
  body?: unknown,
  options: RequestInit = {},
): Promise<Response> {
  const headers = new Headers(options.headers);
  if (body !== undefined) headers.set("Content-Type", "application/json");
  const init: RequestInit = { ...options, method, headers };
  if (body !== undefined) init.body = typeof body === "string" ? body : JSON.stringify(body);
  let response: Response;
  try {
    response = await fetch(path, init);
  } catch {
    throw new Problem(UNREACHABLE);
  }
  if (response.ok) return response;
  const problem = await problemOf(response);
  if (problem.status === 401 && path !== "/api/session") signIn(problem);
  throw problem;
}

/** What the server answers, as JSON; null: nothing. */
export async function call(
  method: string,
  path: string,
  body?: unknown,
  until?: AbortSignal,
): Promise<unknown> {
  const patience = AbortSignal.timeout(CALL_SECONDS_MAX * 1000);
  const signal = until ? AbortSignal.any([patience, until]) : patience;
  const response = await request(method, path, body, { signal });
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch (error) {
    throw asProblem(error);
  }
}

const at = (id: string, rest = ""): string => `/api/conversations/${encodeURIComponent(id)}${rest}`;

export async function model(): Promise<Model> {
  const found = modelOf(await call("GET", "/v1/models"));
  if (found === null) throw new Problem("The server names no model.", 500);
  return found;
}

export async function list(
  search: string,
  after: string | null,
  limit: number,
): Promise<{ conversations: Conversation[]; next: string | null }> {
  const query = new URLSearchParams({ limit: String(limit) });
  if (search) query.set("search", search);
  if (after !== null) query.set("after", after);
  return pageOf(await call("GET", `/api/conversations?${query}`));
}

/** id: the client's, so that asking again is safe. */
export async function create(id: string, what: Begun, until: AbortSignal): Promise<Conversation> {
  return conversationOf(await call("POST", "/api/conversations", { id, ...what }, until));
}

export async function open(id: string, until: AbortSignal): Promise<Tree> {
  return treeOf(await call("GET", at(id), undefined, until));
}

export async function change(
  id: string,
  changes: Changes,
  until?: AbortSignal,
): Promise<Conversation> {
  return conversationOf(await call("PATCH", at(id), changes, until));
}

export async function remove(id: string): Promise<void> {
  await call("DELETE", at(id));
}

/** The exported file's text. */
export async function exported(id: string): Promise<string> {
  return (await request("GET", at(id, "/export"))).text();
}

/** file: the text of an exported file, which the server checks. */
export async function imported(file: string): Promise<Conversation> {
  const response = await request("POST", "/api/conversations/import", file);
  return conversationOf(await response.json());
}

export async function stop(reply: string): Promise<void> {
  await call("DELETE", `/api/replies/${encodeURIComponent(reply)}`);
}

/** Who is signed in now. */
export async function signInWith(key: string): Promise<Visitor> {
  const visitor = visitorOf(await call("POST", "/api/session", { key }));
  if (visitor === null) throw new Problem("The server knows nobody of this key.", 500);
  return visitor;
}

/** Who we are to the server; null: nobody, so that whatever else is asked needs a key first. */
export async function visitor(): Promise<Visitor | null> {
  return visitorOf(await call("GET", "/api/session"));
}

export async function signOut(): Promise<void> {
  await call("DELETE", "/api/session");
}
