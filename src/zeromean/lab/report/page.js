"use strict";

// A cell's leading number ("-1.67 to -0.72", "< 0.001", "40,000"), or NaN.
const leading = (text) => parseFloat(text.replace(/^[<\s]+|,/g, ""));

// Numbers by value, words by alphabet, empty cells last whatever the direction.
function compareCells(a, b, direction) {
  if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1);
  const [x, y] = [leading(a), leading(b)];
  const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  return direction * order;
}

function sortBy(head, heads) {
  const ascending = head.getAttribute("aria-sort") !== "ascending";
  const body = head.closest("table").tBodies[0];
  const text = (row) => row.cells[head.cellIndex].textContent.trim();
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  body.append(...[...body.rows].sort((a, b) => compareCells(text(a), text(b), ascending ? 1 : -1)));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(head, heads));
    head.append(button);
  }
}

for (const scales of document.querySelectorAll(".switch")) {
  scales.hidden = false;
  scales.addEventListener("click", (event) => {
    const scale = event.target.dataset.scale;
    if (!scale) return;
    for (const button of scales.children) button.setAttribute("aria-pressed", button.dataset.scale === scale);
    for (const plot of scales.closest("figure").querySelectorAll(".plot")) plot.hidden = plot.dataset.scale !== scale;
  });
}

// The key brings one arm forward in every chart; a second press brings all back.
const keys = [...document.querySelectorAll(".key button")];
const inked = [...document.querySelectorAll(".plot [fill^='var(--arm-'], .plot [stroke^='var(--arm-']")];
for (const key of keys) {
  key.addEventListener("click", () => {
    const on = key.getAttribute("aria-pressed") !== "true";
    for (const other of keys) other.setAttribute("aria-pressed", on && other.dataset.look === key.dataset.look);
    const own = `var(--arm-${key.dataset.look})`;
    for (const mark of inked) {
      mark.classList.toggle("dim", on && mark.getAttribute("fill") !== own && mark.getAttribute("stroke") !== own);
    }
  });
}

// Marks carry their value as a label; show it where the pointer is.
const tip = document.getElementById("tip");
document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest(".plot svg [aria-label]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("aria-label");
  const left = Math.min(event.clientX + 12, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${event.clientY + 16}px`;
});

const copy = document.querySelector(".copy");
copy.hidden = false;
copy.addEventListener("click", async () => {
  const command = document.querySelector(".command code");
  try {
    await navigator.clipboard.writeText(command.textContent);
    copy.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(command);
    copy.textContent = "Selected";
  }
});
