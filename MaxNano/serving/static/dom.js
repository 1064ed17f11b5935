// Nodes of the page: elements, icons, buttons, and the notes that appear for a moment.

export const $ = (id) => document.getElementById(id);

// On a touch screen, focus opens the keyboard.
export const focusInput = () => matchMedia("(hover: hover)").matches && $("input").focus();

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const ICONS = {
  plus: "M12 5v14M5 12h14",
  sliders: "M4 7h9M19 7h1M4 17h3M13 17h7M16 4.5v5M10 14.5v5",
  menu: "M4 7h16M4 12h16M4 17h16",
  panel: "M4 5h16v14H4zM10 5v14",
  dots: "M5 12h.01M12 12h.01M19 12h.01",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  down: "M12 5v14M6 13l6 6 6-6",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  close: "M6 6l12 12M18 6L6 18",
  clip: "M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4a3.4 3.4 0 0 1 5 5l-8.5 8.5a1.7 1.7 0 0 1-2.5-2.5L14.5 7.5",
  file: "M7 3h7l4 4v14H7zM14 3v4h4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  edit: "M5 19h3L19 8l-3-3L5 16zM14 7l3 3",
  save: "M12 4v11M7 11l5 5 5-5M5 20h14",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  again: "M20 5v5h-5M20 10a8 8 0 1 0 .5 4",
  calculator: "M6 3h12v18H6zM9 7h6M9 12h.01M12 12h.01M15 12h.01M9 16h.01M12 16h.01M15 16h.01",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon. Its list handles the click by `data-action`. Without `text`, the label is its name. */
export function button(name, label, action, { text = "", className = "quiet" } = {}) {
  const node = element("button", { type: "button", className, title: label }, icon(name), text);
  if (!text) node.setAttribute("aria-label", label);
  node.dataset.action = action;
  return node;
}

const CONTAINERS = ".message, .bubble, .actions, .branches";

/** Replace a node's children, except for those that stay the same: they keep focus, selection and scroll position. */
export function patch(parent, children) {
  const before = [...parent.childNodes];
  children.forEach((child, i) => {
    const old = before[i];
    if (!old) parent.append(child);
    else if (old.isEqualNode(child)) return;
    else if (old.nodeName === child.nodeName && old.matches?.(CONTAINERS) && child.matches(CONTAINERS)) {
      old.className = child.className;
      Object.assign(old.dataset, child.dataset);
      patch(old, [...child.childNodes]);
    } else old.replaceWith(child);
  });
  before.slice(children.length).forEach((old) => old.remove());
}

let toastTimer = 0;

/** Show a note for a moment, with a button that calls `undo`. */
export function toast(text, undo = null) {
  const revert = () => {
    $("toast").hidden = true;
    undo();
  };
  const buttons = undo ? [element("button", { type: "button", textContent: "Undo", onclick: revert })] : [];
  $("toast").replaceChildren(text, ...buttons);
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), undo ? 7000 : 3000);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied");
  } catch {
    toast("The browser blocked copying.");
  }
}

/** Save a text as a file of the visitor. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
