// The chat page: starts its modules, and handles keys and other tabs.

import { idOfKey, isChatKey, loadChat, loadChats, newChat, sorted } from "./chats.js";
import { sendText } from "./composer.js";
import { $, element, icon } from "./dom.js";
import { loadModels } from "./models.js";
import { saveReplies, stop, streamOf } from "./replies.js";
import { setTheme } from "./settings.js";
import { isSidebarOver, openNeighbor, showSidebar } from "./sidebar.js";
import { emit, openChat, state } from "./state.js";

const EXAMPLES = ["Why is the sky blue?", "What is 37 × 43 + 12?", "Write a haiku about the sea.", "How do I boil an egg?"];

document.addEventListener("keydown", (event) => {
  const isTyping = /^(TEXTAREA|INPUT|SELECT)$/.test(document.activeElement?.tagName);
  const isOver = Boolean(document.querySelector("dialog[open], :popover-open"));
  const hasControl = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (isOver) return;
  if (hasControl && event.shiftKey && key === "o") {
    event.preventDefault();
    openChat(newChat());
  } else if (hasControl && !event.shiftKey && key === "k") {
    event.preventDefault();
    showSidebar(true);
    $("search").focus();
  } else if (event.altKey && (key === "arrowup" || key === "arrowdown")) {
    event.preventDefault();
    openNeighbor(key === "arrowup" ? -1 : 1);
  } else if (key === "escape") {
    if (isSidebarOver()) showSidebar(false);
    else stop(state.chat);
  } else if (key === "/" && !isTyping) {
    event.preventDefault();
    $("input").focus();
  }
});

// Another tab changed the storage. A reply that grows in this tab stays as it is here.
window.addEventListener("storage", (event) => {
  if (event.key === null) state.chats = loadChats();
  else if (isChatKey(event.key)) loadAgain(idOfKey(event.key));
  else return;
  const chat = state.chats.find(({ id }) => id === state.chat.id);
  if (!chat && state.chat.messages.length) return openChat(newChat());
  state.chat = chat ?? state.chat;
  emit("chat", state.chat);
});

function loadAgain(id) {
  const changed = loadChat(id);
  const current = state.chats.find((chat) => chat.id === id);
  if (current && streamOf(current)) {
    if (!changed) stop(current);
    return;
  }
  state.chats = state.chats.filter((chat) => chat.id !== id);
  if (changed) state.chats.push(changed);
}

window.addEventListener("pagehide", saveReplies);

for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
$("examples").append(...EXAMPLES.map((text) => element("button", { type: "button", textContent: text, onclick: () => sendText(text) })));
setTheme();
openChat(sorted(state.chats)[0] ?? state.chat);
loadModels();
