// A text field with a list of classes below it, after the ARIA authoring practices' editable combobox.

const MOST_SHOWN = 200; // a thousand rows per keystroke would be felt

/** How well a class fits what was typed: smaller is better, Infinity is not at all. */
function rank(entry, typed) {
  if (String(entry.id) === typed || entry.wnid === typed) return 0;
  if (entry.synonyms.includes(typed)) return 1;
  const at = entry.lower.indexOf(typed);
  if (at === 0) return 2;
  if (at > 0) return /[\s,-]/.test(entry.lower[at - 1]) ? 3 : 4;
  if (String(entry.id).startsWith(typed) || entry.wnid?.includes(typed)) return 5;
  return Infinity;
}

/** The classes that fit what was typed, best first, in the order of their ids otherwise. */
export function findClasses(classes, text) {
  const typed = text.trim().toLowerCase();
  if (!typed) return classes;
  return classes
    .map((entry) => [rank(entry, typed), entry])
    .filter(([score]) => score < Infinity)
    .sort((a, b) => a[0] - b[0] || a[1].id - b[1].id)
    .map(([, entry]) => entry);
}

/** An option of the list: name, wnid, id. */
function option(entry, chosen) {
  const row = document.createElement("li");
  row.id = `class-option-${entry.id}`;
  row.role = "option";
  row.dataset.id = entry.id;
  row.ariaSelected = String(entry === chosen);
  for (const [kind, text] of [["id", entry.id], ["name", entry.name], ["wnid", entry.wnid ?? ""]]) {
    const part = row.appendChild(document.createElement("span"));
    part.className = kind;
    part.textContent = text;
  }
  return row;
}

export class ClassCombobox {
  /** Takes the input, its list, and what to call when the choice or the text changes. */
  constructor(input, list, changed) {
    Object.assign(this, { input, list, changed, classes: [], chosen: null, active: -1 });
    input.addEventListener("input", () => { this.chosen = null; this.open(); changed(); });
    input.addEventListener("click", () => this.open());
    input.addEventListener("focus", () => input.select());
    input.addEventListener("blur", () => { this.settle(); this.close(); });
    input.addEventListener("keydown", (event) => this.key(event));
    list.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
    list.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row) this.choose(this.classes.find((entry) => entry.id === Number(row.dataset.id)));
    });
  }

  /** Takes the model's classes, [{id, name, wnid}]. */
  setClasses(classes) {
    this.classes = classes.map((entry) => ({
      ...entry,
      lower: entry.name.toLowerCase(),
      synonyms: entry.name.toLowerCase().split(",").map((synonym) => synonym.trim()),
    }));
  }

  /** Chooses a class and shows it as "name (id)", without its synonyms. */
  choose(entry) {
    this.chosen = entry;
    this.input.value = `${entry.name.split(",")[0].trim()} (${entry.id})`;
    this.close();
    this.changed();
  }

  /** Shows a text that is no class, for the server to explain. */
  type(text) {
    this.chosen = null;
    this.input.value = text;
    this.changed();
  }

  /** A text that names one class only, by id, wnid or name, is that class. */
  settle() {
    const typed = this.input.value.trim().toLowerCase();
    if (this.chosen || !typed) return;
    const same = this.classes.filter((entry) => rank(entry, typed) <= 1);
    if (same.length === 1) this.choose(same[0]);
  }

  open() {
    const found = findClasses(this.classes, this.chosen ? "" : this.input.value);
    const from = this.chosen ? Math.max(0, found.indexOf(this.chosen) - MOST_SHOWN / 2) : 0;
    const shown = found.slice(from, from + MOST_SHOWN);
    this.list.replaceChildren(...shown.map((entry) => option(entry, this.chosen)));
    if (found.length > shown.length || !found.length) {
      const note = this.list.appendChild(document.createElement("li"));
      note.className = "list-note";
      note.role = "presentation";
      note.textContent = found.length ? `${found.length - shown.length} more; type to narrow them down` : "No class fits";
    }
    this.list.hidden = this.classes.length === 0;
    this.input.ariaExpanded = String(!this.list.hidden);
    this.activate(this.chosen ? shown.indexOf(this.chosen) : this.input.value.trim() && shown.length ? 0 : -1);
  }

  close() {
    this.list.hidden = true;
    this.input.ariaExpanded = "false";
    this.input.removeAttribute("aria-activedescendant");
    this.active = -1;
  }

  /** Marks the row that Enter chooses; -1 is none. */
  activate(index) {
    const rows = this.list.querySelectorAll("[role=option]");
    rows[this.active]?.classList.remove("active");
    this.active = index;
    if (index < 0 || !rows[index]) return this.input.removeAttribute("aria-activedescendant");
    rows[index].classList.add("active");
    rows[index].scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", rows[index].id);
  }

  key(event) {
    const rows = this.list.querySelectorAll("[role=option]");
    const isOpen = !this.list.hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!isOpen) return this.open();
      const step = event.key === "ArrowDown" ? 1 : -1;
      const start = this.active < 0 && step < 0 ? 0 : this.active;
      if (rows.length) this.activate((start + step + rows.length) % rows.length);
    } else if (event.key === "Enter" && isOpen && this.active >= 0) {
      event.preventDefault(); // chooses; the next Enter generates
      this.choose(this.classes.find((entry) => entry.id === Number(rows[this.active].dataset.id)));
    } else if (event.key === "Escape" && isOpen) {
      event.preventDefault();
      this.close();
    } else if (event.key === "Escape") {
      this.type("");
    } else if (event.key === "Tab" && isOpen && this.active >= 0 && !this.chosen) {
      this.choose(this.classes.find((entry) => entry.id === Number(rows[this.active].dataset.id)));
    }
  }
}
