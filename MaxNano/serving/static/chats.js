// Chats: trees of messages, and their place in the browser's storage.
//
//   chat       {id, title, isNamed, updated, messages, last}; `isNamed` if the visitor chose the title
//   question   {role: "user", parent, text, files: [{name, text}]}
//   answer     {role: "assistant", parent, parts: [{type, text}], finish, error, stats, used, dropped}
//
// `parent` is the index of the message before, -1 for a first message; messages of one parent are its branches. `last`
// is the index of the last message that is shown. Older chats have neither: each message follows the one before it.

import { read, write } from "./storage.js";

const PREFIX = "maxnano.chat.";
const UNTITLED = "New chat";
const TITLE_CHARACTERS = 80;

export const makeId = () => crypto.randomUUID?.() ?? String(Math.random()).slice(2);
export const newChat = () => ({ id: makeId(), title: UNTITLED, updated: Date.now(), messages: [], last: -1 });

const areTexts = (values, name) =>
  Array.isArray(values) && values.every((value) => typeof value?.[name] === "string" && typeof value.text === "string");
const isMessage = (value) =>
  (value?.role === "user" && typeof value.text === "string" && (value.files === undefined || areTexts(value.files, "name"))) ||
  (value?.role === "assistant" && areTexts(value.parts, "type"));

/** A chat of the storage or of a file with all its fields, or null if the value is no chat. */
export function toChat(value) {
  if (typeof value?.id !== "string" || !Array.isArray(value.messages) || !value.messages.every(isMessage)) return null;
  value.messages.forEach((message, index) => {
    const { parent } = message;
    if (!Number.isInteger(parent) || parent < -1 || parent >= index) message.parent = index - 1;
  });
  const count = value.messages.length;
  if (!Number.isInteger(value.last) || value.last < 0 || value.last >= count) value.last = count - 1;
  if (typeof value.title !== "string" || !value.title) value.title = UNTITLED;
  if (!Number.isFinite(value.updated)) value.updated = Date.now();
  return value;
}

// ---- Storage -------------------------------------------------------------------------------------

export const isChatKey = (key) => key.startsWith(PREFIX);
export const idOfKey = (key) => key.slice(PREFIX.length);
export const loadChat = (id) => toChat(read(PREFIX + id));
export const isSaved = (chat) => localStorage.getItem(PREFIX + chat.id) !== null;
export const saveChat = (chat) => write(PREFIX + chat.id, chat);
export const deleteChat = (chat) => localStorage.removeItem(PREFIX + chat.id);

export function loadChats() {
  return Object.keys(localStorage)
    .filter(isChatKey)
    .map((key) => loadChat(idOfKey(key)))
    .filter(Boolean);
}

/** The chats, newest first. */
export const sorted = (chats) => chats.toSorted((a, b) => b.updated - a.updated);

// ---- Messages and branches -----------------------------------------------------------------------

/** The indices of the messages that are shown, first to last. */
export function pathOf(chat) {
  const path = [];
  for (let index = chat.last; index >= 0; index = chat.messages[index].parent) path.unshift(index);
  return path;
}

/** The indices of a message and of the other messages with its parent. */
export function branchesOf(chat, index) {
  const { parent } = chat.messages[index];
  return [...chat.messages.keys()].filter((other) => chat.messages[other].parent === parent);
}

/** Add a message after `parent`, show it, and return its index. */
export function addMessage(chat, parent, message) {
  chat.messages.push({ ...message, parent });
  chat.last = chat.messages.length - 1;
  return chat.last;
}

/** Show a message with its newest continuation. */
export function showBranch(chat, index) {
  for (let next = index; next >= 0; next = chat.messages.findLastIndex((message) => message.parent === next)) chat.last = next;
}

export const textOf = (message) => (message.role === "user" ? message.text : message.parts.map((part) => part.text).join(""));

/** Name a chat after its first message, unless the visitor has named it. */
export function nameAfter(chat, { text, files = [] }) {
  if (!chat.isNamed) chat.title = (text.trim() || files[0]?.name || UNTITLED).split("\n")[0].slice(0, TITLE_CHARACTERS);
}

// ---- Search --------------------------------------------------------------------------------------

const BEFORE_CHARACTERS = 12;
const AFTER_CHARACTERS = 60;

/** [{chat, index, before, match, after}] of the chats that contain `query`; index -1 is the title. */
export function search(chats, query) {
  const wanted = query.trim().toLowerCase();
  const hits = [];
  for (const chat of sorted(chats)) {
    const shown = new Set(pathOf(chat));
    // The branch that is shown comes first.
    const indices = [...chat.messages.keys()].sort((a, b) => shown.has(b) - shown.has(a) || a - b);
    const index = indices.find((each) => textOf(chat.messages[each]).toLowerCase().includes(wanted)) ?? -1;
    if (index >= 0) hits.push({ chat, index, ...excerpt(textOf(chat.messages[index]), wanted) });
    else if (chat.title.toLowerCase().includes(wanted)) hits.push({ chat, index });
  }
  return hits;
}

function excerpt(text, wanted) {
  const start = text.toLowerCase().indexOf(wanted);
  const end = start + wanted.length;
  const from = Math.max(0, start - BEFORE_CHARACTERS);
  return {
    before: (from ? "…" : "") + text.slice(from, start),
    match: text.slice(start, end),
    after: text.slice(end, end + AFTER_CHARACTERS),
  };
}
