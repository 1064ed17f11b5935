// LaTeX formulas to MathML: the part of LaTeX's math that language models write. The model's text only becomes text
// nodes; no HTML is parsed and no macro is expanded.
//
//   element.append(renderMath("\\frac{1}{2}", false))

import {
  ACCENTS, BRACKETS, ENVIRONMENTS, FONTS, FUNCTIONS, IDENTIFIERS, LARGE, LIMITS, OPERATORS, SIZES, SPACES, STYLES, styled,
} from "./math_symbols.js";

const MATHML = "http://www.w3.org/1998/Math/MathML";
const LONGEST = 8192; // characters of a formula
const DEEPEST = 100; // groups and arguments within each other
const TOKENS = /\\[a-zA-Z]+\*?|\\[^]|\s+|\d+(?:[.,]\d+)*|[^]/gu;

function make(tag, attributes, ...children) {
  const node = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const row = (nodes) => (nodes.length === 1 ? nodes[0] : make("mrow", {}, ...nodes));
const operator = (text, attributes = {}) => make("mo", attributes, text);
const space = (width) => make("mspace", { width });

/** A <math> node, or null if the formula has something that this page does not know. */
export function renderMath(source, isDisplay) {
  if (source.length > LONGEST) return null;
  try {
    const formula = new Parser(source).all();
    return make("math", { display: isDisplay ? "block" : "inline", alttext: source.trim() }, formula);
  } catch (error) {
    if (error instanceof UnknownMath) return null;
    throw error;
  }
}

/** The formula has something that this page does not know. */
class UnknownMath extends Error {}

/** Reads a formula, from its first token to its last. */
class Parser {
  constructor(source) {
    this.tokens = source.match(TOKENS) ?? [];
    this.at = 0;
    this.depth = 0;
    this.font = null;
  }

  get next() {
    return this.tokens[this.at];
  }

  take(expected = null) {
    const token = this.tokens[this.at++];
    if (token === undefined || (expected && token !== expected)) throw new UnknownMath(`no ${expected ?? "argument"}`);
    return token;
  }

  skipSpace() {
    while (/^\s/.test(this.next ?? "")) this.at++;
  }

  all() {
    const cells = this.cells(() => this.next === undefined);
    // Lines outside of an environment, as in \[ a \\ b \].
    return cells.length > 1 || cells[0].length > 1 ? table(cells, ENVIRONMENTS.gathered) : row(cells[0][0]);
  }

  /** The nodes until a token ends the list. */
  list(isEnd) {
    const nodes = [];
    for (this.skipSpace(); !isEnd(this.next); this.skipSpace()) {
      if (this.next === undefined) throw new UnknownMath("no end");
      nodes.push(...this.scripted());
    }
    return nodes;
  }

  /** The nodes of each cell of each row until isEnd(). */
  cells(isEnd) {
    const rows = [[]];
    for (;;) {
      rows.at(-1).push(this.list((token) => token === "&" || token === "\\\\" || isEnd()));
      if (this.next === "&") this.at++;
      else if (this.next === "\\\\") {
        this.at++;
        if (this.next === "[") this.optional(); // extra space after the row
        rows.push([]);
      } else break;
    }
    if (rows.length > 1 && rows.at(-1).length === 1 && !rows.at(-1)[0].length) rows.pop();
    return rows;
  }

  group() {
    this.take("{");
    const nodes = this.list((token) => token === "}");
    this.take("}");
    return row(nodes);
  }

  /** The argument of a command: a group or one token. */
  argument() {
    this.skipSpace();
    if (this.next === "{") return this.group();
    // \frac12 has two arguments.
    if (/^\d./.test(this.next ?? "")) {
      const [digit, ...rest] = this.next;
      this.tokens[this.at] = rest.join("");
      return make("mn", {}, digit);
    }
    return row(this.atom());
  }

  /** The nodes of [...], or null. */
  optional() {
    this.skipSpace();
    if (this.next !== "[") return null;
    this.take("[");
    const nodes = this.list((token) => token === "]");
    this.take("]");
    return row(nodes);
  }

  /** The text of {...} as it is. */
  text() {
    this.skipSpace();
    this.take("{");
    let text = "";
    for (let open = 1; ; ) {
      const token = this.take();
      open += token === "{" ? 1 : token === "}" ? -1 : 0;
      if (!open) return text;
      text += /^\\[^a-zA-Z]$/.test(token) ? token[1] : token;
    }
  }

  delimiter() {
    this.skipSpace();
    const token = this.take();
    if (token === ".") return "";
    const bracket = BRACKETS[token] ?? (token.length === 1 ? token : null);
    if (bracket === null) throw new UnknownMath(token);
    return bracket;
  }

  // ---- Scripts ----

  /** An atom with its subscript and superscript. */
  scripted() {
    const command = this.next;
    const nodes = /^[_^']$/.test(command) ? [make("mrow", {})] : this.atom();
    let [below, above, primes] = [null, null, ""];
    for (this.skipSpace(); ; this.skipSpace()) {
      if (this.next === "_" && !below) below = (this.at++, this.argument());
      else if (this.next === "^" && !above) above = (this.at++, this.argument());
      else if (this.next === "'") primes += (this.at++, "′");
      else if (this.next === "\\limits" || this.next === "\\nolimits") this.at++;
      else break;
    }
    if (primes) above = row([operator(primes), ...(above ? [above] : [])]);
    const gap = FUNCTIONS.has(command.slice(1)) && !/^[([{^_]/.test(this.next ?? "(") ? [space("0.17em")] : [];
    if (!below && !above) return [...nodes, ...gap];
    const base = nodes.pop() ?? make("mrow", {});
    const hasLimits = LIMITS.has(command) || LARGE[command]?.hasLimits || /^(munder|mover)$/.test(base.localName);
    const [sub, sup, both] = hasLimits ? ["munder", "mover", "munderover"] : ["msub", "msup", "msubsup"];
    const scripts = [below, above].filter(Boolean);
    return [...nodes, make(below && above ? both : below ? sub : sup, {}, base, ...scripts), ...gap];
  }

  // ---- Atoms ----

  atom() {
    if (++this.depth > DEEPEST) throw new UnknownMath("too deep");
    const nodes = this.next === "{" ? [this.group()] : this.symbol(this.take());
    this.depth--;
    return nodes;
  }

  symbol(token) {
    if (token[0] === "\\" && token.length > 1) return this.command(token);
    if (/^[}&_^]$/.test(token)) throw new UnknownMath(token);
    if (token === "~") return [space("0.33em")];
    if (/^\d/.test(token)) return [make("mn", {}, styled(token, this.font))];
    if (/^\p{L}/u.test(token)) return [identifier(token, this.font)];
    const symbol = { "-": "−", "*": "∗" }[token] ?? token;
    if (token === "|") return [operator(token, { stretchy: "false", lspace: "0.06em", rspace: "0.06em" })];
    return [operator(symbol, /[()[\]/]/.test(token) ? { stretchy: "false" } : {})];
  }

  command(token) {
    const name = token.slice(1);
    if (token in IDENTIFIERS) return [make("mi", {}, IDENTIFIERS[token])];
    if (token in OPERATORS) return [operator(OPERATORS[token])];
    if (token in LARGE) return [operator(LARGE[token].symbol, LARGE[token].hasLimits ? { movablelimits: "true" } : {})];
    if (token in BRACKETS) return [operator(BRACKETS[token], { stretchy: "false" })];
    if (token in SPACES) return [space(SPACES[token])];
    if (token in ACCENTS) return [accent(this, ACCENTS[token])];
    if (token in FONTS) return [inFont(this, FONTS[token])];
    if (LIMITS.has(token)) return [operator(name.replace(/^lim(?=inf|sup)/, "lim "), NAMED_LIMITS)];
    if (FUNCTIONS.has(name)) return [functionName(name)];
    if (SIZES.test(token)) return [operator(this.delimiter(), { stretchy: "false" })];
    if (STYLES.has(token)) return [];
    if (Object.hasOwn(COMMANDS, name)) return [COMMANDS[name](this)];
    throw new UnknownMath(token);
  }
}

// ---- Commands ------------------------------------------------------------------------------------

const NAMED_LIMITS = { movablelimits: "true", lspace: "0", rspace: "0" };
const functionName = (text) => make("mi", { mathvariant: "normal" }, text);
const textNode = (parser) => make("mtext", {}, parser.text().replace(/^ | $/g, "\u00a0"));

function identifier(text, font) {
  return make("mi", font === "mathrm" ? { mathvariant: "normal" } : {}, styled(text, font));
}

function accent(parser, { symbol, isBelow }) {
  const tag = isBelow ? "munder" : "mover";
  return make(tag, isBelow ? { accentunder: "true" } : { accent: "true" }, parser.argument(), operator(symbol));
}

function inFont(parser, font) {
  const outer = parser.font;
  parser.font = font;
  const node = parser.argument();
  parser.font = outer;
  return node;
}

/** What \left begins, until \right. */
function fenced(parser) {
  const parts = [operator(parser.delimiter(), { stretchy: "true", form: "prefix" })];
  for (;;) {
    parts.push(...parser.list((token) => token === "\\right" || token === "\\middle"));
    const isEnd = parser.take() === "\\right";
    parts.push(operator(parser.delimiter(), isEnd ? { stretchy: "true", form: "postfix" } : { stretchy: "true" }));
    if (isEnd) return make("mrow", {}, ...parts);
  }
}

/** What \begin{name} begins, until \end{name}. */
function environment(parser) {
  const name = parser.text();
  const kind = ENVIRONMENTS[name.replace(/\*$/, "")];
  if (!kind) throw new UnknownMath(name);
  if (kind.hasColumns) parser.text(); // {lcr}
  const cells = parser.cells(() => parser.next === "\\end");
  parser.take("\\end");
  if (parser.text() !== name) throw new UnknownMath("another end");
  return table(cells, kind);
}

function fraction(parser, attributes = {}) {
  return make("mfrac", attributes, parser.argument(), parser.argument());
}

function binomial(parser) {
  return make("mrow", {}, operator("("), fraction(parser, { linethickness: "0" }), operator(")"));
}

/** A script over or under its base: \overset{script}{base}. */
function stacked(parser, tag) {
  const script = parser.argument();
  return make(tag, {}, parser.argument(), script);
}

const COMMANDS = {
  frac: fraction,
  dfrac: (parser) => make("mstyle", { displaystyle: "true" }, fraction(parser)),
  tfrac: (parser) => make("mstyle", { displaystyle: "false" }, fraction(parser)),
  cfrac: (parser) => make("mstyle", { displaystyle: "true" }, fraction(parser)),
  binom: binomial,
  dbinom: binomial,
  tbinom: binomial,
  sqrt: (parser) => {
    const degree = parser.optional();
    const base = parser.argument();
    return degree ? make("mroot", {}, base, degree) : make("msqrt", {}, base);
  },
  left: fenced,
  begin: environment,
  text: textNode,
  textrm: textNode,
  textit: textNode,
  textbf: textNode,
  texttt: textNode,
  mbox: textNode,
  operatorname: (parser) => functionName(parser.text()),
  "operatorname*": (parser) => make("munder", {}, functionName(parser.text()), make("mrow", {})),
  overset: (parser) => stacked(parser, "mover"),
  stackrel: (parser) => stacked(parser, "mover"),
  underset: (parser) => stacked(parser, "munder"),
  overline: (parser) => make("mrow", { class: "overline" }, parser.argument()),
  underline: (parser) => make("mrow", { class: "underline" }, parser.argument()),
  boxed: (parser) => make("mrow", { class: "boxed" }, parser.argument()),
  pmod: (parser) => make("mrow", {}, space("1em"), operator("("), functionName("mod"), space("0.33em"), parser.argument(), operator(")")),
  bmod: () => operator("mod", { lspace: "0.22em", rspace: "0.22em" }),
  not: (parser) => {
    const node = row(parser.atom());
    node.append("\u0338");
    return node;
  },
  tag: (parser) => make("mrow", {}, space("2em"), make("mtext", {}, `(${parser.text()})`)),
  label: (parser) => (parser.text(), make("mrow", {})),
};

function table(rows, { open = "", close = "", align = "center", isDisplay = false }) {
  const cell = (nodes, column) => {
    const side = align === "alternate" ? (column % 2 ? "left" : "right") : align;
    return make("mtd", { class: `math-${side}` }, ...nodes);
  };
  const body = rows.map((cells) => make("mtr", {}, ...cells.map(cell)));
  const node = make("mtable", { ...(isDisplay && { displaystyle: "true" }), class: align === "alternate" ? "aligned" : "" }, ...body);
  if (!open && !close) return node;
  const fence = (text, form) => (text ? [operator(text, { stretchy: "true", form })] : []);
  return make("mrow", {}, ...fence(open, "prefix"), node, ...fence(close, "postfix"));
}
