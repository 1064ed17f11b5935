// Chats as files: Markdown to read, JSON to import again.

import { makeId, pathOf, toChat } from "./chats.js";
import { download } from "./dom.js";
import { questionOf } from "./replies.js";

const FORMAT = "maxnano-chats";

const fileName = (title) => title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60).toLowerCase() || "chat";

/** Save the messages that a chat shows. */
export function exportMarkdown(chat) {
  const messages = pathOf(chat).map((index) => chat.messages[index]);
  const sections = messages.map((message) =>
    message.role === "user" ? `## You\n\n${questionOf(message)}` : `## Model\n\n${answerOf(message)}`,
  );
  download(`${fileName(chat.title)}.md`, `${[`# ${chat.title}`, ...sections].join("\n\n")}\n`, "text/markdown");
}

function answerOf({ parts }) {
  const pieces = { text: (text) => text, python: (text) => `\`${text}\``, python_output: (text) => ` = \`${text}\`` };
  return parts.map((part) => (pieces[part.type] ?? pieces.text)(part.text)).join("");
}

/** Save chats with all branches. */
export function exportJson(chats, name = chats[0].title) {
  download(`${fileName(name)}.json`, JSON.stringify({ format: FORMAT, version: 1, chats }, null, 1), "application/json");
}

/** The chats in a file that exportJson() wrote, without those of `known`. Throws Error for another file. */
export function importJson(text, known) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.chats)) throw new Error("The file is not an export of chats.");
  const chats = file.chats.map(toChat).filter(Boolean);
  if (!chats.length) throw new Error("The file has no chat that can be read.");
  const byId = new Map(known.map((chat) => [chat.id, chat]));
  const isKnown = (chat) => byId.has(chat.id) && JSON.stringify(byId.get(chat.id).messages) === JSON.stringify(chat.messages);
  return chats.filter((chat) => !isKnown(chat)).map((chat) => (byId.has(chat.id) ? { ...chat, id: makeId() } : chat));
}
