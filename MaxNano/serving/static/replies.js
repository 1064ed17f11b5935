// Replies: requested, streamed into the chat, and tried again while the server is busy.

import { addMessage, isSaved, nameAfter, pathOf, saveChat } from "./chats.js";
import { ServerError, events, explain, post } from "./server.js";
import { emit, save, setting, state } from "./state.js";

const MAX_TRIES = 30; // while the server is busy
const SAVE_MILLISECONDS = 1000;

// By chat id: {chat, index, controller, retryAt, retry}. While the server is busy, `retryAt` is the time of the next
// try and retry() makes it at once.
const streams = new Map();

export const streamOf = (chat) => streams.get(chat.id);
export const stop = (chat) => streamOf(chat)?.controller.abort();

/** Add the visitor's message after `parent`, and answer it. */
export function say(chat, parent, message) {
  if (streamOf(chat)) return;
  if (parent < 0) nameAfter(chat, message);
  answer(chat, addMessage(chat, parent, { role: "user", ...message }));
}

/** Generate a new answer to the message `parent`; earlier answers stay as its branches. */
export async function answer(chat, parent) {
  if (streamOf(chat)) return;
  const index = addMessage(chat, parent, { role: "assistant", parts: [] });
  const stream = { chat, index, controller: new AbortController(), retryAt: 0, retry: null };
  const message = chat.messages[index];
  streams.set(chat.id, stream);
  save(chat);
  emit("chat", chat);
  try {
    const { response, dropped } = await requestReply(stream);
    if (dropped) {
      message.dropped = dropped;
      emit("chat", chat);
    }
    await readReply(stream, response);
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = explain(error);
  }
  streams.delete(chat.id);
  saveReply(chat);
  emit("chat", chat);
}

/** Save a chat with its reply so far, unless the chat was deleted in the meantime. */
function saveReply(chat) {
  if (isSaved(chat)) saveChat(chat);
}

/** Save all replies so far, before the page closes. */
export function saveReplies() {
  for (const { chat } of streams.values()) saveReply(chat);
}

// ---- The request ---------------------------------------------------------------------------------

/** {response, dropped}: the number of messages that were left out because the context is full. */
async function requestReply(stream) {
  for (let tries = 1; ; tries++) {
    try {
      return await requestFitting(stream);
    } catch (error) {
      if (!error.retrySeconds || tries === MAX_TRIES) throw error;
      await waitForServer(stream, error.retrySeconds);
    }
  }
}

/** Request the reply to as many messages as fit into the context. */
async function requestFitting({ chat, index, controller: { signal } }) {
  const messages = pathOf({ ...chat, last: chat.messages[index].parent }).map((each) => chat.messages[each]);
  const limit = state.model.max_model_len ?? Infinity;
  const maxTokens = Math.min(setting("max_tokens"), Math.floor(limit / 2));
  for (let dropped = await countDropped(messages, limit - maxTokens, signal); ; dropped += 2) {
    const body = {
      model: state.model.id || undefined,
      messages: contentsOf(messages.slice(dropped)),
      temperature: setting("temperature"),
      top_k: setting("top_k"),
      max_tokens: maxTokens,
      stream: true,
      stream_options: { include_usage: true },
    };
    try {
      return { response: await post("/v1/chat/completions", body, signal), dropped };
    } catch (error) {
      if (error.code !== "context_length_exceeded" || dropped + 2 >= messages.length) throw error;
    }
  }
}

/** The least number of messages, in turns of two, without which the prompt has at most `limit` tokens. */
async function countDropped(messages, limit, signal) {
  let [low, high] = [0, Math.ceil(messages.length / 2) - 1];
  for (let turns = 0; low < high; turns = (low + high) >> 1) {
    if (await fits(messages.slice(2 * turns), limit, signal)) high = turns;
    else low = turns + 1;
  }
  return 2 * low;
}

/** Whether messages have at most `limit` tokens; true if the server does not say. */
async function fits(messages, limit, signal) {
  const body = { model: state.model.id || undefined, messages: contentsOf(messages) };
  try {
    return (await (await post("/tokenize", body, signal)).json()).count <= limit;
  } catch (error) {
    if (error instanceof ServerError) return true;
    throw error;
  }
}

/** Messages as the API takes them, after the system message. */
function contentsOf(messages) {
  const system = state.settings.system.trim();
  const sent = messages.map((message) =>
    message.role === "user"
      ? { role: "user", content: questionOf(message) }
      : { role: "assistant", content: contentOf(message.parts) },
  );
  return system ? [{ role: "system", content: system }, ...sent] : sent;
}

const contentOf = (parts) =>
  parts.every((part) => part.type === "text") ? parts.map((part) => part.text).join("") : parts;

/** A message with its files as fenced blocks, which no line of a file ends. */
export function questionOf({ text, files = [] }) {
  const blocks = files.map((file) => {
    const ticks = Math.max(2, ...(file.text.match(/`+/g) ?? []).map((run) => run.length));
    const fence = "`".repeat(ticks + 1);
    return `${file.name}:\n${fence}\n${file.text.replace(/\n$/, "")}\n${fence}`;
  });
  return [text, ...blocks].filter((piece) => piece.trim()).join("\n\n");
}

/** Wait, and show the seconds that are left. Throws AbortError if the visitor stops. */
async function waitForServer(stream, seconds) {
  const { signal } = stream.controller;
  stream.retryAt = Date.now() + seconds * 1000;
  const timer = setInterval(() => {
    if (Date.now() >= stream.retryAt) stream.retry();
    else emit("reply", stream);
  }, 250);
  try {
    await new Promise((resolve, reject) => {
      stream.retry = resolve;
      signal.addEventListener("abort", () => reject(signal.reason));
      emit("reply", stream);
    });
  } finally {
    clearInterval(timer);
    stream.retryAt = 0;
    emit("reply", stream);
  }
}

// ---- The reply -----------------------------------------------------------------------------------

async function readReply(stream, response) {
  const message = stream.chat.messages[stream.index];
  const started = performance.now();
  let saved = started;
  try {
    for await (const chunk of events(response)) {
      if (chunk.error) throw new ServerError(response.status, chunk.error);
      const choice = chunk.choices[0];
      if (choice?.delta) append(message.parts, choice.delta);
      if (choice?.finish_reason) message.finish = choice.finish_reason;
      if (chunk.usage) setUsage(message, chunk.usage, (performance.now() - started) / 1000);
      if (performance.now() - saved > SAVE_MILLISECONDS) {
        saveReply(stream.chat);
        saved = performance.now();
      }
      emit("reply", stream);
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Error("The connection was lost.");
    throw error;
  }
}

function append(parts, delta) {
  for (const part of delta.parts ?? (delta.content ? [{ type: "text", text: delta.content }] : [])) {
    const last = parts.at(-1);
    if (last?.type === part.type) last.text += part.text;
    else parts.push({ type: part.type, text: part.text });
  }
}

function setUsage(message, { prompt_tokens: prompt, completion_tokens: completion }, seconds) {
  message.stats = `${completion} tokens · ${(completion / seconds).toFixed(0)}/s`;
  message.used = prompt + completion;
}
