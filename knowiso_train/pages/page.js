"use strict";
(() => {
  const root = document.documentElement;

  // Theme: that of the system, until the button is pressed
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);
  label();
  button.hidden = false;

  // Sortable tables: each head becomes a button. Numbers are compared as numbers; missing ones stay last.
  const collator = new Intl.Collator("en", { numeric: true });
  const compare = {
    number: (a, b) => Number(a) - Number(b),
    text: (a, b) => collator.compare(a, b),
  };
  const key = (row, column, kind) => {
    const cell = row.cells[column];
    return kind === "number" ? cell.dataset.value : cell.textContent.trim();
  };
  const sort = (head, column) => {
    const table = head.closest("table");
    const kind = head.dataset.sort;
    // Large numbers first, names from a to z
    const first = kind === "number" ? "descending" : "ascending";
    const second = kind === "number" ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows];
    const known = rows.filter((row) => key(row, column, kind) !== undefined);
    const missing = rows.filter((row) => key(row, column, kind) === undefined);
    known.sort((a, b) => sign * compare[kind](key(a, column, kind), key(b, column, kind)));
    table.tBodies[0].append(...known, ...missing);
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const inner = document.createElement("button");
      inner.type = "button";
      inner.append(...head.childNodes);
      inner.addEventListener("click", () => sort(head, column));
      head.append(inner);
    });
  }

  // Printing shows what is folded, except long tables
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open], .unprinted)")];
    for (const item of folded) item.open = true;
  });
  addEventListener("afterprint", () => { for (const item of folded) item.open = false; });
})();
