// JSON values in the browser's storage, which may be full, disabled or hold anything.

import { toast } from "./dom.js";

export function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

export function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    toast("Could not save this chat: the browser's storage is full or disabled.");
  }
}
