// The page of a report. Everything shown comes from the JSON in it, and names are text, never HTML.
"use strict";

const made = (tag, { text, cls, ...rest } = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), rest);
  if (text !== undefined) element.textContent = text;
  if (cls) element.className = cls;
  element.append(...children);
  return element;
};
const all = (query, within = document) => [...within.querySelectorAll(query)];

// files

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  made("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
// what a spreadsheet would take for a formula is kept as text
const cell = (value) => {
  let text = value === null || value === undefined ? "" : String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
const csv = (rows) => rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";

// light and dark

const root = document.documentElement;
let dark = matchMedia("(prefers-color-scheme: dark)").matches;
let printing = false; // on paper everything is light
const toggle = document.getElementById("theme");
function paint() {
  root.dataset.theme = dark ? "dark" : "light";
  toggle.textContent = dark ? "Light" : "Dark";
  toggle.setAttribute("aria-pressed", String(dark));
}
toggle.addEventListener("click", () => {
  dark = !dark;
  paint();
  drawn.forEach((_, figure) => draw(figure));
});
paint();

// figures

const page = JSON.parse(document.getElementById("page").textContent);
const drawn = new Map(); // figure element -> Vega view
const MANY = 3000; // marks above which a canvas is faster than SVG

async function draw(figure) {
  const { spec, rows } = page.figures[figure.dataset.figure];
  const config = dark && !printing ? page.dark : page.light;
  const before = drawn.get(figure);
  drawn.set(figure, null);
  const { view } = await vegaEmbed(
    figure.querySelector(".plot"),
    { ...structuredClone(spec), datasets: { rows: structuredClone(rows) }, config },
    { actions: false, ast: true, renderer: rows.length > MANY ? "canvas" : "svg" },
  );
  if (before) before.finalize();
  drawn.set(figure, view);
}
const shown = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting && !drawn.has(target)) draw(target);
  }
}, { rootMargin: "400px" });
for (const figure of all("figure[data-figure]")) {
  shown.observe(figure);
  const { rows } = page.figures[figure.dataset.figure];
  figure.querySelector(".svg").addEventListener("click", async () => {
    if (!drawn.get(figure)) await draw(figure);
    save(`${figure.id}.svg`, "image/svg+xml", await drawn.get(figure).toSVG());
  });
  figure.querySelector(".csv").addEventListener("click", () => {
    const heads = Object.keys(rows[0] ?? {});
    save(`${figure.id}.csv`, "text/csv", csv([heads, ...rows.map((row) => heads.map((k) => row[k]))]));
  });
}
addEventListener("beforeprint", () => {
  printing = true;
  for (const figure of all("figure[data-figure]")) if (dark || !drawn.has(figure)) draw(figure);
});
addEventListener("afterprint", () => {
  printing = false;
  if (dark) drawn.forEach((_, figure) => draw(figure));
});

// tabs: one run's maps at a time

for (const tabs of all(".tabs")) {
  const buttons = all("button", tabs);
  const choose = (chosen) => {
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button === chosen));
      document.getElementById(button.dataset.shows).hidden = button !== chosen;
    }
  };
  for (const button of buttons) button.addEventListener("click", () => choose(button));
  choose(buttons[0]);
}

// small tables: sorted by a click on a head

const number = (text) => {
  const value = parseFloat(text.replaceAll(",", ""));
  return Number.isNaN(value) ? null : value;
};
for (const table of all("table.sorted")) {
  const body = table.tBodies[0];
  const heads = all("thead th", table);
  heads.forEach((head, column) => {
    let down = false;
    head.querySelector("button").addEventListener("click", () => {
      down = !down;
      const numeric = head.classList.contains("number");
      const key = (row) => (numeric ? number(row.cells[column].textContent) : row.cells[column].textContent);
      const rows = [...body.rows].sort((a, b) => order(key(a), key(b), down && numeric));
      if (!down && !numeric) rows.reverse();
      body.append(...rows);
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down === numeric ? "descending" : "ascending");
    });
  });
  table.closest("section").querySelector(`[data-csv="${table.id}"]`).addEventListener("click", () => {
    const rows = [...table.rows].map((row) => [...row.cells].map((c) => c.textContent));
    save(`${table.id}.csv`, "text/csv", csv(rows));
  });
}
function order(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null); // what has no value comes last
  const found = typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0;
  return down ? -found : found;
}

// the table of all tensors: only the lines in sight are in the document

const LINE = 26;
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
async function tensors() {
  const place = document.getElementById("every-tensor");
  if (!place) return;
  const data = await unpacked("table");
  const size = data.name.length;
  const plain = (value) => (value === null ? "" : value.toLocaleString("en"));
  const longest = data.name.reduce((most, name) => Math.max(most, name.length), 0);
  const columns = [
    { head: "tensor", least: Math.max(120, Math.min(24 + 7.5 * longest, 520, 0.6 * innerWidth)), share: "4fr", value: (i) => data.name[i], lower: true },
    { head: "dtype", least: 90, value: (i) => data.dtype[i], lower: true },
    { head: "shape", least: 130, value: (i) => data.shape[i], lower: true },
    { head: "elements", least: 130, value: (i) => data.elements[i], shown: plain },
  ];
  page.runs.forEach((run, r) => {
    const many = page.runs.length > 1;
    const sized = { least: 130, share: "1fr" };
    columns.push({ head: many ? `${run}: changed` : "changed", ...sized, value: (i) => data.changed[r][i], shown: plain });
    columns.push({
      head: many ? `${run}: density` : "density",
      value: (i) => (data.changed[r][i] === null ? null : data.elements[i] ? data.changed[r][i] / data.elements[i] : 0),
      shown: percent, bar: true, ...sized,
    });
  });
  const lowered = data.name.map((name) => name.toLowerCase());
  const grid = columns.map(({ least, share }) => `minmax(${least}px, ${share ?? `${least}px`})`).join(" ");
  const least = `${columns.reduce((sum, column) => sum + column.least, 0)}px`;
  let found = Array.from({ length: size }, (_, i) => i);
  let by = null;
  let down = false;

  const rows = place.querySelector(".rows");
  const heads = made("div", { cls: "line heads", role: "row" });
  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  for (const element of [heads, rows]) element.style.minWidth = least;
  heads.style.gridTemplateColumns = grid;
  columns.forEach((column) => {
    const button = made("button", { text: column.head, title: `sort by ${column.head}` });
    button.addEventListener("click", () => {
      // numbers largest first, then smallest first, then as in the model; text the other way round
      if (by !== column) [by, down] = [column, !column.lower];
      else if (down === !column.lower) down = !down;
      else by = null;
      arrange();
    });
    const head = made("div", { role: "columnheader", cls: column.lower ? "" : "number" }, button);
    column.element = head;
    heads.append(head);
  });
  place.prepend(heads);

  function arrange() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = [];
    for (let i = 0; i < size; i++) if (words.every((word) => lowered[i].includes(word))) found.push(i);
    if (by) {
      const keys = found.map(by.value);
      const order_ = found.map((_, k) => k).sort((a, b) => order(keys[a], keys[b], down) || a - b);
      found = order_.map((k) => found[k]);
    }
    for (const column of columns) {
      if (column === by) column.element.setAttribute("aria-sort", down ? "descending" : "ascending");
      else column.element.removeAttribute("aria-sort");
    }
    rows.style.height = `${found.length * LINE}px`;
    count.textContent = found.length === size ? `${plain(size)} tensors` : `${plain(found.length)} of ${plain(size)} tensors`;
    lay();
  }
  function lay() {
    const first = Math.max(0, Math.floor(place.scrollTop / LINE) - 8);
    const last = Math.min(found.length, first + Math.ceil(place.clientHeight / LINE) + 16);
    const lines = [];
    for (let k = first; k < last; k++) {
      const line = made("div", { cls: "line", role: "row" });
      line.style.gridTemplateColumns = grid;
      line.style.top = `${k * LINE}px`;
      for (const column of columns) {
        const value = column.value(found[k]);
        const text = column.shown ? column.shown(value) : value;
        const box = made("div", { role: "cell", text, title: text, cls: column.lower ? "" : "number" });
        if (column.bar && value) {
          box.classList.add("bar");
          box.style.setProperty("--share", `${(100 * value).toFixed(2)}%`);
        }
        line.append(box);
      }
      lines.push(line);
    }
    rows.replaceChildren(...lines);
  }
  let waiting = false;
  place.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; lay(); });
  });
  filter.addEventListener("input", () => { place.scrollTop = 0; arrange(); });
  addEventListener("resize", lay);
  document.getElementById("csv").addEventListener("click", () => {
    const lines = found.map((i) => columns.map((column) => column.value(i)));
    save("tensors.csv", "text/csv", csv([columns.map((column) => column.head), ...lines]));
  });
  arrange();
  place.dataset.ready = "yes";
}
function percent(value) {
  if (value === null) return "";
  if (value === 0) return "0 %";
  if (value === 1) return "100 %";
  const shown = 100 * value;
  if (shown < 0.01) return `${shown.toPrecision(2)} %`;
  for (let digits = 2; digits < 13; digits++) {
    const text = shown.toFixed(digits);
    if (Number(text) !== 100) return `${text} %`;
  }
  return `${shown} %`;
}
tensors();
