// Markdown to DOM nodes. The model's text only becomes text nodes; no HTML is parsed.
//
//   element.replaceChildren(render(text, inserts))
//
// `inserts` are nodes within the text: the character U+E000 + i is replaced by inserts[i].

const FIRST_INSERT = 0xe000;
const LAST_INSERT = 0xf8ff; // the end of the private use area
const DEEPEST = 12; // nested lists and quotes

/** The character that marks insert i. */
export const insertMark = (i) => String.fromCharCode(Math.min(FIRST_INSERT + i, LAST_INSERT));

/** The model's text without characters that mark inserts. */
export const withoutMarks = (text) => text.replace(/[\ue000-\uf8ff]/g, "\ufffd");

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export function render(text, inserts = []) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), inserts, 0));
  return fragment;
}

// ---- Blocks ------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

const isBlank = (line) => line.trim() === "";
const startsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function blocks(lines, inserts, depth) {
  const out = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (isBlank(line)) {
      at += 1;
    } else if ((match = FENCE.exec(line))) {
      const end = closingFence(lines, at + 1, match[1]);
      out.push(codeBlock(lines.slice(at + 1, end).join("\n"), match[2], inserts));
      at = end + 1;
    } else if ((match = HEADING.exec(line))) {
      out.push(element(`h${Math.min(match[1].length + 2, 6)}`, {}, ...inline(match[2], inserts)));
      at += 1;
    } else if (RULE.test(line)) {
      out.push(element("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const start = at;
      while (at < lines.length && QUOTE.test(lines[at])) at += 1;
      const inner = lines.slice(start, at).map((quoted) => quoted.replace(QUOTE, ""));
      out.push(element("blockquote", {}, ...blocks(inner, inserts, depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const [list, end] = listBlock(lines, at, inserts, depth);
      out.push(list);
      at = end;
    } else if (line.includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1]) && lines[at + 1].includes("-")) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|")) end += 1;
      out.push(table(lines.slice(at, end), inserts));
      at = end;
    } else {
      const start = at;
      at += 1;
      while (at < lines.length && !isBlank(lines[at]) && !(depth < DEEPEST && startsBlock(lines[at]))) at += 1;
      out.push(element("p", {}, ...inline(lines.slice(start, at).join("\n").trim(), inserts)));
    }
  }
  return out;
}

function closingFence(lines, at, fence) {
  while (at < lines.length) {
    const line = lines[at].trim();
    if (line.startsWith(fence) && line === fence[0].repeat(line.length)) return at;
    at += 1;
  }
  return at;
}

function listBlock(lines, at, inserts, depth) {
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
    const inner = [lines[at].slice(inset)];
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
    const content = blocks(inner, inserts, depth + 1);
    // The first paragraph of an item has no margins.
    if (content.length && content[0].tagName === "P") content.splice(0, 1, ...content[0].childNodes);
    list.append(element("li", {}, ...content));
    while (at < lines.length && isBlank(lines[at]) && at + 1 < lines.length && ITEM.test(lines[at + 1])) at += 1;
  }
  return [list, at];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table([head, rule, ...rows], inserts) {
  const aligned = cells(rule).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "end") : "start"));
  const width = cells(head).length;
  const row = (line, tag) =>
    element(
      "tr",
      {},
      ...cells(line)
        .slice(0, width)
        .map((cell, i) => element(tag, { className: aligned[i] ?? "start" }, ...inline(cell, inserts))),
    );
  const body = element("tbody", {}, ...rows.map((line) => row(line, "td")));
  return element("div", { className: "table" }, element("table", {}, element("thead", {}, row(head, "th")), body));
}

function codeBlock(code, language, inserts) {
  const copy = element("button", { type: "button", className: "copy", textContent: "Copy" });
  copy.dataset.copy = code;
  const bar = element("div", { className: "code-bar" }, element("span", { textContent: language || "text" }), copy);
  const body = element("code", {}, ...highlight(code, language.toLowerCase(), inserts));
  return element("div", { className: "code" }, bar, element("pre", { tabIndex: 0 }, body));
}

// ---- Inline ------------------------------------------------------------------------------------

// One alternative per construct, tried at every position from left to right.
const INLINE = new RegExp(
  [
    /\\(?<escaped>[!-/:-@[-`{-~])/,
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

function inline(text, inserts, depth = 0) {
  if (depth > DEEPEST) return [text];
  const out = [];
  let at = 0;
  const within = (inner) => inline(inner, inserts, depth + 1);
  for (const match of text.matchAll(INLINE)) {
    const groups = match.groups;
    if (match.index > at) out.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    if (groups.escaped !== undefined) out.push(groups.escaped);
    else if (groups.code !== undefined) out.push(element("code", {}, ...plain(groups.code, inserts)));
    else if (groups.label !== undefined) out.push(link(groups.target, within(groups.label || groups.target), match[0]));
    else if (groups.auto ?? groups.bare) out.push(link(groups.auto ?? groups.bare, [groups.auto ?? groups.bare], match[0]));
    else if (groups.strong ?? groups.strong2) out.push(element("strong", {}, ...within(groups.strong ?? groups.strong2)));
    else if (groups.struck) out.push(element("del", {}, ...within(groups.struck)));
    else if (groups.em ?? groups.em2) out.push(element("em", {}, ...within(groups.em ?? groups.em2)));
    else if (groups.broken) out.push(element("br"));
    else out.push(...plain(match[0], inserts));
  }
  if (at < text.length) out.push(text.slice(at));
  return out;
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
function plain(text, inserts) {
  return text
    .split(/([\ue000-\uf8ff])/)
    .map((piece) => {
      const index = piece.length === 1 ? piece.charCodeAt(0) - FIRST_INSERT : -1;
      return index >= 0 && inserts[index] ? inserts[index] : piece;
    })
    .filter((piece) => piece !== "");
}

// ---- Code --------------------------------------------------------------------------------------

const KEYWORDS = new Set(
  ("and as assert async await break case catch class const continue def default del do elif else enum except export " +
    "extends finally fn for from function global if impl import in interface is lambda let match mod mut new nonlocal " +
    "not or pass pub raise return self static struct super switch this throw trait try type typeof use var void while " +
    "with yield true false null none None True False int float str bool char double long unsigned public private " +
    "SELECT FROM WHERE INSERT UPDATE DELETE JOIN ON GROUP BY ORDER LIMIT echo fi then done esac").split(" "),
);
const SLASH_COMMENTS = new Set("c c++ cpp cs css go java javascript js json jsx kotlin php rs rust scala swift ts tsx typescript".split(" "));
const NO_HIGHLIGHT = new Set(["", "text", "txt", "plain", "output", "markdown", "md"]);

const tokens = (comment) =>
  new RegExp(
    `(?<comment>${comment})` +
      String.raw`|(?<string>"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|\x60(?:[^\x60\\]|\\.)*\x60)` +
      String.raw`|(?<number>\b\d[\w.]*)|(?<word>[A-Za-z_]\w*)`,
    "g",
  );
const SLASHED = tokens(String.raw`//[^\n]*|/\*[^]*?(?:\*/|$)`);
const HASHED = tokens(String.raw`#[^\n]*|--[ \t][^\n]*`);

function highlight(code, language, inserts) {
  if (NO_HIGHLIGHT.has(language)) return plain(code, inserts);
  const out = [];
  let at = 0;
  for (const match of code.matchAll(SLASH_COMMENTS.has(language) ? SLASHED : HASHED)) {
    const { comment, string, number, word } = match.groups;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : KEYWORDS.has(word) ? "keyword" : null;
    if (!kind) continue;
    out.push(...plain(code.slice(at, match.index), inserts));
    out.push(element("span", { className: `t-${kind}` }, ...plain(match[0], inserts)));
    at = match.index + match[0].length;
  }
  out.push(...plain(code.slice(at), inserts));
  return out;
}
