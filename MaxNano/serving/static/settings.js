// The dialog of settings: sampling, instructions, appearance, and all chats as a file.

import { newChat, saveChat } from "./chats.js";
import { $, toast } from "./dom.js";
import { loadModels } from "./models.js";
import { stop } from "./replies.js";
import { isSidebarOver, showSidebar } from "./sidebar.js";
import { discard, emit, openChat, saveSettings, setting, state } from "./state.js";
import { exportJson, importJson } from "./transfer.js";

const NUMBERS = ["temperature", "top_k", "max_tokens"];

const radios = () => [...document.getElementsByName("theme")];

function openSettings() {
  if (isSidebarOver()) showSidebar(false);
  showSettings();
  $("settings").showModal();
}

export function setTheme() {
  document.documentElement.dataset.theme = state.settings.theme;
}

function showSettings() {
  for (const name of NUMBERS) $(name).value = setting(name);
  $("temperature-value").textContent = Number(setting("temperature")).toFixed(2);
  $("system").value = state.settings.system;
  $("key").value = state.settings.key;
  for (const radio of radios()) radio.checked = radio.value === state.settings.theme;
  $("export-all").disabled = !state.chats.length;
  $("forget").disabled = !state.chats.length;
}

function readSettings(event) {
  if (event.target.type === "file") return;
  const { settings } = state;
  const changed = $(event.target.id);
  if (NUMBERS.includes(changed?.id) && changed.value !== "" && changed.validity.valid) settings[changed.id] = Number(changed.value);
  const hadKey = settings.key;
  settings.system = $("system").value;
  settings.key = $("key").value.trim();
  settings.theme = radios().find((radio) => radio.checked)?.value ?? "auto";
  $("temperature-value").textContent = Number(setting("temperature")).toFixed(2);
  saveSettings();
  setTheme();
  if (settings.key !== hadKey) loadModels();
}

async function importFile(file) {
  $("settings").close(); // it would cover the notes
  try {
    const chats = importJson(await file.text(), state.chats);
    chats.forEach(saveChat);
    state.chats.push(...chats);
    if (chats.length) openChat(chats[0]);
    emit("chat", state.chat);
    toast(chats.length ? `Imported ${chats.length} chat${chats.length === 1 ? "" : "s"}` : "These chats are here already.");
  } catch (error) {
    toast(error.message);
  }
}

$("open-settings").addEventListener("click", openSettings);
$("settings").addEventListener("input", readSettings);
$("settings").addEventListener("click", (event) => event.target === $("settings") && $("settings").close());
$("reset").addEventListener("click", () => {
  for (const name of NUMBERS) delete state.settings[name];
  saveSettings();
  showSettings();
});
$("export-all").addEventListener("click", () => exportJson(state.chats, "maxnano-chats"));
$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", () => {
  importFile($("import-file").files[0]);
  $("import-file").value = "";
});
$("forget").addEventListener("click", () => {
  if (!confirm("Delete all chats of this browser?")) return;
  state.chats.forEach(stop);
  discard([...state.chats]);
  $("settings").close();
  openChat(newChat());
});
