// The sidebar: the list of chats, search, and the menu of a chat.

import { newChat, saveChat, search, showBranch, sorted } from "./chats.js";
import { $, button, element, focusInput, patch, toast } from "./dom.js";
import { stop, streamOf } from "./replies.js";
import { discard, emit, on, openChat, saveSettings, state } from "./state.js";
import { scrollToMessage } from "./thread.js";
import { exportJson, exportMarkdown } from "./transfer.js";

const isNarrow = matchMedia("(max-width: 760px)");

/** Show or hide the sidebar: over the page on a narrow screen, beside it on a wide screen. */
export function showSidebar(isShown) {
  if (!isNarrow.matches) {
    state.settings.isSidebarHidden = !isShown;
    saveSettings();
  }
  placeSidebar(isNarrow.matches && isShown);
  (isShown ? $("close-sidebar") : $("open-sidebar")).focus();
}

export const isSidebarOver = () => $("sidebar").classList.contains("over");

function placeSidebar(isOver) {
  $("sidebar").classList.toggle("over", isOver);
  $("scrim").hidden = !isOver;
  document.body.classList.toggle("no-sidebar", Boolean(state.settings.isSidebarHidden));
  $("open-sidebar").setAttribute("aria-expanded", String(isOver));
}

// ---- The list ------------------------------------------------------------------------------------

function showList() {
  const query = $("search").value.trim();
  const hits = query ? search(state.chats, query) : sorted(state.chats).map((chat) => ({ chat, index: -1 }));
  patch($("conversations"), hits.map(hitNode));
  $("search-result").textContent = query ? `${hits.length} chat${hits.length === 1 ? "" : "s"} found` : "";
}

function hitNode({ chat, index, before, match, after }) {
  const open = element("button", { type: "button", className: "open" }, element("span", { textContent: chat.title }));
  open.dataset.action = "open";
  if (match) open.append(element("small", {}, before, element("mark", { textContent: match }), after));
  if (streamOf(chat)) open.append(element("i", { className: "dot", role: "img", ariaLabel: "replying", title: "Replying" }));
  if (chat === state.chat) open.setAttribute("aria-current", "true");
  const node = element("li", {}, open, button("dots", `Options of “${chat.title}”`, "menu", { className: "quiet options" }));
  node.dataset.id = chat.id;
  node.dataset.index = index;
  return node;
}

const chatOf = (node) => state.chats.find((chat) => chat.id === node.dataset.id);

function openHit(chat, index) {
  if (index >= 0 && chat.messages[index]) {
    showBranch(chat, index);
    saveChat(chat);
  }
  openChat(chat);
  if (index >= 0) scrollToMessage(index);
}

export function openNeighbor(step) {
  const chats = sorted(state.chats);
  const next = chats[chats.indexOf(state.chat) + step];
  if (next) openChat(next);
}

// ---- The menu of a chat --------------------------------------------------------------------------

let menuChat = null;

/** Show the menu of a chat below (or above) its button. */
function showMenu(chat, opener) {
  const menu = $("chat-menu");
  menuChat = chat;
  menu.showPopover();
  const { bottom, top, right } = opener.getBoundingClientRect();
  const below = bottom + 4;
  const fits = below + menu.offsetHeight < innerHeight;
  menu.style.top = `${fits ? below : Math.max(8, top - menu.offsetHeight - 4)}px`;
  menu.style.left = `${Math.max(8, Math.min(right - 40, innerWidth - menu.offsetWidth - 8))}px`;
  menu.querySelector("button").focus();
}

const MENU = {
  rename: (chat) => {
    $("rename-title").value = chat.title;
    $("rename").showModal();
    $("rename-title").select();
  },
  markdown: exportMarkdown,
  json: (chat) => exportJson([chat]),
  delete: (chat) => {
    stop(chat);
    discard([chat]);
    toast("Chat deleted", () => {
      state.chats.push(chat);
      saveChat(chat);
      openChat(chat);
    });
  },
};

function rename(chat, title) {
  if (!title.trim()) return;
  chat.title = title.trim();
  chat.isNamed = true;
  if (state.chats.includes(chat)) saveChat(chat);
  emit("chat", chat);
}

// ---- Events --------------------------------------------------------------------------------------

$("conversations").addEventListener("click", (event) => {
  const target = event.target.closest("button");
  const node = target?.closest("li");
  if (target?.dataset.action === "open") openHit(chatOf(node), Number(node.dataset.index));
  else if (target?.dataset.action === "menu") showMenu(chatOf(node), target);
});
$("chat-options").addEventListener("click", () => showMenu(state.chat, $("chat-options")));
$("chat-menu").addEventListener("click", (event) => {
  const { action } = event.target.closest("button")?.dataset ?? {};
  if (!action) return;
  $("chat-menu").hidePopover();
  MENU[action](menuChat);
});
$("rename").addEventListener("close", () => {
  if ($("rename").returnValue === "save") rename(menuChat, $("rename-title").value);
  $("rename").returnValue = "";
});
$("rename-cancel").addEventListener("click", () => $("rename").close());
$("search").addEventListener("input", showList);
$("new-chat").addEventListener("click", () => openChat(newChat()));
$("open-sidebar").addEventListener("click", () => showSidebar(true));
$("close-sidebar").addEventListener("click", () => showSidebar(false));
$("scrim").addEventListener("click", () => showSidebar(false));
isNarrow.addEventListener("change", () => placeSidebar(false));

on("open", () => {
  placeSidebar(false);
  showList();
  $("chat-options").hidden = !state.chat.messages.length;
  focusInput();
});
on("chat", () => {
  showList();
  $("chat-options").hidden = !state.chat.messages.length;
});
