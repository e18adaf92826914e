"use strict";
// Tables: a button in every head sorts by the cells' data-value, or by their text; what has no value stays at the end.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending", rows = [...body.rows];
      const numeric = rows.some((row) => row.cells[column].dataset.value !== undefined);
      const key = (row) => numeric ? parseFloat(row.cells[column].dataset.value) : row.cells[column].textContent;
      const order = (a, b) => {
        const x = key(a), y = key(b);
        if (!numeric) return (down ? -1 : 1) * x.localeCompare(y, undefined, { numeric: true });
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return down ? y - x : x - y;
      };
      rows.sort(order).forEach((row) => body.append(row));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}
// Animations: one picture holds the frames below each other and the panels side by side.
for (const box of document.querySelectorAll(".animation")) {
  const sheet = box.querySelector(".sheet"), canvases = [...box.querySelectorAll("canvas")];
  const button = box.querySelector("button"), slider = box.querySelector("input"), output = box.querySelector("output");
  const labels = box.dataset.labels.split("|"), last = labels.length - 1;
  let timer = null;
  const draw = () => {
    const frame = Number(slider.value);
    canvases.forEach((canvas, panel) => {
      const { width, height } = canvas;
      canvas.getContext("2d").drawImage(sheet, panel * width, frame * height, width, height, 0, 0, width, height);
    });
    output.value = labels[frame];
    slider.setAttribute("aria-valuetext", labels[frame]);
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  const tick = () => {
    if (Number(slider.value) >= last) return stop();
    slider.value = Number(slider.value) + 1;
    draw();
  };
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(slider.value) >= last) slider.value = 0;
    draw();
    timer = setInterval(tick, Math.max(60, Math.min(250, 5000 / (last + 1))));
    button.textContent = "Pause";
  });
  slider.addEventListener("input", () => { if (timer !== null) stop(); draw(); });
  sheet.decode().then(() => { draw(); box.dataset.drawn = "true"; });
}
// A link to a folded run opens it.
const unfold = () => {
  const folded = document.getElementById(location.hash.slice(1))?.querySelector(":scope > details");
  if (folded) folded.open = true;
};
addEventListener("hashchange", unfold);
unfold();
document.documentElement.dataset.ready = "true";
