"""Scores and studies -> one self-contained HTML page: opens from disk, asks no network, shows all text as text.

The data is one JSON island; the script makes every node with textContent, and a study's only when it comes into view.
"""

import base64
import html
import io
import json
import math
import warnings
from pathlib import Path

from PIL import Image

from plumbing.cli import atomic
from plumbing.image import load_image

SIDE = 224  # pixels of a thumbnail's longer side: some 6 kB each


def thumbnail(path: Path) -> str:
    """An image file -> a small grey JPEG as a data URI."""
    source = path
    if path.suffix.lower() in (".jpg", ".jpeg") and path.is_file():
        source = Image.open(path)
        source.draft("L", (2 * SIDE, 2 * SIDE))  # decodes at an eighth where that is enough: ten times faster
    image = load_image(source).convert("L")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnails(paths, folder, show=lambda *_: None) -> dict[str, str]:
    """{path: data URI} of those that can be read; one warning counts the others."""
    found, failed, paths = {}, [], sorted(set(paths))
    for i, path in enumerate(paths, 1):
        try:
            found[path] = thumbnail(Path(folder) / path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            failed.append(f"{path}: {error}")
        show(i, len(paths))
    if failed:
        counts = f"{len(failed):,} of {len(paths):,} images are not on the page"
        warnings.warn(f"{counts} (first: {failed[0]})", stacklevel=2)
    return found


def write(path, title, subtitle, groups, scores, metrics, studies, words, folder=None, show=lambda *_: None):
    """Write the page.

    groups: {name: number of studies}; scores: a list of {"key", "note", "values": {group: [value, low, high]}};
    metrics: names of the studies' values; studies: a list of {"id", "prior": has one, "prompt", "reference",
    "prediction", "images": paths, "values"}; words: those of change; folder: where the paths begin, None: no images.
    """
    wanted = [image for study in studies for image in study["images"]] if folder is not None else []
    images = thumbnails(wanted, folder, show)
    places = {image: i for i, image in enumerate(images)}
    data = {
        "groups": groups, "scores": scores, "metrics": metrics, "words": words, "images": list(images.values()),
        "studies": [study | {"images": [places.get(image) for image in study["images"]]} for study in studies],
    }  # fmt: skip
    island = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag can begin
    page = PAGE.replace("<!--TITLE-->", html.escape(title)).replace("<!--SUBTITLE-->", html.escape(subtitle))
    with atomic(path) as file:
        file.write(page.replace("<!--DATA-->", island))


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title><!--TITLE--></title>
<style>
:root {
  color-scheme: light dark;
  --page: #f5f6f7; --card: #fff; --line: #dfe2e6; --text: #1d2126; --dim: #69717b; --accent: #0b7285;
  --missed: #ffe3b3; --added: #e6dcff; --track: #e9ecef;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #131619; --card: #1b1f24; --line: #2d333a; --text: #dfe3e8; --dim: #8d97a3; --accent: #4fc3d5;
  --missed: #5a4312; --added: #453275; --track: #2a3037;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
header, section { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { margin: 0; font-size: 25px; line-height: 1.25; overflow-wrap: anywhere; }
p { margin: 4px 0 20px; color: var(--dim); overflow-wrap: anywhere; }
.sheet { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 16px; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--dim); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 600; }
small { display: block; max-width: 74ch; color: var(--dim); font-weight: 400; font-size: 12px; line-height: 1.4; }
td { min-width: 170px; white-space: nowrap; }
td i { color: var(--dim); font-style: normal; font-size: 13px; }
.track { position: relative; height: 4px; margin-top: 7px; border-radius: 2px; background: var(--track); }
.track b, .track u { position: absolute; top: 0; height: 4px; border-radius: 2px; background: var(--accent); }
.track b { min-width: 2px; opacity: .45; }
.track u { top: -2px; width: 3px; height: 8px; margin-left: -1px; }
#histograms { display: flex; flex-wrap: wrap; gap: 10px; margin-top: 14px; }
#histograms button { flex: 1 1 130px; max-width: 240px; padding: 10px 12px 8px; text-align: left; cursor: pointer; }
#histograms button[aria-pressed=true] { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent); }
#histograms svg { display: block; width: 100%; height: 46px; margin: 6px 0 2px; }
#histograms rect { fill: var(--accent); }
#histograms span { display: flex; justify-content: space-between; color: var(--dim); font-size: 11px; }
button, select, input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.tools { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 8px 10px; align-items: center;
  margin: 22px 0 0; padding: 10px 0; background: var(--page); }
.tools input { flex: 1 1 220px; padding: 7px 12px; }
.tools select, .tools button { padding: 7px 10px; cursor: pointer; }
.tools output { color: var(--dim); white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; font-size: 13px; color: var(--dim); }
article { content-visibility: auto; contain-intrinsic-size: auto 300px; min-height: 120px; margin-bottom: 12px;
  padding: 12px 16px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.head { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; font-size: 13px; color: var(--dim);
  font-variant-numeric: tabular-nums; }
.head b { color: var(--text); font-size: 14px; overflow-wrap: anywhere; }
.head .now { color: var(--accent); font-weight: 600; }
.body { display: grid; grid-template: auto 1fr / auto 1fr 1fr; gap: 8px 20px; margin-top: 10px; }
.images { display: flex; gap: 8px; grid-row: span 2; }
figure { width: 150px; margin: 0; }
figure img, figure div { display: block; width: 150px; height: 150px; object-fit: contain; background: #000;
  border-radius: 6px; }
figure div { background: none; border: 1px dashed var(--line); }
figcaption, h4 { margin: 0 0 3px; font-size: 12px; font-weight: 500; color: var(--dim); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { grid-column: 2 / -1; font-size: 13px; color: var(--dim); white-space: pre-wrap; overflow-wrap: anywhere; }
mark { padding: 1px 0; border-radius: 2px; color: inherit; background: none; }
.missed { background: var(--missed); }
.added { background: var(--added); }
.change { font-weight: 650; text-decoration: underline 2px var(--accent); text-underline-offset: 3px; }
@media (max-width: 820px) {
  .body { grid-template: none / 1fr; }
  .images { grid-row: auto; }
  .prompt { grid-column: auto; }
}
</style>
</head>
<body>
<header><h1><!--TITLE--></h1><p><!--SUBTITLE--></p></header>
<section><div class="sheet"><table id="scores"></table></div><div id="histograms"></div></section>
<section>
<div class="tools">
  <input id="search" type="search" placeholder="Search id, prompt, reference, prediction" aria-label="Search">
  <select id="group" aria-label="Studies"></select>
  <select id="metric" aria-label="Sort by"></select>
  <button id="order" type="button"></button>
  <output id="count"></output>
</div>
<div class="legend">
  <span><mark class="missed">words</mark> of the reference alone</span>
  <span><mark class="added">words</mark> of the prediction alone</span>
  <span><mark class="change">words</mark> of change</span>
</div>
<div id="list"></div>
</section>
<script type="application/json" id="data"><!--DATA--></script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const change = new Set(data.words);

function make(parent, tag, text, name) {  // all text goes through textContent
  const node = parent.appendChild(document.createElement(tag));
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}

// ---- scores

function drawScores() {
  const table = $("scores"), groups = Object.entries(data.groups);
  const head = make(make(table, "thead"), "tr");
  make(head, "th", "score [95 % interval]");
  for (const [name, size] of groups) make(head, "th", `${name} (${size.toLocaleString("en")})`);
  const body = make(table, "tbody");
  for (const score of data.scores) {
    const row = make(body, "tr"), title = make(row, "th", score.key);
    make(title, "small", score.note);
    for (const [name] of groups) {
      const cell = make(row, "td"), found = score.values[name];
      if (!found) continue;
      const [value, low, high] = found;
      make(cell, "span", value.toFixed(2));
      if (low === null) continue;
      make(cell, "i", `  [${low.toFixed(2)}, ${high.toFixed(2)}]`);
      if (low < 0 || high > 100) continue;
      const track = make(cell, "div", "", "track"), range = make(track, "b"), dot = make(track, "u");
      range.style.left = low + "%";
      range.style.width = high - low + "%";
      dot.style.left = value + "%";
    }
  }
}

// ---- histograms: 20 bins of the studies shown

const BINS = 20;
const ranges = data.metrics.map((_, m) => data.studies.reduce(
  ([low, high], study) => [Math.min(low, study.values[m]), Math.max(high, study.values[m])], [0, 1]
)).map(([low, high]) => high > 1 && high <= 100 && low >= 0 ? [0, 100] : [low, high]);

function drawHistograms() {
  $("histograms").replaceChildren();
  data.metrics.forEach((key, m) => {
    const button = make($("histograms"), "button", key), [low, high] = ranges[m], bins = Array(BINS).fill(0);
    for (const i of shown) {
      bins[Math.min(BINS - 1, Math.floor((data.studies[i].values[m] - low) / (high - low) * BINS))]++;
    }
    const NS = "http://www.w3.org/2000/svg", svg = button.appendChild(document.createElementNS(NS, "svg"));
    svg.setAttribute("viewBox", "0 0 100 46");
    svg.setAttribute("preserveAspectRatio", "none");
    const top = Math.max(1, ...bins);
    bins.forEach((count, i) => {
      const bar = svg.appendChild(document.createElementNS(NS, "rect"));
      const height = count && Math.max(1, count / top * 46);
      for (const [name, value] of Object.entries({x: i * 5 + .4, y: 46 - height, width: 4.2, height})) {
        bar.setAttribute(name, value);
      }
      bar.appendChild(document.createElementNS(NS, "title")).textContent = count;
    });
    const axis = make(button, "span");
    make(axis, "span", +low.toFixed(2));
    make(axis, "span", +high.toFixed(2));
    button.type = "button";
    button.title = `sort by ${key}`;
    button.setAttribute("aria-pressed", m === +$("metric").value);
    button.onclick = () => { $("metric").value = m; arrange(); };
  });
}

// ---- one study

const split = text => text.split(/([\p{L}\p{N}]+)/u);  // words at odd places

function aligned(a, b) {  // which words of a and of b lie on a longest common subsequence
  const width = b.length + 1, length = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) {
    length[i * width + j] = a[i] === b[j] ? length[(i + 1) * width + j + 1] + 1
      : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
  }
  const inA = Array(a.length).fill(false), inB = Array(b.length).fill(false);
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) inA[i++] = inB[j++] = true;
    else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

function mark(parent, parts, same, name) {  // words that differ, with the gaps between them; words of change
  let run = "", kind = "";
  const flush = () => { if (run) kind ? make(parent, "mark", run, kind) : parent.append(run); run = ""; };
  parts.forEach((part, p) => {
    const next = p >> 1, differs = p % 2 ? !same[next] : same[next - 1] === false && same[next] === false;
    const wanted = [differs && name, p % 2 && change.has(part.toLowerCase()) && "change"].filter(Boolean).join(" ");
    if (wanted !== kind) { flush(); kind = wanted; }
    run += part;
  });
  flush();
}

function fill(card, study) {
  const head = make(card, "div", undefined, "head"), body = make(card, "div", undefined, "body");
  make(head, "b", study.id);
  make(head, "span", study.prior ? "with prior" : "without prior");
  data.metrics.forEach((key, m) => {
    make(head, "span", `${key} ${study.values[m].toFixed(1)}`, m === +$("metric").value ? "now" : "");
  });
  const images = make(body, "div", undefined, "images");
  study.images.forEach((image, i) => {
    if (i && !study.prior) return;
    const figure = make(images, "figure");
    make(figure, "figcaption", i ? "prior" : "current");
    if (image === null) make(figure, "div");
    else Object.assign(make(figure, "img"), {src: data.images[image], alt: i ? "prior" : "current", decoding: "async"});
  });
  const sides = ["reference", "prediction"], parts = sides.map(side => split(study[side]));
  const same = aligned(...parts.map(list => list.filter((_, p) => p % 2).map(word => word.toLowerCase())));
  sides.forEach((side, s) => {
    const column = make(body, "div");
    make(column, "h4", side);
    mark(make(column, "div", undefined, "text"), parts[s], same[s], s ? "added" : "missed");
  });
  if (study.prompt) make(body, "div", study.prompt, "prompt");
}

// ---- the list: cards are empty until they come near the window

const near = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const card = entry.target;
    if (entry.isIntersecting && !card.hasChildNodes()) fill(card, data.studies[card.dataset.i]);
  }
}, {rootMargin: "800px"});
const cards = data.studies.map((_, i) => {
  const card = document.createElement("article");
  card.dataset.i = i;
  near.observe(card);
  return card;
});
const haystacks = data.studies.map(
  study => [study.id, study.prompt, study.reference, study.prediction].join("\n").toLowerCase());
let shown = [], worst = true;

function arrange() {
  const m = +$("metric").value, group = $("group").value, sign = worst ? 1 : -1;
  const needles = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const value = i => data.studies[i].values[m];
  const wanted = i => (group === "all" || data.studies[i].prior === (group === "with prior"))
    && needles.every(needle => haystacks[i].includes(needle));
  shown = data.studies.map((_, i) => i).filter(wanted);
  shown.sort((i, j) => sign * (value(i) - value(j)) || i - j);
  for (const card of cards) for (const [k, span] of [...card.querySelectorAll(".head span")].slice(1).entries()) {
    span.className = k === m ? "now" : "";
  }
  $("list").replaceChildren(...shown.map(i => cards[i]));
  $("order").textContent = worst ? "lowest first" : "highest first";
  $("count").textContent = `${shown.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")} studies`;
  drawHistograms();
}

for (const name of Object.keys(data.groups)) make($("group"), "option", name).value = name;
data.metrics.forEach((key, m) => { make($("metric"), "option", `sort by ${key}`).value = m; });
$("metric").value = Math.max(0, data.metrics.indexOf("ROUGE-L"));
$("search").oninput = $("group").onchange = $("metric").onchange = arrange;
$("order").onclick = () => { worst = !worst; arrange(); };
drawScores();
arrange();
</script>
</body>
</html>
"""


COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e")


def curves(title: str, unit: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Lines by their names, each a list of points (x, y), as an SVG picture; y on a logarithmic axis."""
    points = [point for line in lines.values() for point in line]
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    low, high = math.log(max(low, 1e-9)), math.log(max(high, 2e-9))
    place = lambda x, y: (
        60 + 640 * (x - left) / max(right - left, 1e-9),
        340 - 300 * (math.log(max(y, 1e-9)) - low) / max(high - low, 1e-9),
    )
    drawn = []
    for tick in range(5):
        value = math.exp(low + (high - low) * tick / 4)
        y = place(left, value)[1]
        drawn.append(f'<path d="M60 {y:.1f}H700" stroke="#8886"/>')
        drawn.append(f'<text x="52" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for tick in range(5):
        value = left + (right - left) * tick / 4
        drawn.append(f'<text x="{place(value, 1)[0]:.1f}" y="360" text-anchor="middle">{value:,.0f}</text>')
    for number, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        colour = COLOURS[number % len(COLOURS)]
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = f'<text x="690" y="{60 + 18 * number}" text-anchor="end" fill="{colour}">'
        drawn.append(f"{label}{html.escape(name)}</text>")
    drawn.append(f'<text x="60" y="22">{html.escape(title)}</text>')
    drawn.append(f'<text x="700" y="380" text-anchor="end">{html.escape(unit)}</text>')
    look = 'font-family="sans-serif" font-size="13" fill="#888"'
    return "\n".join((f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 390" {look}>', *drawn, "</svg>\n"))
