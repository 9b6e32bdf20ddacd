"use strict";
const { charts, runs } = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
const slider = document.getElementById("smoothing");
const redraws = [];
const redraw = () => redraws.forEach((draw) => draw());

function make(name, attributes = {}, ...children) {
  const isSvg = ["svg", "g", "path", "line", "text", "circle", "title"].includes(name);
  const node = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const short = (value) => {
  if (value === null || value === undefined) return "not finite";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-4)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(+value.toPrecision(4));
};

// The mean so far, in which what lies back counts less and less; the first values are not drawn to zero.
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function ticks(low, high, isLog, count) {
  if (isLog && high / low > 8) {
    const factors = high / low > 300 ? [1] : high / low > 40 ? [1, 3] : [1, 2, 5];
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const factor of factors) found.push(factor * 10 ** power);
    }
    return found.filter((tick) => tick >= low && tick <= high);
  }
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

function linesOf(names, isExact) {
  return runs.flatMap((run, number) => hidden.has(number) ? [] : names.filter((name) => name in run.series).map((name) => {
    const { steps, values } = run.series[name], isMean = !isExact && +slider.value > 0;
    return { run, number, steps, values, isMean, mean: isMean ? smoothed(values, +slider.value) : values };
  }));
}

function bounds(lines, isLog) {
  const values = lines.flatMap((line) => line.values).filter((value) => value !== null && (!isLog || value > 0));
  let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!values.length) return [0.1, 1];
  if (low === high) [low, high] = isLog ? [low / 2, high * 2] : [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  const room = (high - low) * 0.04;
  return isLog ? [low / 1.05, high * 1.05] : [low >= 0 ? Math.max(low - room, 0) : low - room, high + room];
}

function plot(box, { name, names, title, isExact, isSmall, isLog: asksForLog }) {
  const svg = make("svg", { role: "img", tabindex: 0 }), output = make("output", { class: "values" });
  box.append(...(isSmall ? [output, svg] : [svg, output]));
  let cursor = null, move = () => {}, drawnWidth = 0;
  function draw() {
    const isLog = asksForLog(), lines = linesOf([name], isExact), family = linesOf(names, isExact), [low, high] = bounds(family, isLog);
    const width = box.clientWidth, height = isSmall ? 110 : 230, left = isSmall ? 38 : 48, right = 8, top = 8, bottom = 20;
    const steps = family.flatMap((line) => line.steps);
    const first = steps.reduce((a, b) => Math.min(a, b), Infinity), last = steps.reduce((a, b) => Math.max(a, b), 1);
    const x = (step) => left + (width - left - right) * (last > first ? (step - first) / (last - first) : 0.5);
    const place = isLog ? (value) => Math.log(value / low) / Math.log(high / low) : (value) => (value - low) / (high - low);
    const y = (value) => height - bottom - (height - top - bottom) * place(value);
    const isDrawn = (value) => value !== null && (!isLog || value > 0);
    drawnWidth = width;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.setAttribute("aria-label", `${title}: ` + (lines.map((line) =>
      `${line.run.name}, ${line.steps.length} points, from ${short(line.values[0])} to ${short(line.values.at(-1))}`).join("; ") || "no points"));
    if (!steps.length || width <= left + right) return;
    for (const tick of ticks(low, high, isLog, isSmall ? 3 : 5)) {
      svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
      svg.append(make("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    if (last > first) for (const tick of ticks(first, last, false, isSmall ? 3 : width / 110)) {
      if (!Number.isInteger(tick)) continue;
      const anchor = x(tick) > width - 30 ? "end" : "middle";
      svg.append(make("text", { x: x(tick), y: height - 4, "text-anchor": anchor }, tick.toLocaleString("en")));
    }
    for (const line of lines) for (const step of line.run.restarts) {
      if (step < first || step > last) continue;
      const mark = make("line", { class: `restart run${line.number}`, x1: x(step), x2: x(step), y1: top, y2: height - bottom });
      mark.append(make("title", {}, `${line.run.name} went back to update ${step}`));
      svg.append(mark);
    }
    for (const line of lines) {
      const group = make("g", { class: `run${line.number}` });
      const trace = (values) => {
        let isDown = false;
        return values.map((value, i) => {
          if (!isDrawn(value)) { isDown = false; return ""; }
          const command = isDown ? "L" : "M";
          isDown = true;
          return `${command}${x(line.steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
        }).join("");
      };
      if (line.isMean) group.append(make("path", { class: "raw", d: trace(line.values) }));
      group.append(make("path", { d: trace(line.mean) }));
      if (line.values.length <= 40) line.values.forEach((value, i) => {
        if (isDrawn(value)) group.append(make("circle", { cx: x(line.steps[i]), cy: y(value), r: isSmall ? 2 : 2.6 }));
      });
      svg.append(group);
    }
    const bar = svg.appendChild(make("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" }));
    move = (step) => {
      cursor = step === null ? null : Math.min(Math.max(step, first), last);
      bar.setAttribute("visibility", cursor === null ? "hidden" : "visible");
      const found = cursor === null ? [] : lines.map((line) => {
        const nearest = line.steps.reduce((best, other, i) => Math.abs(other - cursor) < Math.abs(line.steps[best] - cursor) ? i : best, 0);
        return { line, step: line.steps[nearest], value: line.values[nearest], mean: line.mean[nearest] };
      });
      if (found.length) for (const end of ["x1", "x2"]) bar.setAttribute(end, x(found[0].step));
      const at = found[0]?.step;
      output.textContent = (found.length && !isSmall ? `at ${at.toLocaleString("en")}: ` : "") + found.map(({ line, step, value, mean }) =>
        (runs.length > 1 ? `${line.run.name} ` : "") + short(value) + (line.isMean ? ` (${short(mean)})` : "")
        + (step === at ? "" : ` at ${step.toLocaleString("en")}`)).join(" · ");
    };
    svg.onpointermove = (event) => {
      const place = (event.clientX - svg.getBoundingClientRect().left - left) / (width - left - right);
      move(first + place * (last - first));
    };
    svg.onpointerleave = svg.onblur = () => move(null);
    svg.onkeydown = (event) => {
      const towards = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!towards) return;
      event.preventDefault();
      const ahead = towards * Math.max((last - first) / 50, 1);
      move(cursor === null ? (ahead > 0 ? first : last) : cursor + ahead);
    };
  }
  redraws.push(draw);
  new ResizeObserver(() => box.clientWidth !== drawnWidth && draw()).observe(box);
}

for (const { title, panels, log, exact } of charts) {
  const names = panels.map((panel) => panel.name), isMany = panels.length > 1;
  const blocks = Math.max(...runs.flatMap((run) => names.map((name) => run.series[name]?.block ?? 1)));
  const all = runs.flatMap((run) => names.flatMap((name) => run.series[name]?.values ?? []));
  const check = make("input", { type: "checkbox" });
  check.disabled = all.some((value) => value !== null && value <= 0);
  check.checked = log && !check.disabled;
  check.addEventListener("change", redraw);
  const chart = make("figure", { class: isMany ? "chart many" : "chart" }, make("figcaption", {},
    blocks > 1 ? `${title} (a point: mean of ${blocks})` : title, make("label", {}, check, " log scale")));
  document.getElementById("charts").append(chart);
  const grid = isMany ? chart.appendChild(make("div", { class: "panels" })) : chart;
  for (const { name, label } of panels) {
    const box = isMany ? grid.appendChild(make("div", {}, make("h4", {}, label))) : chart;
    plot(box, { name, names, isExact: exact, isSmall: isMany, isLog: () => check.checked, title: isMany ? `${title}, ${label}` : title });
  }
}

slider?.addEventListener("input", () => {
  document.getElementById("smoothed").textContent = (+slider.value).toFixed(2);
  redraw();
});

const legend = document.getElementById("legend");
if (legend) runs.forEach((run, number) => {
  const button = legend.appendChild(make("button", { type: "button", class: `run run${number}`, "aria-pressed": true }, run.name));
  button.addEventListener("click", () => {
    if (!hidden.delete(number)) hidden.add(number);
    button.setAttribute("aria-pressed", !hidden.has(number));
    redraw();
  });
});

// Videos play while they are in view, those of a row together; not at once for whoever wants no motion.
const videos = [...document.querySelectorAll("video")], inView = new Set(), play = document.getElementById("play");
let isPlaying = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const update = () => {
  for (const video of videos) {
    if (isPlaying && inView.has(video)) video.play().catch(() => {});
    else video.pause();
  }
  if (play) play.textContent = isPlaying ? "Pause all" : "Play all";
  play?.setAttribute("aria-pressed", isPlaying);
};
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) isIntersecting ? inView.add(target) : inView.delete(target);
  update();
});
for (const video of videos) {
  observer.observe(video);
  const toggle = () => video.paused ? video.play() : video.pause();
  video.addEventListener("click", toggle);
  video.addEventListener("keydown", (event) => {
    if (event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    toggle();
  });
}
play?.addEventListener("click", () => {
  isPlaying = !isPlaying;
  update();
});
update();
