// The chat page: conversations in the browser's storage, replies streamed from the server of the page.

import { element, insertMark, render, withoutMarks } from "./markdown.js";

const $ = (id) => document.getElementById(id);

const ICONS = {
  plus: "M12 5v14M5 12h14",
  sliders: "M4 7h9M19 7h1M4 17h3M13 17h7M16 4.5v5M10 14.5v5",
  menu: "M4 7h16M4 12h16M4 17h16",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  down: "M12 5v14M6 13l6 6 6-6",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  edit: "M5 19h3L19 8l-3-3L5 16zM14 7l3 3",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  again: "M20 5v5h-5M20 10a8 8 0 1 0 .5 4",
  calculator: "M6 3h12v18H6zM9 7h6M9 12h.01M12 12h.01M15 12h.01M9 16h.01M12 16h.01M15 16h.01",
};

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

function button(name, label, action, { text = "", className = "quiet" } = {}) {
  const node = element("button", { type: "button", className, title: label, onclick: action }, icon(name), text);
  if (!text) node.setAttribute("aria-label", label);
  return node;
}

// ---- Storage in the browser ----------------------------------------------------------------------

const CHAT = "maxnano.chat.";
const SETTINGS = "maxnano.settings";

const isMessage = (value) =>
  (value?.role === "user" && typeof value.text === "string") ||
  (value?.role === "assistant" &&
    Array.isArray(value.parts) &&
    value.parts.every((part) => typeof part?.type === "string" && typeof part.text === "string"));

function stored(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function store(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    toast("Could not save this chat: the browser's storage is full or disabled.");
  }
}

function storedChats() {
  const valid = [];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i);
    if (!key.startsWith(CHAT)) continue;
    const chat = stored(key);
    if (typeof chat?.id === "string" && Array.isArray(chat.messages) && chat.messages.every(isMessage)) valid.push(chat);
  }
  return valid.sort((a, b) => b.updated - a.updated);
}

const newChat = () => ({ id: crypto.randomUUID?.() ?? String(Math.random()).slice(2), title: "New chat", updated: Date.now(), messages: [] });

let model = { id: "", chat: true, defaults: { temperature: 0.6, top_k: 50, max_tokens: 512 } };
let settings = { system: "", key: "", theme: "auto", ...stored(SETTINGS) };
let chats = storedChats();
let chat = newChat();
let running = null; // {chat, controller} while a reply is generated

function save(which = chat) {
  which.updated = Date.now();
  if (!chats.includes(which)) chats.unshift(which);
  store(CHAT + which.id, which);
}

const setting = (name) => settings[name] ?? model.defaults[name];

// ---- The server ----------------------------------------------------------------------------------

class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = error?.code;
  }
}

async function ask(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (settings.key) headers.authorization = `Bearer ${settings.key}`;
  const response = await fetch(path, { ...options, headers });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new ServerError(response.status, body?.error);
  }
  return response;
}

/** The JSON objects of a server-sent event stream. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost.");
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

const contentOf = (parts) =>
  parts.every((part) => part.type === "text") ? parts.map((part) => part.text).join("") : parts;

/** The messages of a request, without the first `dropped`. */
function conversation(messages, dropped) {
  const sent = messages.slice(dropped).map((message) =>
    message.role === "user"
      ? { role: "user", content: message.text }
      : { role: "assistant", content: contentOf(message.parts) },
  );
  return settings.system.trim() ? [{ role: "system", content: settings.system.trim() }, ...sent] : sent;
}

/** Request a reply; drops the oldest turns until the prompt fits into the context. */
async function request(messages, signal) {
  for (let dropped = 0; ; dropped += 2) {
    const body = {
      model: model.id || undefined,
      messages: conversation(messages, dropped),
      temperature: setting("temperature"),
      top_k: setting("top_k"),
      max_tokens: Math.min(setting("max_tokens"), Math.floor((model.max_model_len ?? Infinity) / 2)),
      stream: true,
      stream_options: { include_usage: true },
    };
    try {
      const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
      return { response, dropped };
    } catch (error) {
      if (error.code !== "context_length_exceeded" || dropped + 2 >= messages.length) throw error;
    }
  }
}

function explain(error) {
  if (error.status === 401) return "The server requires an API key: enter it in Settings.";
  if (error instanceof TypeError) return "Could not reach the server.";
  return error.message;
}

function append(parts, delta) {
  for (const part of delta.parts ?? (delta.content ? [{ type: "text", text: delta.content }] : [])) {
    const last = parts.at(-1);
    if (last?.type === part.type) last.text += part.text;
    else parts.push({ type: part.type, text: part.text });
  }
}

/** Generate the reply to the last message of the open chat. */
async function reply() {
  const target = chat;
  const message = { role: "assistant", parts: [] };
  const messages = [...target.messages];
  target.messages.push(message);
  running = { chat: target, controller: new AbortController() };
  save(target);
  showAll();
  scrollToEnd(true);
  const started = performance.now();
  let first = 0;
  let saved = started;
  try {
    const { response, dropped } = await request(messages, running.controller.signal);
    if (dropped) message.dropped = dropped;
    for await (const chunk of events(response)) {
      if (chunk.error) throw new ServerError(response.status, chunk.error);
      const choice = chunk.choices[0];
      if (choice?.delta) append(message.parts, choice.delta);
      if (choice?.finish_reason) message.finish = choice.finish_reason;
      if (message.parts.length && !first) first = performance.now();
      if (chunk.usage) {
        const seconds = (performance.now() - started) / 1000;
        message.stats = `${chunk.usage.completion_tokens} tokens · ${(chunk.usage.completion_tokens / seconds).toFixed(0)}/s`;
      }
      if (performance.now() - saved > 1000) {
        save(target);
        saved = performance.now();
      }
      showLast(target);
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = explain(error);
  } finally {
    running = null;
    if (stored(CHAT + target.id)) save(target); // unless it was deleted in the meantime
    if (target === chat) showAll();
    else showList();
    if (target === chat && document.activeElement === document.body) focusInput();
  }
}

function stop() {
  running?.controller.abort();
}

function say(text) {
  if (running || !text.trim()) return;
  if (!chat.messages.length) chat.title = text.trim().split("\n")[0].slice(0, 80);
  chat.messages.push({ role: "user", text });
  reply();
}

/** Replace the user's message `index` and all after it by `text` and a new reply. */
function answerFrom(index, text = chat.messages[index].text) {
  if (running) return;
  if (!index) chat.title = text.trim().split("\n")[0].slice(0, 80);
  chat.messages = [...chat.messages.slice(0, index), { role: "user", text }];
  reply();
}

// ---- Showing -------------------------------------------------------------------------------------

const KINDS = new Set(["python", "python_output"]);

/** The nodes of a reply: text as markdown, with a tool call and its result as one insert. */
function bodyOf(parts) {
  const inserts = [];
  let text = "";
  let call = null;
  for (const part of parts) {
    if (!KINDS.has(part.type)) {
      text += withoutMarks(part.text);
      call = null;
      continue;
    }
    if (part.type === "python" || !call) {
      const name = element("span", { className: "name", title: "The model used its calculator" }, icon("calculator"));
      call = element("span", { className: "tool" }, name);
      text += insertMark(inserts.length);
      inserts.push(call);
    }
    const className = part.type === "python" ? "call" : "result";
    call.append(element("span", { className, textContent: part.text }));
  }
  return render(text, inserts);
}

function showMessage(message, index) {
  const isLast = index === chat.messages.length - 1;
  const isStreaming = isLast && running?.chat === chat;
  const bubble = element("div", { className: "bubble" });
  const actions = element("div", { className: "actions" });
  const node = element("li", { className: `message ${message.role}` }, bubble);
  node.setAttribute("aria-label", message.role === "user" ? "You" : "Model");
  if (message.role === "user") {
    bubble.textContent = message.text;
    actions.append(button("edit", "Edit and continue from here", () => edit(node, index)));
    actions.append(button("copy", "Copy", () => copy(message.text)));
  } else {
    bubble.append(bodyOf(message.parts));
    if (message.dropped) {
      const text = `The context is full: the first ${message.dropped} messages were dropped for this reply.`;
      node.prepend(element("p", { className: "note", textContent: text }));
    }
    if (!message.parts.length && !isStreaming) bubble.append(element("em", { textContent: message.error ? "no reply" : "(empty)" }));
    const text = message.parts.map((part) => part.text).join("");
    actions.append(button("again", "Regenerate", () => answerFrom(index - 1)), button("copy", "Copy", () => copy(text)));
    const ends = { length: "stopped at the token limit", stopped: "stopped" };
    const facts = [message.stats, ends[message.finish]].filter(Boolean).join(" · ");
    if (facts) actions.append(element("span", { className: "stats", textContent: facts }));
    if (message.error) {
      const again = button("again", "Try again", () => answerFrom(index - 1), { text: "Try again" });
      node.append(element("div", { className: "failure", role: "alert" }, element("span", { textContent: message.error }), again));
    }
  }
  node.classList.toggle("streaming", isStreaming);
  if (!running) node.append(actions);
  return node;
}

let frame = 0;

/** Update the last message of a chat, at most once per frame. */
function showLast(which) {
  if (which !== chat || frame) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    const node = $("thread").lastElementChild;
    const message = chat.messages.at(-1);
    if (!node || message?.role !== "assistant") return;
    const follow = isAtEnd();
    node.replaceWith(showMessage(message, chat.messages.length - 1));
    if (follow) scrollToEnd();
  });
}

function showAll() {
  const follow = isAtEnd();
  $("thread").replaceChildren(...chat.messages.map(showMessage));
  $("thread").setAttribute("aria-busy", String(Boolean(running)));
  $("welcome").hidden = chat.messages.length > 0;
  $("title").textContent = chat.title;
  document.title = chat.messages.length ? `${chat.title} · MaxNano` : "MaxNano";
  showList();
  showComposer();
  if (follow) scrollToEnd();
}

function showList() {
  const rows = chats
    .toSorted((a, b) => b.updated - a.updated)
    .map((each) => {
      const open = element("button", { type: "button", className: "open", onclick: () => openChat(each) }, element("span", { textContent: each.title }));
      if (each === chat) open.setAttribute("aria-current", "true");
      return element("li", {}, open, button("trash", `Delete “${each.title}”`, () => remove(each), { className: "quiet delete" }));
    });
  $("conversations").replaceChildren(...rows);
}

function showComposer() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !input.value.trim();
}

function edit(node, index) {
  if (running) return;
  const box = element("textarea", { value: chat.messages[index].text, rows: Math.min(10, chat.messages[index].text.split("\n").length + 1) });
  box.setAttribute("aria-label", "Edit the message");
  const done = () => {
    if (box.value.trim()) answerFrom(index, box.value);
  };
  const row = element(
    "div",
    { className: "row" },
    element("button", { type: "button", className: "quiet", textContent: "Cancel", onclick: showAll }),
    element("button", { type: "button", className: "primary", textContent: "Send", onclick: done }),
  );
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      showAll();
      focusInput();
    } else if (isSend(event)) {
      event.preventDefault();
      done();
    }
  });
  node.replaceChildren(element("div", { className: "edit" }, box, row));
  box.focus();
}

const scroller = $("scroller");
const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;

function scrollToEnd(always = false) {
  if (always || !isAtEnd()) scroller.scrollTop = scroller.scrollHeight;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied");
  } catch {
    toast("The browser blocked copying.");
  }
}

let toastTimer = 0;

function toast(text, undo = null) {
  const again = undo && element("button", { type: "button", textContent: "Undo", onclick: () => (undo(), ($("toast").hidden = true)) });
  $("toast").replaceChildren(text, ...(again ? [again] : []));
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), undo ? 7000 : 2500);
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// ---- Conversations -------------------------------------------------------------------------------

function openChat(which) {
  chat = which;
  showAll();
  scrollToEnd(true);
  showSidebar(false);
  focusInput();
}

function remove(which) {
  if (running?.chat === which) stop();
  localStorage.removeItem(CHAT + which.id);
  chats = chats.filter((each) => each !== which);
  if (which === chat) openChat(newChat());
  else showList();
  toast("Chat deleted", () => {
    chats.push(which);
    store(CHAT + which.id, which);
    openChat(which);
  });
}

function neighbor(step) {
  const sorted = chats.toSorted((a, b) => b.updated - a.updated);
  const next = sorted[sorted.indexOf(chat) + step];
  if (next) openChat(next);
}

// On a touch screen, focus opens the keyboard.
const focusInput = () => matchMedia("(hover: hover)").matches && $("input").focus();

function showSidebar(shown) {
  $("sidebar").classList.toggle("shown", shown);
  $("scrim").hidden = !shown;
  $("open-sidebar").setAttribute("aria-expanded", String(shown));
  if (shown) $("new-chat").focus();
}

// ---- Settings ------------------------------------------------------------------------------------

const NUMBERS = ["temperature", "top_k", "max_tokens"];

function showSettings() {
  for (const name of NUMBERS) $(name).value = setting(name);
  $("temperature-value").textContent = Number(setting("temperature")).toFixed(2);
  $("system").value = settings.system;
  $("key").value = settings.key;
  for (const radio of document.getElementsByName("theme")) radio.checked = radio.value === settings.theme;
}

function readSettings() {
  for (const name of NUMBERS) {
    const field = $(name);
    if (field.value !== "" && field.validity.valid) settings[name] = Number(field.value);
  }
  const hadKey = settings.key;
  settings.system = $("system").value;
  settings.key = $("key").value.trim();
  settings.theme = [...document.getElementsByName("theme")].find((radio) => radio.checked)?.value ?? "auto";
  $("temperature-value").textContent = Number(setting("temperature")).toFixed(2);
  store(SETTINGS, settings);
  setTheme();
  if (settings.key !== hadKey) loadModel();
}

function setTheme() {
  document.documentElement.dataset.theme = settings.theme;
}

// ---- Start ---------------------------------------------------------------------------------------

const EXAMPLES = ["Why is the sky blue?", "What is 37 × 43 + 12?", "Write a haiku about the sea.", "How do I boil an egg?"];

/** Load the model's name and defaults from the server. */
async function loadModel() {
  try {
    const answer = await (await ask("/v1/models")).json();
    model = { ...model, ...answer.data[0] };
    $("model").textContent = model.id;
    $("model").hidden = false;
    notice(model.chat ? "" : "This is a base model: it is not fine-tuned for chat.");
  } catch (error) {
    notice(explain(error));
  }
}

const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function listen() {
  const input = $("input");
  input.addEventListener("input", showComposer);
  input.addEventListener("keydown", (event) => {
    if (isSend(event)) {
      event.preventDefault();
      $("composer").requestSubmit();
    } else if (event.key === "ArrowUp" && !input.value && !event.altKey) {
      const index = chat.messages.findLastIndex((message) => message.role === "user");
      if (index >= 0) {
        event.preventDefault();
        edit($("thread").children[index], index);
      }
    }
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    const text = input.value;
    input.value = "";
    say(text);
    showComposer();
  });
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", () => openChat(newChat()));
  $("open-sidebar").addEventListener("click", () => showSidebar(true));
  $("scrim").addEventListener("click", () => showSidebar(false));
  $("to-end").addEventListener("click", () => scrollToEnd(true));
  scroller.addEventListener("scroll", () => ($("to-end").hidden = isAtEnd() || !chat.messages.length));
  $("thread").addEventListener("click", (event) => {
    const code = event.target.closest?.("[data-copy]");
    if (code) copy(code.dataset.copy);
  });

  $("open-settings").addEventListener("click", () => {
    showSettings();
    showSidebar(false);
    $("settings").showModal();
  });
  $("settings").addEventListener("input", readSettings);
  $("settings").addEventListener("click", (event) => event.target === $("settings") && $("settings").close());
  $("reset").addEventListener("click", () => {
    for (const name of NUMBERS) delete settings[name];
    showSettings();
    readSettings();
    for (const name of NUMBERS) delete settings[name];
    store(SETTINGS, settings);
  });
  $("forget").addEventListener("click", () => {
    if (!confirm("Delete all chats of this browser?")) return;
    stop();
    for (const each of chats) localStorage.removeItem(CHAT + each.id);
    chats = [];
    $("settings").close();
    openChat(newChat());
  });

  document.addEventListener("keydown", (event) => {
    const isTyping = /^(TEXTAREA|INPUT)$/.test(document.activeElement?.tagName);
    if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      openChat(newChat());
    } else if (event.altKey && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
      event.preventDefault();
      neighbor(event.key === "ArrowUp" ? -1 : 1);
    } else if (event.key === "Escape" && !$("settings").open) {
      if ($("sidebar").classList.contains("shown")) showSidebar(false);
      else stop();
    } else if (event.key === "/" && !isTyping && !$("settings").open) {
      event.preventDefault();
      $("input").focus();
    }
  });
  // Another tab changed the storage: reload it, unless a reply is generated here.
  window.addEventListener("storage", (event) => {
    if (running || (event.key && !event.key.startsWith(CHAT))) return;
    chats = storedChats();
    chat = chats.find((each) => each.id === chat.id) ?? (chat.messages.length ? newChat() : chat);
    showAll();
  });
}

for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
$("examples").append(...EXAMPLES.map((text) => element("button", { type: "button", textContent: text, onclick: () => say(text) })));
setTheme();
listen();
if (chats.length && chats[0].messages.at(-1)?.role === "assistant") chat = chats[0];
showAll();
scrollToEnd(true);
focusInput();
loadModel();
