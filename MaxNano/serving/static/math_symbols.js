// The commands of LaTeX's math that stand for a symbol, a font, an accent or an environment.

/** {"\\name": value} of words "name value", which may stand for several names: "leq|le ≤". */
function commands(words) {
  const pairs = words.trim().split(/\s+/);
  const table = Object.create(null);
  for (let i = 0; i < pairs.length; i += 2) for (const name of pairs[i].split("|")) table[`\\${name}`] = pairs[i + 1];
  return table;
}

export const IDENTIFIERS = commands(`
  alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ nu ν
  xi ξ omicron ο pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω
  Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω
  infty ∞ partial ∂ nabla ∇ ell ℓ hbar ℏ Re ℜ Im ℑ emptyset|varnothing ∅ aleph ℵ imath ı jmath ȷ angle ∠ triangle △
  degree ° top ⊤ bot ⊥ wp ℘ square|Box □ blacksquare ■ checkmark ✓ dots|ldots|dotsc … cdots|dotsb ⋯ vdots ⋮ ddots ⋱
  % % $ $ # # & & _ _ pounds £`);

export const OPERATORS = commands(`
  times × cdot ⋅ div ÷ pm ± mp ∓ ast ∗ star ⋆ circ ∘ bullet ∙ oplus ⊕ ominus ⊖ otimes ⊗ odot ⊙ dagger † wr ≀
  leq|le ≤ geq|ge ≥ neq|ne ≠ approx ≈ equiv ≡ sim ∼ simeq ≃ cong ≅ propto ∝ ll ≪ gg ≫ lt < gt > leqslant ⩽ geqslant ⩾
  prec ≺ succ ≻ preceq ⪯ succeq ⪰ asymp ≍ doteq ≐ coloneqq ≔ triangleq ≜ lesssim ≲ gtrsim ≳
  in ∈ notin ∉ ni ∋ subset ⊂ supset ⊃ subseteq ⊆ supseteq ⊇ subsetneq ⊊ cup ∪ cap ∩ setminus ∖ uplus ⊎ sqcup ⊔
  land|wedge ∧ lor|vee ∨ lnot|neg ¬ forall ∀ exists ∃ nexists ∄ vdash ⊢ models|vDash ⊨ therefore ∴ because ∵
  to|rightarrow → gets|leftarrow ← Rightarrow ⇒ Leftarrow ⇐ leftrightarrow ↔ Leftrightarrow ⇔ implies ⟹ impliedby ⟸ iff ⟺
  longrightarrow ⟶ longleftarrow ⟵ Longrightarrow ⟹ mapsto ↦ longmapsto ⟼ uparrow ↑ downarrow ↓ nearrow ↗ searrow ↘
  hookrightarrow ↪ rightharpoonup ⇀ rightleftharpoons ⇌ mid ∣ nmid ∤ parallel ∥ perp ⊥ colon : prime ′ backslash \\ surd √`);

const large = (symbols, hasLimits) =>
  Object.fromEntries(Object.entries(commands(symbols)).map(([name, symbol]) => [name, { symbol, hasLimits }]));
export const LARGE = Object.assign(
  Object.create(null),
  large("sum ∑ prod ∏ coprod ∐ bigcup ⋃ bigcap ⋂ bigoplus ⨁ bigotimes ⨂ bigvee ⋁ bigwedge ⋀", true),
  large("int ∫ iint ∬ iiint ∭ oint ∮", false),
);

export const BRACKETS = commands(`{|lbrace { }|rbrace } langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉
  vert|lvert|rvert | Vert|lVert|rVert ‖ lbrack [ rbrack ]`);
BRACKETS["\\|"] = "‖";

export const FUNCTIONS = new Set(
  ("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan log ln lg exp lim limsup liminf max min sup inf det " +
    "gcd dim ker deg arg Pr hom").split(" "),
);
export const LIMITS = new Set("lim limsup liminf max min sup inf det gcd Pr".split(" ").map((name) => `\\${name}`));

const accents = (symbols, isBelow) =>
  Object.fromEntries(Object.entries(commands(symbols)).map(([name, symbol]) => [name, { symbol, isBelow }]));
export const ACCENTS = Object.assign(
  Object.create(null),
  accents("hat|widehat ^ bar ‾ vec|overrightarrow → tilde|widetilde ~ dot ˙ ddot ¨ check ˇ overbrace ⏞", false),
  accents("underbrace ⏟", true),
);

export const FONTS = commands(`mathbf|bm|boldsymbol|bf mathbf mathrm|rm|mathup mathrm mathit mathit mathbb|Bbb mathbb
  mathcal|cal|mathscr mathcal mathfrak mathfrak mathsf mathsf mathtt mathtt`);

export const SPACES = Object.assign(commands(", 0.17em : 0.22em ; 0.28em ! -0.17em > 0.22em quad 1em qquad 2em"), {
  "\\ ": "0.33em",
  "\\\n": "0.33em",
});

/** Sizes of a bracket, which follows. */
export const SIZES = /^\\[bB]igg?[lrm]?$/;

/** Commands without a node. */
export const STYLES = new Set("displaystyle textstyle scriptstyle nonumber notag limits nolimits hline".split(" ").map((name) => `\\${name}`));

export const ENVIRONMENTS = Object.assign(Object.create(null), {
  matrix: {},
  smallmatrix: {},
  pmatrix: { open: "(", close: ")" },
  bmatrix: { open: "[", close: "]" },
  Bmatrix: { open: "{", close: "}" },
  vmatrix: { open: "|", close: "|" },
  Vmatrix: { open: "‖", close: "‖" },
  cases: { open: "{", align: "left" },
  array: { hasColumns: true },
  aligned: { align: "alternate", isDisplay: true },
  align: { align: "alternate", isDisplay: true },
  split: { align: "alternate", isDisplay: true },
  equation: { isDisplay: true },
  gather: { isDisplay: true },
  gathered: { isDisplay: true },
});

// ---- Fonts ---------------------------------------------------------------------------------------

// The code points of A, a and 0 among Unicode's mathematical alphanumeric symbols; 0 has no such digits.
const ALPHABETS = {
  mathbf: [0x1d400, 0x1d41a, 0x1d7ce],
  mathbb: [0x1d538, 0x1d552, 0x1d7d8],
  mathcal: [0x1d49c, 0x1d4b6, 0],
  mathfrak: [0x1d504, 0x1d51e, 0],
  mathsf: [0x1d5a0, 0x1d5ba, 0x1d7e2],
  mathtt: [0x1d670, 0x1d68a, 0x1d7f6],
};
// Letters that Unicode had before.
const OLDER = {
  mathbb: { C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" },
  mathcal: { B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ" },
  mathfrak: { C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" },
};

/** Letters and digits in a font of FONTS. */
export function styled(text, font) {
  const alphabet = ALPHABETS[font];
  if (!alphabet) return text;
  return text.replace(/[A-Za-z0-9]/g, (character) => {
    const first = /[A-Z]/.test(character) ? "A" : /[a-z]/.test(character) ? "a" : "0";
    const start = alphabet["Aa0".indexOf(first)];
    const shift = character.charCodeAt(0) - first.charCodeAt(0);
    return OLDER[font]?.[character] ?? (start ? String.fromCodePoint(start + shift) : character);
  });
}
