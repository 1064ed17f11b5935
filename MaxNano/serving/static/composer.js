// The box where the visitor writes, with text files that are attached. Each chat keeps its draft.

import { pathOf } from "./chats.js";
import { $, button, element, focusInput, icon, toast } from "./dom.js";
import { isSend } from "./messages.js";
import { say, stop, streamOf } from "./replies.js";
import { post } from "./server.js";
import { on, state } from "./state.js";
import { editMessage, scrollToEnd } from "./thread.js";

const MAX_FILE_BYTES = 512 << 10; // the server takes 1 MiB
const UNSAVED = "new";

const input = $("input");
let files = []; // [{name, text, tokens}], tokens null while unknown
let shownKey = UNSAVED;
const drafts = new Map(); // {text, files} by chat id

const keyOf = (chat) => (state.chats.includes(chat) ? chat.id : UNSAVED);

/** Fit the box to its text, and show what can be done. */
function showComposer() {
  const isStreaming = Boolean(streamOf(state.chat));
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  $("send").hidden = isStreaming;
  $("stop").hidden = !isStreaming;
  $("send").disabled = !input.value.trim() && !files.length;
  $("attachments").replaceChildren(...files.map(fileNode));
}

function fileNode(file, index) {
  const limit = state.model.max_model_len ?? Infinity;
  const size = file.tokens === null ? `${Math.ceil(file.text.length / 1000)} kB` : `${file.tokens.toLocaleString("en")} tokens`;
  const isTooLarge = file.tokens > limit;
  const note = isTooLarge ? `${size}, more than the context of ${limit.toLocaleString("en")}` : size;
  const node = element("li", { className: isTooLarge ? "too-large" : "" }, icon("file"));
  node.append(element("span", { textContent: file.name }), element("small", { textContent: note }));
  const remove = button("close", `Remove ${file.name}`, "remove");
  remove.dataset.index = index;
  node.append(remove);
  return node;
}

// ---- Files ---------------------------------------------------------------------------------------

async function attach(list) {
  for (const file of list) {
    try {
      const added = { name: file.name, text: await readText(file), tokens: null };
      files.push(added);
      countTokens(added);
    } catch (error) {
      toast(error.message);
    }
  }
  showComposer();
  input.focus();
}

/** The text of a file. Throws Error if it is too large or not UTF-8. */
async function readText(file) {
  if (file.size > MAX_FILE_BYTES) throw new Error(`${file.name} is larger than ${MAX_FILE_BYTES >> 10} KiB.`);
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return text;
  } catch {
    // not UTF-8, or a folder
  }
  throw new Error(`${file.name} is not a text file.`);
}

async function countTokens(file) {
  try {
    const { count } = await (await post("/tokenize", { model: state.model.id || undefined, prompt: file.text })).json();
    file.tokens = count;
    showComposer();
  } catch {
    // The size in kB stays.
  }
}

// ---- Events --------------------------------------------------------------------------------------

function send() {
  const { chat } = state;
  if (streamOf(chat) || (!input.value.trim() && !files.length)) return;
  const attached = files.map(({ name, text }) => ({ name, text }));
  const message = { text: input.value, ...(attached.length && { files: attached }) };
  input.value = "";
  files = [];
  drafts.delete(keyOf(chat));
  say(chat, chat.last, message);
  shownKey = keyOf(chat);
  scrollToEnd();
}

/** Send a text that is not written in the box. */
export function sendText(text) {
  say(state.chat, state.chat.last, { text });
  shownKey = keyOf(state.chat);
}

input.addEventListener("input", showComposer);
input.addEventListener("keydown", (event) => {
  if (isSend(event)) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !input.value && !event.altKey) {
    const index = pathOf(state.chat).findLast((each) => state.chat.messages[each].role === "user");
    if (index === undefined) return;
    event.preventDefault();
    editMessage(index);
  }
});
input.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  attach(event.clipboardData.files);
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => {
  stop(state.chat);
  focusInput();
});
$("attach").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  attach([...$("files").files]);
  $("files").value = "";
});
$("attachments").addEventListener("click", (event) => {
  const target = event.target.closest("button");
  if (!target) return;
  files.splice(Number(target.dataset.index), 1);
  showComposer();
  input.focus();
});
document.addEventListener("dragover", (event) => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  attach([...event.dataTransfer.files]);
});

on("open", (chat) => {
  drafts.set(shownKey, { text: input.value, files });
  shownKey = keyOf(chat);
  const draft = drafts.get(shownKey);
  input.value = draft?.text ?? "";
  files = draft?.files ?? [];
  showComposer();
});
on("chat", showComposer);
on("models", showComposer);
