// The node of a message: its text, files, errors and buttons. thread.js handles the buttons by their data-action.

import { branchesOf } from "./chats.js";
import { button, element, icon } from "./dom.js";
import { insertMark, render, withoutMarks } from "./markdown.js";
import { streamOf } from "./replies.js";

const TOOL_PARTS = new Set(["python", "python_output"]);
const ENDINGS = { length: "stopped at the token limit", stopped: "stopped" };

/** The <li> of message `index`. */
export function messageNode(chat, index) {
  const message = chat.messages[index];
  const stream = streamOf(chat);
  const isStreaming = stream?.index === index;
  const isMine = message.role === "user";
  const node = element("li", { className: `message ${message.role}` });
  node.dataset.index = index;
  node.classList.toggle("streaming", isStreaming);
  node.append(element("h2", { className: "unseen", textContent: isMine ? "You" : "Model" }));
  node.append(...(isMine ? questionNodes(message) : answerNodes(message, isStreaming ? stream : null)));
  node.append(actionsNode(chat, index));
  return node;
}

function actionsNode(chat, index) {
  const message = chat.messages[index];
  const isMine = message.role === "user";
  const branches = branchesOf(chat, index);
  const node = element("div", { className: "actions" });
  if (branches.length > 1) {
    const kind = isMine ? "version" : "answer";
    const count = element("span", { textContent: `${branches.indexOf(index) + 1} / ${branches.length}` });
    const previous = button("left", `Previous ${kind}`, "previous");
    node.append(element("div", { className: "branches" }, previous, count, button("right", `Next ${kind}`, "next")));
  }
  const change = isMine ? button("edit", "Edit and continue from here", "edit") : button("again", "Regenerate", "again");
  change.disabled = Boolean(streamOf(chat));
  node.append(change, button("copy", "Copy", "copy"));
  const isUnanswered = isMine && index === chat.last;
  if (isUnanswered) node.append(button("again", "Answer", "answer", { text: "Answer" }));
  const facts = isMine ? "" : [message.stats, ENDINGS[message.finish]].filter(Boolean).join(" · ");
  if (facts) node.append(element("span", { className: "stats", textContent: facts }));
  return node;
}

// ---- The visitor's message -----------------------------------------------------------------------

function questionNodes({ text, files = [] }) {
  const nodes = files.map((file) =>
    element(
      "details",
      { className: "file" },
      element("summary", {}, icon("file"), element("span", { textContent: file.name })),
      element("pre", { textContent: file.text, tabIndex: 0 }),
    ),
  );
  if (text) nodes.push(element("div", { className: "bubble", textContent: text }));
  return nodes;
}

/** A form in place of message `node`; calls submit(text), or cancel(). */
export function showEditor(node, text, submit, cancel) {
  const box = element("textarea", { value: text, rows: Math.min(10, text.split("\n").length + 1) });
  box.setAttribute("aria-label", "Edit the message");
  const send = () => box.value.trim() && submit(box.value);
  const row = element(
    "div",
    { className: "row" },
    element("button", { type: "button", className: "quiet", textContent: "Cancel", onclick: cancel }),
    element("button", { type: "button", className: "primary", textContent: "Send", onclick: send }),
  );
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (isSend(event)) {
      event.preventDefault();
      send();
    }
  });
  node.replaceChildren(element("div", { className: "edit" }, box, row));
  box.focus();
}

export const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

// ---- The model's answer --------------------------------------------------------------------------

function answerNodes(message, stream) {
  const nodes = [];
  if (message.dropped) {
    const text = `The context is full: the first ${message.dropped} messages were dropped for this reply.`;
    nodes.push(element("p", { className: "note", textContent: text }));
  }
  const bubble = element("div", { className: "bubble" }, bodyOf(message.parts));
  if (!message.parts.length && !stream) {
    bubble.append(element("em", { textContent: message.error ? "no reply" : "(empty)" }));
  }
  nodes.push(bubble);
  if (stream?.retryAt) nodes.push(countdownNode(stream));
  if (message.error) {
    const again = button("again", "Try again", "again", { text: "Try again" });
    nodes.push(element("div", { className: "failure", role: "alert" }, element("span", { textContent: message.error }), again));
  }
  return nodes;
}

/** The nodes of a reply: text as markdown, with a tool call and its result as one insert. */
export function bodyOf(parts) {
  const inserts = [];
  let text = "";
  let call = null;
  for (const part of parts) {
    if (!TOOL_PARTS.has(part.type)) {
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

function countdownNode({ retryAt }) {
  const seconds = Math.max(1, Math.ceil((retryAt - Date.now()) / 1000));
  const text = element("span", { textContent: `The server is busy. Trying again in ${seconds} s.` });
  // A timer is not read out each second.
  const node = element("div", { className: "countdown", role: "timer" }, text);
  node.append(button("again", "Try now", "retry", { text: "Try now" }));
  return node;
}
