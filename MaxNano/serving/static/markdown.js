// Markdown to DOM nodes. The model's text only becomes text nodes; no HTML is parsed.
//
//   element.replaceChildren(render(text, inserts))
//
// `inserts` are nodes within the text: the character U+E000 + i is replaced by inserts[i].

import { element } from "./dom.js";
import { highlight } from "./highlight.js";
import { renderMath } from "./math.js";

const FIRST_INSERT = 0xe000;
const LAST_INSERT = 0xf8ff; // the end of the private use area
const DEEPEST = 12; // nested lists and quotes

/** The character that marks insert i. */
export const insertMark = (i) => String.fromCharCode(Math.min(FIRST_INSERT + i, LAST_INSERT));

/** The model's text without characters that mark inserts. */
export const withoutMarks = (text) => text.replace(/[\ue000-\uf8ff]/g, "\ufffd");

export function render(text, inserts = []) {
  const fragment = document.createDocumentFragment();
  const context = { inserts, headings: [] };
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), context, 0));
  return fragment;
}

// ---- Blocks ------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const TASK = /^\[([ xX])\]\s+/;
const MATH = /^ {0,3}(\$\$|\\\[|\\begin\{((?:equation|align|gather)\*?)\})/;
const MATH_LINES = 60; // of one formula
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

const isBlank = (line) => line.trim() === "";
const startsBlock = (line) =>
  [FENCE, HEADING, RULE, QUOTE, ITEM, MATH].some((pattern) => pattern.test(line));

function blocks(lines, context, depth) {
  const out = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (isBlank(line)) {
      at += 1;
    } else if ((match = FENCE.exec(line))) {
      const end = closingFence(lines, at + 1, match[1]);
      out.push(codeBlock(lines.slice(at + 1, end).join("\n"), match[2], context));
      at = end + 1;
    } else if ((match = HEADING.exec(line))) {
      out.push(element(headingTag(match[1].length, context.headings), {}, ...inline(match[2], context)));
      at += 1;
    } else if (RULE.test(line)) {
      out.push(element("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const start = at;
      while (at < lines.length && QUOTE.test(lines[at])) at += 1;
      const inner = lines.slice(start, at).map((quoted) => quoted.replace(QUOTE, ""));
      out.push(element("blockquote", {}, ...blocks(inner, context, depth + 1)));
    } else if ((match = displayMath(lines, at))) {
      out.push(element("div", { className: "formula" }, formula(match.source, match.body, true, context), match.rest));
      at = match.end;
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const [list, end] = listBlock(lines, at, context, depth);
      out.push(list);
      at = end;
    } else if (line.includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1]) && lines[at + 1].includes("-")) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|")) end += 1;
      out.push(table(lines.slice(at, end), context));
      at = end;
    } else {
      const start = at;
      at += 1;
      while (at < lines.length && !isBlank(lines[at]) && !(depth < DEEPEST && startsBlock(lines[at]))) at += 1;
      out.push(element("p", {}, ...inline(lines.slice(start, at).join("\n").trim(), context)));
    }
  }
  return out;
}

/** The tag of a heading with `marks` number signs. The first is h3, and no level is left out below it. */
function headingTag(marks, headings) {
  while (headings.at(-1) >= marks) headings.pop();
  headings.push(marks);
  return `h${Math.min(headings.length + 2, 6)}`;
}

/** {source, body, rest, end} of the display formula that begins at a line, or null. */
function displayMath(lines, at) {
  const match = MATH.exec(lines[at]);
  if (!match) return null;
  const [start, opening, environment] = match;
  const closing = environment ? `\\end{${environment}}` : opening === "$$" ? "$$" : "\\]";
  for (let end = at; end < Math.min(lines.length, at + MATH_LINES); end += 1) {
    const stop = lines[end].indexOf(closing, end === at ? start.length : 0);
    if (stop < 0) continue;
    const rest = lines[end].slice(stop + closing.length).trim();
    if (rest.length > 1) return null; // more than a full stop: the formula is within a paragraph
    const text = [...lines.slice(at, end), lines[end].slice(0, stop)].join("\n").trim().slice(opening.length);
    const source = opening + text + closing;
    return { source, body: environment ? source : text, rest, end: end + 1 };
  }
  return null;
}

function closingFence(lines, at, fence) {
  while (at < lines.length) {
    const line = lines[at].trim();
    if (line.startsWith(fence) && line === fence[0].repeat(line.length)) return at;
    at += 1;
  }
  return at;
}

function listBlock(lines, at, context, depth) {
  const first = ITEM.exec(lines[at]);
  const margin = first[1].length;
  const ordered = /\d/.test(first[2]);
  const list = element(ordered ? "ol" : "ul");
  if (ordered) list.start = parseInt(first[2], 10);
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length > margin + 3 || match[1].length < margin || /\d/.test(match[2]) !== ordered) break;
    if (RULE.test(lines[at])) break;
    const inset = match[0].length;
    const task = TASK.exec(lines[at].slice(inset));
    const inner = [lines[at].slice(inset + (task?.[0].length ?? 0))];
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const indent = line.length - line.trimStart().length;
      if (isBlank(line)) {
        const next = lines[at + 1];
        if (next === undefined || isBlank(next) || next.length - next.trimStart().length <= margin) break;
      } else if (indent <= margin && (startsBlock(line) || isBlank(lines[at - 1]))) {
        break;
      } else if (ITEM.test(line) && indent <= margin + 1) {
        break;
      }
      inner.push(line.slice(Math.min(indent, inset)));
      at += 1;
    }
    const content = blocks(inner, context, depth + 1);
    // The first paragraph of an item has no margins.
    if (content.length && content[0].tagName === "P") content.splice(0, 1, ...content[0].childNodes);
    list.append(task ? taskItem(task[1] !== " ", content) : element("li", {}, ...content));
    while (at < lines.length && isBlank(lines[at]) && at + 1 < lines.length && ITEM.test(lines[at + 1])) at += 1;
  }
  return [list, at];
}

function taskItem(isDone, content) {
  const box = element("input", { type: "checkbox", checked: isDone, disabled: true });
  box.setAttribute("aria-label", isDone ? "Done" : "To do");
  box.toggleAttribute("checked", isDone);
  return element("li", { className: "task" }, box, " ", ...content);
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table([head, rule, ...rows], context) {
  const aligned = cells(rule).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "end") : "start"));
  const width = cells(head).length;
  const row = (line, tag) => {
    const texts = cells(line);
    const cell = (_, i) => element(tag, { className: aligned[i] ?? "start" }, ...inline(texts[i] ?? "", context));
    return element("tr", {}, ...Array.from({ length: width }, cell));
  };
  const body = element("tbody", {}, ...rows.map((line) => row(line, "td")));
  const node = element("div", { className: "table", tabIndex: 0, role: "group" });
  node.setAttribute("aria-label", "Table");
  node.append(element("table", {}, element("thead", {}, row(head, "th")), body));
  return node;
}

function codeBlock(code, language, context) {
  const copy = element("button", { type: "button", className: "copy", textContent: "Copy" });
  copy.dataset.copy = code;
  const bar = element("div", { className: "code-bar" }, element("span", { textContent: language || "text" }), copy);
  const body = element("code", {}, ...highlight(code, language.toLowerCase(), (text) => plain(text, context)));
  return element("div", { className: "code" }, bar, element("pre", { tabIndex: 0 }, body));
}

// ---- Inline ------------------------------------------------------------------------------------

// One alternative per construct, tried at every position from left to right.
const INLINE = new RegExp(
  [
    /\\\((?<round>[^]{1,4000}?)\\\)/,
    /\\\[(?<square>[^]{1,4000}?)\\\]/,
    /\$\$(?<double>[^$]+)\$\$/,
    /(?<![\p{L}\p{N}])\$(?![\s$])(?<dollar>(?:\\[^]|[^$\\])+?)(?<!\s)\$(?![\p{L}\p{N}$])/, // not $5 or $HOME
    /(?<intact>\\[()[\]])/, // a formula that has not ended yet
    /\\(?<escaped>[!-'*-/:-@\\^-`{-~])/,
    /(?<ticks>`+)(?!`)(?<code>[^]*?[^`])\k<ticks>(?!`)/,
    /!?\[(?<label>[^[\]]*)\]\((?<target>[^()\s]*(?:\([^()\s]*\)[^()\s]*)?)(?:\s+"[^"]*")?\)/,
    /<(?<auto>https?:\/\/[^\s<>]+)>/,
    /(?<bare>https?:\/\/[^\s<>()]*[^\s<>().,;:!?'"*_`\]])/,
    /\*\*(?=\S)(?<strong>[^]*?\S)\*\*/,
    /(?<![\p{L}\p{N}_])__(?=\S)(?<strong2>[^]*?\S)__(?![\p{L}\p{N}_])/,
    /~~(?=\S)(?<struck>[^]*?\S)~~/,
    /\*(?![\s*])(?<em>[^*]*[^\s*])\*(?!\*)/,
    /(?<![\p{L}\p{N}_])_(?![\s_])(?<em2>[^_]*[^\s_])_(?![\p{L}\p{N}_])/,
    /(?<broken> *\\?\n)/,
    /(?<insert>[\ue000-\uf8ff])/,
  ]
    .map((pattern) => pattern.source)
    .join("|"),
  "gu",
);

function inline(text, context, depth = 0) {
  if (depth > DEEPEST) return [text];
  const out = [];
  let at = 0;
  const within = (inner) => inline(inner, context, depth + 1);
  for (const match of text.matchAll(INLINE)) {
    const groups = match.groups;
    if (match.index > at) out.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const math = groups.round ?? groups.square ?? groups.double ?? groups.dollar;
    if (math !== undefined) out.push(formula(match[0], math, Boolean(groups.square ?? groups.double), context));
    else if (groups.intact) out.push(groups.intact);
    else if (groups.escaped !== undefined) out.push(groups.escaped);
    else if (groups.code !== undefined) out.push(element("code", {}, ...plain(groups.code, context)));
    else if (groups.label !== undefined) out.push(link(groups.target, within(groups.label || groups.target), match[0]));
    else if (groups.auto ?? groups.bare) out.push(link(groups.auto ?? groups.bare, [groups.auto ?? groups.bare], match[0]));
    else if (groups.strong ?? groups.strong2) out.push(element("strong", {}, ...within(groups.strong ?? groups.strong2)));
    else if (groups.struck) out.push(element("del", {}, ...within(groups.struck)));
    else if (groups.em ?? groups.em2) out.push(element("em", {}, ...within(groups.em ?? groups.em2)));
    else if (groups.broken) out.push(element("br"));
    else out.push(...plain(match[0], context));
  }
  if (at < text.length) out.push(text.slice(at));
  return out;
}

/** A formula, or its source as it is if this page cannot show it. */
function formula(source, body, isDisplay, context) {
  const node = source === withoutMarks(source) ? renderMath(body, isDisplay) : null;
  return node ?? element("code", { className: "latex" }, ...plain(source, context));
}

/** A link that opens in a new tab; unsafe targets stay text. */
function link(target, children, source) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return source;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return source;
  return element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

/** Text with its inserts, without markdown. */
function plain(text, context) {
  return text
    .split(/([\ue000-\uf8ff])/)
    .map((piece) => {
      const index = piece.length === 1 ? piece.charCodeAt(0) - FIRST_INSERT : -1;
      return index >= 0 && context.inserts[index] ? context.inserts[index] : piece;
    })
    .filter((piece) => piece !== "");
}
