// The models of the server, what they are, and how much of the context the open chat uses.

import { pathOf } from "./chats.js";
import { $, element } from "./dom.js";
import { ask, explain } from "./server.js";
import { emit, on, saveSettings, state } from "./state.js";

const UNKNOWN_MODEL = state.model; // until the server answers

const number = (value) => value.toLocaleString("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

/** Load the models from the server, again if it is not ready. */
export async function loadModels() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    state.models = data.map((model) => ({ ...UNKNOWN_MODEL, ...model }));
    chooseModel(state.settings.model);
  } catch (error) {
    notice(explain(error));
    if (error.retrySeconds) setTimeout(loadModels, error.retrySeconds * 1000);
  }
}

function chooseModel(id) {
  state.model = state.models.find((model) => model.id === id) ?? state.models[0];
  notice(state.model.chat ? "" : "This is a base model: it is not fine-tuned for chat.");
  emit("models");
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/** Tokens of the context after the last reply that is shown; null before the first. */
function usedTokens() {
  const { chat } = state;
  const used = pathOf(chat).map((index) => chat.messages[index].used);
  return used.findLast(Number.isFinite) ?? null;
}

function showModel() {
  const { model, models } = state;
  const details = model.details ?? {};
  const rows = {
    Run: details.run,
    Stage: details.stage,
    "Training step": Number.isFinite(details.step) ? number(details.step) : null,
    Parameters: Number.isFinite(details.parameters) ? compact.format(details.parameters) : null,
    Context: model.max_model_len ? `${number(model.max_model_len)} tokens` : null,
  };
  $("model").textContent = model.id;
  $("model").hidden = !model.id;
  $("model-id").textContent = model.id;
  const terms = Object.entries(rows).filter(([, value]) => value);
  $("model-facts").replaceChildren(
    ...terms.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]),
  );
  $("model-choice").hidden = models.length < 2;
  $("model-picker").replaceChildren(...models.map(({ id }) => element("option", { value: id, textContent: id, selected: id === model.id })));
}

function showContext() {
  const used = usedTokens();
  const size = state.model.max_model_len;
  const isKnown = used !== null && Boolean(size);
  $("context").hidden = !isKnown;
  $("context-use").hidden = !isKnown;
  if (!isKnown) return;
  $("context").textContent = `${number(used)} / ${number(size)} tokens`;
  $("context-text").textContent = `${number(used)} of ${number(size)} tokens used so far`;
  $("context-meter").max = size;
  $("context-meter").high = 0.8 * size;
  $("context-meter").value = used;
}

$("model").addEventListener("click", () => {
  const panel = $("model-details");
  const { bottom, right } = $("model").getBoundingClientRect();
  panel.togglePopover();
  panel.style.top = `${bottom + 6}px`;
  panel.style.left = `${Math.max(8, right - panel.offsetWidth)}px`;
});
$("model-picker").addEventListener("change", () => {
  state.settings.model = $("model-picker").value;
  saveSettings();
  chooseModel(state.settings.model);
});

on("models", () => {
  showModel();
  showContext();
});
on("open", showContext);
on("chat", showContext);
