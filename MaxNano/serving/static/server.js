// Requests to the server of the page.

import { state } from "./state.js";

const BUSY = [429, 503];
const RETRY_SECONDS = 5; // if the server does not say when to try again

export class ServerError extends Error {
  /** retrySeconds: when to try again; null for an error that stays. */
  constructor(status, error, retrySeconds = null) {
    super(error?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = error?.code;
    this.retrySeconds = retrySeconds;
  }
}

/** The response of the server. Throws ServerError if its status is not 200. */
export async function ask(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (state.settings.key) headers.authorization = `Bearer ${state.settings.key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ServerError(response.status, body?.error, retrySeconds(response));
}

function retrySeconds(response) {
  const header = response.headers.get("retry-after");
  if (response.status !== 429 && !(BUSY.includes(response.status) && header)) return null;
  return Math.max(1, Number(header) || RETRY_SECONDS);
}

export const post = (path, body, signal) => ask(path, { method: "POST", body: JSON.stringify(body), signal });

/** The JSON objects of a stream of server-sent events, until [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost.");
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split("\n");
      const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** An error in words for the visitor. */
export function explain(error) {
  if (error.status === 401) return "The server requires an API key: enter it in Settings.";
  if (error instanceof TypeError) return "Could not reach the server.";
  return error.message;
}
