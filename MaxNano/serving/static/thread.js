// The messages of the open chat, as they grow.

import { branchesOf, pathOf, saveChat, showBranch, textOf } from "./chats.js";
import { $, copy, patch } from "./dom.js";
import { bodyOf, messageNode, showEditor } from "./messages.js";
import { answer, say, streamOf } from "./replies.js";
import { emit, on, state } from "./state.js";

const NEAR_END_PIXELS = 60;

const scroller = $("scroller");
const thread = $("thread");

const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PIXELS;

export function scrollToEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

const nodeOf = (index) => thread.querySelector(`:scope > [data-index="${index}"]`);

/** Scroll to message `index`, which is shown. */
export function scrollToMessage(index) {
  nodeOf(index)?.scrollIntoView({ block: "center" });
}

function showThread() {
  const { chat } = state;
  const follows = isAtEnd();
  patch(thread, pathOf(chat).map((index) => messageNode(chat, index)));
  $("log").setAttribute("aria-busy", String(Boolean(streamOf(chat))));
  $("welcome").hidden = chat.messages.length > 0;
  $("title").textContent = chat.title;
  document.title = chat.messages.length ? `${chat.title} · MaxNano` : "MaxNano";
  if (follows) scrollToEnd();
}

let frame = 0;

/** Show the new text of a reply, at most once per frame. */
function showReply(stream) {
  if (stream.chat !== state.chat || frame) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    const node = nodeOf(stream.index);
    if (!node || streamOf(state.chat) !== stream) return;
    const follows = isAtEnd();
    const isCounting = Boolean(stream.retryAt || node.querySelector(".countdown"));
    if (isCounting) patch(thread, pathOf(state.chat).map((index) => messageNode(state.chat, index)));
    else patch(node.querySelector(".bubble"), [...bodyOf(stream.chat.messages[stream.index].parts).childNodes]);
    if (follows) scrollToEnd();
  });
}

// ---- Buttons of messages -------------------------------------------------------------------------

const ACTIONS = {
  edit: (chat, index) => editMessage(index),
  copy: (chat, index) => copy(textOf(chat.messages[index])),
  again: (chat, index) => answerNow(chat, chat.messages[index].parent),
  answer: (chat, index) => answerNow(chat, index),
  retry: (chat) => streamOf(chat)?.retry?.(),
  previous: (chat, index) => turnTo(chat, index, -1),
  next: (chat, index) => turnTo(chat, index, 1),
};

function answerNow(chat, parent) {
  answer(chat, parent);
  scrollToEnd();
}

/** Show the branch before or after that of message `index`; after the last comes the first. */
function turnTo(chat, index, step) {
  const branches = branchesOf(chat, index);
  showBranch(chat, branches.at((branches.indexOf(index) + step) % branches.length));
  saveChat(chat);
  emit("chat", chat);
}

/** Edit the visitor's message `index`. What it becomes is a branch beside it. */
export function editMessage(index) {
  const { chat } = state;
  const { parent, files, text } = chat.messages[index];
  if (streamOf(chat)) return;
  const submit = (changed) => {
    say(chat, parent, { text: changed, ...(files && { files }) });
    scrollToEnd();
  };
  const cancel = () => {
    showThread();
    $("input").focus();
  };
  showEditor(nodeOf(index), text, submit, cancel);
}

thread.addEventListener("click", (event) => {
  const target = event.target.closest("button");
  if (target?.dataset.copy !== undefined) copy(target.dataset.copy);
  else if (target?.dataset.action) ACTIONS[target.dataset.action](state.chat, Number(target.closest("li[data-index]").dataset.index));
});
scroller.addEventListener("scroll", () => ($("to-end").hidden = isAtEnd() || !state.chat.messages.length));
$("to-end").addEventListener("click", scrollToEnd);

on("open", () => {
  thread.replaceChildren();
  showThread();
  scrollToEnd();
});
on("chat", (chat) => chat === state.chat && showThread());
on("reply", showReply);
