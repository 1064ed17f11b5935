// What the modules of the page share: the chats, the open chat, the models and the settings. Who changes
// them emits an event; who shows them listens:
//
//   open (chat)      another chat is open
//   chat (chat)      messages or title of a chat changed, or its reply began or ended
//   reply (stream)   a reply grew
//   models ()        the models were loaded, or another was chosen
//   settings ()      a setting changed

import { deleteChat, loadChats, newChat, saveChat } from "./chats.js";
import { read, write } from "./storage.js";

const SETTINGS = "maxnano.settings";

export const state = {
  chats: loadChats(),
  chat: newChat(),
  models: [],
  model: { id: "", chat: true, defaults: { temperature: 0.6, top_k: 50, max_tokens: 512 } },
  settings: { system: "", key: "", theme: "auto", model: "", isSidebarHidden: false, ...read(SETTINGS) },
};

const listeners = {};

export const on = (name, listener) => (listeners[name] ??= []).push(listener);
export const emit = (name, detail) => listeners[name]?.forEach((listener) => listener(detail));

export const setting = (name) => state.settings[name] ?? state.model.defaults[name];
export const saveSettings = () => write(SETTINGS, state.settings);

/** Save a chat, as the newest. */
export function save(chat) {
  chat.updated = Date.now();
  if (!state.chats.includes(chat)) state.chats.push(chat);
  saveChat(chat);
}

export function openChat(chat) {
  state.chat = chat;
  emit("open", chat);
}

/** Delete chats of this page and of the storage. */
export function discard(chats) {
  chats.forEach(deleteChat);
  state.chats = state.chats.filter((chat) => !chats.includes(chat));
  if (chats.includes(state.chat)) openChat(newChat());
  else emit("chat", state.chat);
}
