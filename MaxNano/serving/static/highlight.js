// Colors of code: comments, strings, numbers and the keywords of common languages.

import { element } from "./dom.js";

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

/** Code as spans of class t-comment, t-string, t-number and t-keyword, and plain(text) for all text. */
export function highlight(code, language, plain) {
  if (NO_HIGHLIGHT.has(language)) return plain(code);
  const out = [];
  let at = 0;
  for (const match of code.matchAll(SLASH_COMMENTS.has(language) ? SLASHED : HASHED)) {
    const { comment, string, number, word } = match.groups;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : KEYWORDS.has(word) ? "keyword" : null;
    if (!kind) continue;
    out.push(...plain(code.slice(at, match.index)));
    out.push(element("span", { className: `t-${kind}` }, ...plain(match[0])));
    at = match.index + match[0].length;
  }
  out.push(...plain(code.slice(at)));
  return out;
}
