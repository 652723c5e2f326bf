"use strict";
// Show the values under the pointer, or step through them with the arrow keys. The page works without it.
const charts = JSON.parse(document.getElementById("points").textContent);

function nearest(points, x) {
  return points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
}

function attach(figure) {
  const { frame: [left, top, right, bottom], lines } = charts[figure.dataset.chart];
  const svg = figure.querySelector("svg");
  const places = [...new Set(lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  if (!places.length) return;
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  tip.setAttribute("role", "status");
  figure.append(tip);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  let at = -1;

  function row(colour, label, value) {
    const line = document.createElement("div");
    const dot = document.createElement("i");
    const name = document.createElement("span");
    const number = document.createElement("b");
    dot.style.background = colour;
    name.textContent = label;
    number.textContent = value;
    line.append(dot, name, number);
    return line;
  }

  function show(index) {
    at = Math.max(0, Math.min(places.length - 1, index));
    const x = places[at];
    const near = lines.map((line) => ({ ...line, point: nearest(line.points, x) }))
      .filter((line) => Math.abs(line.point[0] - x) < 0.06 * (right - left));
    near.sort((a, b) => a.point[1] - b.point[1]);
    const heading = document.createElement("div");
    const exact = near.find((line) => line.point[0] === x);
    heading.textContent = `${charts[figure.dataset.chart].x_label} ${exact.point[2]}`;
    tip.replaceChildren(heading, ...near.map((line) => {
      const elsewhere = line.point[2] === exact.point[2] ? "" : ` at ${line.point[2]}`;
      return row(line.colour, line.label + elsewhere, line.point[3]);
    }));
    for (const [name, value] of Object.entries({ x1: x, x2: x, y1: top, y2: bottom })) cursor.setAttribute(name, value);
    svg.append(cursor);
    tip.hidden = false;
    const scale = svg.clientWidth / svg.viewBox.baseVal.width;
    // Place the tip in the opposite corner, so that it does not cover the points.
    tip.style.left = x > (left + right) / 2 ? `${left * scale + 6}px` : `${right * scale - 6 - tip.offsetWidth}px`;
    tip.style.top = `${svg.getBoundingClientRect().top - figure.getBoundingClientRect().top + top * scale}px`;
  }

  function hide() {
    tip.hidden = true;
    cursor.remove();
  }

  function follow(event) {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    if (x < left - 8 || x > right + 8) return hide();
    show(places.indexOf(nearest(places.map((place) => [place]), x)[0]));
  }

  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", hide);
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!by) return;
    event.preventDefault();
    show(at < 0 ? (by > 0 ? 0 : places.length - 1) : at + by);
  });
}

document.querySelectorAll(".chart").forEach(attach);
document.documentElement.dataset.ready = "yes";
