/* The attention page: one file, no network. It holds what flash attention's backward pass would
 * hold, queries, keys and the log-sum-exp of every head, and computes a head's matrices when that
 * head is looked at:
 *
 *   scores = scale q.k      added = softcap(scores) - slope |i - j|      weights = exp(added - lse)
 *
 * Figures of all heads and the small pictures were computed when the page was written. */
"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const meta = JSON.parse($("meta").textContent);
const { tokens, layers, columns, thumb: THUMB, thumbs: THUMBS } = meta;
const T = tokens.length;
const MEASURES = [
  { key: 0, name: "entropy", title: "Entropy", unit: "nats", digits: 2, help: "how widely a row is spread" },
  { key: 1, name: "distance", title: "Distance", unit: "tokens", digits: 1, help: "mean distance looked back" },
  { key: 2, name: "first token", title: "First token", share: true },
  { key: 3, name: "token before", title: "Token before", share: true },
  { key: 4, name: "itself", title: "Itself", share: true },
  { key: 5, name: "sink", title: "Sink", share: true },
  { key: 6, name: "largest weight", title: "Largest weight", share: true },
  { key: 8, name: "evenness", title: "Evenness", share: true }, /* entropy, of what even weights would have */
];
for (const f of meta.figures.flat()) f[8] = f[7] > 0 ? f[0] / f[7] : 1;
const state = {
  layer: 0, head: 0, view: "weights", picked: -1, over: -1, cell: null,
  x: 0, y: 0, n: T, measure: 0, sorted: false,
};

/* ---------------------------------------------------------------- data */

const bytesOf = (id) => {
  const text = $(id).textContent.trim();
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
};

const halves = (() => { /* fp16 -> fp32, by table */
  let table = null;
  return (h) => {
    if (!table) {
      table = new Float32Array(65536);
      for (let i = 0; i < 65536; i++) {
        const e = (i >> 10) & 31, m = i & 1023, s = i & 32768 ? -1 : 1;
        table[i] = s * (e === 0 ? m * 2 ** -24 : e === 31 ? (m ? NaN : Infinity) : (1 + m / 1024) * 2 ** (e - 15));
      }
    }
    const out = new Float32Array(h.length);
    for (let i = 0; i < h.length; i++) out[i] = table[h[i]];
    return out;
  };
})();

/* A small cache: the value of `key`, made when it is not there; the oldest goes first. */
const keeper = (most) => {
  const held = new Map();
  return (key, make) => {
    let value = held.get(key);
    if (value === undefined) value = make();
    held.delete(key);
    held.set(key, value);
    if (held.size > most) held.delete(held.keys().next().value);
    return value;
  };
};
const keepLayer = keeper(4), keepMatrix = keeper(Math.max(6, Math.min(64, Math.floor(3e7 / (T * T))))), keepMask = keeper(64);

/* { q [H T d], k [K T d] } of a layer; with relative positions also { pq [H T d], r [H R d] }. */
const layerData = (l) => keepLayer(l, () => {
  const info = layers[l], bytes = bytesOf("layer-" + l);
  const all = meta.half ? halves(new Uint16Array(bytes.buffer)) : new Float32Array(bytes.buffer);
  const split = info.heads * T * info.width, end = split + info.kv * T * info.width;
  return { q: all.subarray(0, split), k: all.subarray(split, end), pq: all.subarray(end, end + split), r: all.subarray(end + split) };
});
const lse = (l, h) => keepMask("lse" + l, () => new Float32Array(bytesOf("lse-" + l).buffer)).subarray(h * T, (h + 1) * T);

/* 1 where i sees j. */
const maskOf = (l, h) => {
  const which = layers[l].mask[h];
  return keepMask(which, () => {
    const out = new Uint8Array(T * T), stride = (T + 7) >> 3;
    const bits = which >= 0 ? bytesOf("mask-" + which) : null;
    for (let i = 0; i < T; i++)
      for (let j = 0; j < T; j++)
        out[i * T + j] = bits ? (bits[i * stride + (j >> 3)] >> (j & 7)) & 1 : which === -2 || j <= i ? 1 : 0;
    return out;
  });
};

const products = (l, h, mask) => { /* scale q.k, where the mask says so (null: everywhere) */
  const info = layers[l], d = info.width, { q, k } = layerData(l);
  const q0 = h * T * d, k0 = Math.floor(h / (info.heads / info.kv)) * T * d, out = new Float32Array(T * T);
  for (let i = 0; i < T; i++)
    for (let j = 0; j < T; j++) {
      if (mask && !mask[i * T + j]) continue;
      let sum = 0;
      for (let c = 0, a = q0 + i * d, b = k0 + j * d; c < d; c++) sum += q[a + c] * k[b + c];
      out[i * T + j] = sum * info.scale;
    }
  return out;
};
const addTo = (l, h, s) => {
  const { softcap, slopes, distances, width: d, scale } = layers[l], slope = slopes ? slopes[h] : 0;
  if (distances) {
    const { pq, r } = layerData(l), mask = maskOf(l, h);
    for (let i = 0; i < T; i++)
      for (let j = 0; j <= i; j++) {
        if (!mask[i * T + j]) continue;
        let sum = 0;
        for (let c = 0, a = (h * T + i) * d, b = (h * distances + i - j) * d; c < d; c++) sum += pq[a + c] * r[b + c];
        s[i * T + j] += scale * sum;
      }
    return s;
  }
  if (!softcap && !slope) return s;
  for (let i = 0; i < T; i++)
    for (let j = 0; j < T; j++) {
      const at = i * T + j;
      s[at] = (softcap ? softcap * Math.tanh(s[at] / softcap) : s[at]) - slope * Math.abs(i - j);
    }
  return s;
};

/* A matrix [T, T] of the view: "scores", "added", "mask" or "weights". */
const matrixOf = (l, h, view) => view === "mask" ? maskOf(l, h) : keepMatrix(view + l + "." + h, () => {
  if (view === "scores") return products(l, h, null);
  if (view === "added") return addTo(l, h, products(l, h, null));
  const mask = maskOf(l, h), s = addTo(l, h, products(l, h, mask)), norm = lse(l, h);
  for (let i = 0; i < T; i++)
    for (let j = 0; j < T; j++) {
      const at = i * T + j;
      s[at] = mask[at] ? Math.exp(s[at] - norm[i]) : 0;
    }
  return s;
});

const seen = (l) => layers[l].seen;
const figures = (l, h) => meta.figures[l][h];
const measureText = (m, value) => m.share ? (100 * value).toFixed(value < 0.0995 ? 1 : 0) + "%" : value.toFixed(m.digits);
/* A weight, for people. */
const number = (w) => w === 0 ? "0" : w < 0.0005 ? w.toExponential(0).replace("e-", "·10⁻").replace(/⁻(\d+)/, (_, e) => "⁻" + [...e].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("")) : w.toFixed(w < 0.00995 ? 4 : 3);

/* ---------------------------------------------------------------- words */

const shown = tokens.map((t) => {
  const plain = t.replace(/\n/g, "↵").replace(/\t/g, "⇥");
  const trimmed = plain.trim();
  return trimmed || plain.replace(/ /g, "·") || "∅";
});
const quoted = (i) => "“" + shown[i] + "”";

/* ---------------------------------------------------------------- colours */

const scales = {
  light: {
    weights: [[255, 255, 255], [206, 225, 249], [132, 182, 240], [58, 126, 220], [24, 76, 165], [10, 30, 82]],
    scores: [[127, 20, 30], [206, 72, 64], [244, 170, 146], [248, 248, 248], [150, 190, 236], [52, 120, 216], [16, 52, 128]],
    hidden: [238, 241, 245], shown: [58, 126, 220], ink: "#17202e", faded: "#5b6675", line: "#c3cad4", mark: "#d97706",
  },
  dark: {
    weights: [[18, 22, 28], [20, 48, 92], [26, 88, 168], [66, 146, 230], [162, 206, 250], [250, 252, 255]],
    scores: [[255, 176, 150], [222, 92, 78], [116, 40, 42], [28, 32, 38], [24, 62, 122], [58, 128, 222], [170, 208, 250]],
    hidden: [32, 38, 46], shown: [66, 146, 230], ink: "#e8ecf1", faded: "#98a3b1", line: "#3a434f", mark: "#f59e0b",
  },
};
const dark = () => document.documentElement.dataset.theme === "dark";
const palette = () => scales[dark() ? "dark" : "light"];
const LEVELS = 256;
const tables = {};
/* 256 colours between the anchors, as packed RGBA. */
const colours = (name) => {
  const id = name + dark();
  if (!tables[id]) {
    const anchors = palette()[name], out = new Uint32Array(LEVELS);
    for (let v = 0; v < LEVELS; v++) {
      const at = v / (LEVELS - 1) * (anchors.length - 1), a = Math.min(Math.floor(at), anchors.length - 2);
      const c = [0, 1, 2].map((k) => Math.round(anchors[a][k] + (at - a) * (anchors[a + 1][k] - anchors[a][k])));
      out[v] = (255 << 24 | c[2] << 16 | c[1] << 8 | c[0]) >>> 0;
    }
    tables[id] = out;
  }
  return tables[id];
};
const packed = (c) => (255 << 24 | c[2] << 16 | c[1] << 8 | c[0]) >>> 0;
const between = (a, b, t) => { /* packed colours */
  const mix = (s) => Math.round((a >> s & 255) * (1 - t) + (b >> s & 255) * t) << s;
  return (255 << 24 | mix(16) | mix(8) | mix(0)) >>> 0;
};

/* ---------------------------------------------------------------- the large matrix */

const canvas = $("matrix"), legend = $("legend");
let plot = { left: 0, top: 0, size: 1 }; /* of the matrix inside the canvas, CSS pixels */

/* Where nearly all visible scores lie: [-range, range]. */
const rangeOf = (l, h, view) => keepMask("range" + view + l + "." + h, () => {
  const s = matrixOf(l, h, view), mask = maskOf(l, h), sample = [], step = Math.max(1, Math.floor(T * T / 20000));
  for (let at = 0; at < T * T; at += step) if (mask[at]) sample.push(Math.abs(s[at]));
  sample.sort((a, b) => a - b);
  return Math.max(sample[Math.floor(0.995 * (sample.length - 1))] || 0, 1e-6);
});

/* Cells [y0, y1) x [x0, x1) as an image; each pixel the strongest of block x block cells. */
const picture = (l, h, view, x0, y0, x1, y1, block) => {
  const w = Math.ceil((x1 - x0) / block), t = Math.ceil((y1 - y0) / block);
  const image = new ImageData(w, t), out = new Uint32Array(image.data.buffer);
  const m = matrixOf(l, h, view), mask = maskOf(l, h), p = palette();
  const scale = view === "weights" ? colours("weights") : colours("scores");
  const range = view === "scores" || view === "added" ? rangeOf(l, h, view) : 1, hidden = packed(p.hidden);
  for (let r = 0; r < t; r++)
    for (let c = 0; c < w; c++) {
      let value = 0, visible = 0;
      for (let i = y0 + r * block; i < Math.min(y0 + (r + 1) * block, y1); i++)
        for (let j = x0 + c * block; j < Math.min(x0 + (c + 1) * block, x1); j++) {
          const v = m[i * T + j];
          if (mask[i * T + j] > visible) { visible = 1; value = v; }
          else if (mask[i * T + j] === visible && Math.abs(v) > Math.abs(value)) value = v;
        }
      let colour;
      if (view === "mask") colour = value ? packed(p.shown) : hidden;
      else if (view === "weights") colour = visible ? scale[Math.min(255, Math.round(255 * Math.sqrt(value)))] : hidden;
      else {
        colour = scale[Math.max(0, Math.min(255, Math.round(127.5 + 127.5 * value / range)))];
        if (!visible) colour = between(hidden, colour, 0.2);
      }
      out[r * w + c] = colour;
    }
  const sheet = new OffscreenCanvas(w, t);
  sheet.getContext("2d").putImageData(image, 0, 0);
  return sheet;
};

const labelsFit = (size) => size / state.n >= 11.5;

function drawMatrix() {
  const box = $("stage").clientWidth, ratio = window.devicePixelRatio || 1;
  const longest = Math.min(12, Math.max(...shown.map((s) => s.length)));
  const words = labelsFit(box - 30 - longest * 6.6);
  const margin = words ? 14 + longest * 6.6 : 34;
  plot = canvas.plot = { left: margin, top: 8, size: box - margin - 8 };
  canvas.width = canvas.height = Math.round(box * ratio);
  const g = canvas.getContext("2d"), p = palette();
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.clearRect(0, 0, box, box);
  canvas.classList.toggle("zoomed", state.n < T);
  const { x, y, n } = state, { left, top, size } = plot, cell = size / n;
  const x0 = Math.floor(x), y0 = Math.floor(y), x1 = Math.min(T, Math.ceil(x + n)), y1 = Math.min(T, Math.ceil(y + n));
  const block = Math.max(1, Math.ceil(n / (size * ratio)));
  g.font = "11.5px " + getComputedStyle(document.body).fontFamily;
  if (!seen(state.layer)) {
    g.fillStyle = p.faded;
    g.textAlign = "center";
    g.fillText("This layer mixes its tokens in another way: there is no matrix to show.", left + size / 2, top + size / 2);
    return;
  }
  const sheet = picture(state.layer, state.head, state.view, x0, y0, x1, y1, block);
  g.save();
  g.beginPath();
  g.rect(left, top, size, size);
  g.clip();
  g.imageSmoothingEnabled = false;
  g.drawImage(sheet, left + (x0 - x) * cell, top + (y0 - y) * cell, sheet.width * block * cell, sheet.height * block * cell);
  const chosen = state.picked, frame = (i0, j0, w, t, colour, width) => {
    g.strokeStyle = colour;
    g.lineWidth = width;
    g.strokeRect(left + (j0 - x) * cell, top + (i0 - y) * cell, w * cell, t * cell);
  };
  if (chosen >= 0) {
    frame(chosen, -1, T + 2, 1, p.mark, 1.6);
    frame(-1, chosen, 1, T + 2, p.mark, 1.6);
  }
  if (state.cell) {
    const [i, j] = state.cell;
    g.strokeStyle = g.fillStyle = p.ink;
    g.globalAlpha = 0.09;
    g.fillRect(left, top + (i - y) * cell, size, cell);
    g.fillRect(left + (j - x) * cell, top, cell, size);
    g.globalAlpha = 1;
    frame(i, j, 1, 1, p.ink, 1.4);
  }
  g.restore();
  g.strokeStyle = p.line;
  g.lineWidth = 1;
  g.strokeRect(left, top, size, size);
  drawSides(g, p, words, x0, y0, x1, y1, cell);
}

function drawSides(g, p, words, x0, y0, x1, y1, cell) {
  const { left, top, size } = plot, { x, y, n } = state;
  let every = 1;
  if (!words) for (const step of [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]) if (step * cell >= 42) { every = step; break; }
  const clip = (s) => s.length > 12 ? s.slice(0, 11) + "…" : s;
  const strong = (i) => i === state.picked || (state.cell && (i === state.cell[0] || i === state.cell[1]));
  for (let i = Math.ceil(y0 / every) * every; i < y1; i += every) {
    const at = top + (i + 0.5 - y) * cell;
    if (at < top || at > top + size) continue;
    g.fillStyle = strong(i) ? p.ink : p.faded;
    g.textAlign = "right";
    g.fillText(words ? clip(shown[i]) : i, left - 7, at + 4);
  }
  for (let j = Math.ceil(x0 / every) * every; j < x1; j += every) {
    const at = left + (j + 0.5 - x) * cell;
    if (at < left || at > left + size) continue;
    g.fillStyle = strong(j) ? p.ink : p.faded;
    if (words) {
      g.save();
      g.translate(at + 3, top + size + 8);
      g.rotate(-Math.PI / 3.2);
      g.textAlign = "right";
      g.fillText(clip(shown[j]), 0, 4);
      g.restore();
    } else {
      const most = left + size + 8 - g.measureText(j).width / 2;
      g.textAlign = "center";
      g.fillText(j, Math.min(at, most), top + size + 16);
    }
  }
}

function drawLegend() {
  const w = legend.clientWidth || 230, t = 34, ratio = window.devicePixelRatio || 1, p = palette();
  legend.width = w * ratio;
  legend.height = t * ratio;
  const g = legend.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.font = "11px " + getComputedStyle(document.body).fontFamily;
  const bar = w - 24, view = state.view;
  if (!seen(state.layer)) return;
  const put = (at, text) => { g.fillStyle = p.faded; g.textAlign = "center"; g.fillText(text, 12 + at * bar, 28); };
  if (view === "mask") {
    [[p.shown, "sees"], [p.hidden, "does not see"]].forEach(([c, text], i) => {
      g.fillStyle = `rgb(${c})`;
      g.fillRect(12 + i * 74, 6, 14, 14);
      g.fillStyle = p.faded;
      g.textAlign = "left";
      g.fillText(text, 31 + i * 74, 17);
    });
    return;
  }
  const scale = colours(view === "weights" ? "weights" : "scores");
  for (let v = 0; v < bar; v++) {
    const c = scale[Math.round(255 * v / (bar - 1))];
    g.fillStyle = `rgb(${c & 255},${c >> 8 & 255},${c >> 16 & 255})`;
    g.fillRect(12 + v, 4, 1.5, 11);
  }
  g.strokeStyle = p.line;
  g.strokeRect(12, 4, bar, 11);
  if (view === "weights") [0, 0.01, 0.1, 0.25, 0.5, 1].forEach((v) => put(Math.sqrt(v), v === 0.01 ? ".01" : v));
  else {
    const range = rangeOf(state.layer, state.head, view);
    [-1, 0, 1].forEach((v) => put((v + 1) / 2, v === 0 ? "0" : (v > 0 ? "+" : "−") + range.toPrecision(2)));
  }
}

/* ---------------------------------------------------------------- words beside it */

function readout() {
  const out = $("readout");
  out.replaceChildren();
  if (!seen(state.layer)) return;
  const add = (text, tag) => {
    const e = document.createElement(tag || "span");
    if (tag === "i") { e.className = "faded"; e.style.fontStyle = "normal"; }
    e.textContent = text;
    out.append(e);
  };
  if (!state.cell) {
    add(state.picked >= 0 ? `${quoted(state.picked)}, token ${state.picked}, is chosen.` : "Point at the matrix, or choose a token.", "i");
    return;
  }
  const [i, j] = state.cell, l = state.layer, h = state.head, visible = maskOf(l, h)[i * T + j];
  const score = matrixOf(l, h, "scores")[i * T + j];
  add(quoted(i), "b");
  add(` ${i} `, "i");
  add(visible ? "looks at " : "does not see ");
  add(quoted(j), "b");
  add(` ${j} `, "i");
  if (visible) {
    add("with ");
    add(number(matrixOf(l, h, "weights")[i * T + j]), "b");
  }
  const added = adds(l) ? `, ${matrixOf(l, h, "added")[i * T + j].toFixed(2)} after ${addedName(l)}` : "";
  add(`  (score ${score.toFixed(2)}${added})`, "i");
}

const adds = (l) => !!(layers[l].softcap || layers[l].slopes || layers[l].distances);
const addedName = (l) => [layers[l].softcap ? "softcap" : "", layers[l].slopes ? "ALiBi" : "", layers[l].distances ? "relative positions" : ""].filter(Boolean).join(" and ");

function strongest(list, title, heading, value, colour) {
  const rows = [];
  for (let i = 0; i < T; i++) { const v = value(i); if (v > 0) rows.push([v, i]); }
  rows.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  heading.textContent = title;
  list.replaceChildren(...rows.slice(0, 6).map(([v, i]) => {
    const row = document.createElement("li"), word = document.createElement("span"), bar = document.createElement("i"), n = document.createElement("span");
    word.textContent = shown[i];
    word.title = `token ${i}`;
    bar.style.width = 100 * v / Math.max(rows[0][0], 0.25) + "%";
    n.textContent = number(v);
    row.append(word, bar, n);
    return row;
  }));
}

const words = []; /* the spans of the text */
const numbers = tokens.every((t) => /^#\d+$/.test(t)); /* no tokenizer: ids */
let ranges = "";

function drawText() {
  const l = state.layer, h = state.head, at = state.over >= 0 ? state.over : state.picked;
  const w = at >= 0 && seen(l) ? matrixOf(l, h, "weights") : null;
  for (let i = 0; i < T; i++) {
    const s = words[i], out = w ? w[at * T + i] : 0, into = w && i !== at ? w[i * T + at] : 0;
    s.style.background = out > 0.002 ? `rgba(var(--out), ${(0.85 * Math.sqrt(out)).toFixed(3)})` : "";
    s.style.borderBottomColor = into > 0.002 ? `rgba(var(--in), ${Math.min(1, 1.1 * Math.sqrt(into)).toFixed(3)})` : "";
    s.style.color = out > 0.45 && !dark() ? "#fff" : "";
    if (ranges !== "" && (s.getAttribute("aria-selected") === "true") !== (i === state.picked)) s.setAttribute("aria-selected", i === state.picked);
  }
  ranges = "drawn";
  $("text").setAttribute("aria-activedescendant", state.picked >= 0 ? "w" + state.picked : "");
  if (!w) {
    strongest($("out"), "Choose a token to see where it looks", $("out-title"), () => 0);
    strongest($("in"), "and who looks at it", $("in-title"), () => 0);
    return;
  }
  strongest($("out"), `${quoted(at)} looks at`, $("out-title"), (i) => w[at * T + i]);
  strongest($("in"), `look at ${quoted(at)}`, $("in-title"), (i) => w[i * T + at]);
}

function makeText() {
  const box = $("text");
  for (let i = 0; i < T; i++) {
    const s = document.createElement("span");
    s.id = "w" + i;
    s.setAttribute("role", "option");
    s.setAttribute("aria-selected", "false");
    s.textContent = (tokens[i] || "∅") + (numbers ? " " : "");
    words.push(s);
  }
  box.append(...words);
  const index = (e) => { const s = e.target.closest("span[id]"); return s ? +s.id.slice(1) : -1; };
  box.addEventListener("click", (e) => { const i = index(e); if (i >= 0) pick(i === state.picked ? -1 : i); });
  box.addEventListener("pointerover", (e) => { if (e.pointerType === "touch") return; const i = index(e); if (i !== state.over) { state.over = i; drawText(); } });
  box.addEventListener("pointerleave", () => { state.over = -1; drawText(); });
  box.addEventListener("keydown", (e) => {
    if (e.key !== "ArrowRight" && e.key !== "ArrowLeft") return;
    step(e.key === "ArrowRight" ? 1 : -1);
    e.preventDefault();
    e.stopPropagation();
  });
}

/* ---------------------------------------------------------------- all heads */

const tiles = new Map(); /* "l.h" -> button */
let thumbBytes = null;
function drawTile(tile) {
  if (!thumbBytes) thumbBytes = bytesOf("thumbs");
  const c = tile.querySelector("canvas"), at = layers[tile.l].thumb + tile.h * THUMB * THUMB;
  const image = new ImageData(THUMB, THUMB), out = new Uint32Array(image.data.buffer), scale = colours("weights");
  for (let i = 0; i < THUMB * THUMB; i++) out[i] = scale[thumbBytes[at + i]];
  c.width = c.height = THUMB;
  c.getContext("2d").putImageData(image, 0, 0);
  tile.drawn = dark();
}
const watcher = new IntersectionObserver((entries) => {
  for (const e of entries) {
    e.target.near = e.isIntersecting;
    if (e.isIntersecting && e.target.drawn !== dark()) drawTile(e.target);
  }
}, { rootMargin: "200px" });

function makeTiles() {
  layers.forEach((info, l) => {
    for (let h = 0; info.seen && h < info.heads; h++) {
      const b = document.createElement("button");
      b.type = "button";
      b.l = l;
      b.h = h;
      b.tabIndex = -1;
      b.append(document.createElement("canvas"), document.createElement("i"), document.createElement("small"));
      b.addEventListener("click", () => { go(l, h); });
      tiles.set(l + "." + h, b);
      watcher.observe(b);
    }
  });
}

function arrangeTiles() {
  const grid = $("grid"), m = MEASURES[state.measure], list = [...tiles.values()], value = (b) => figures(b.l, b.h)[m.key];
  const most = Math.max(...list.map(value), 1e-9);
  for (const b of list) {
    b.children[1].style.width = 100 * Math.max(0, value(b)) / most + "%";
    b.children[2].textContent = state.sorted ? `${b.l}.${b.h}  ${measureText(m, value(b))}` : "";
    b.children[2].hidden = !state.sorted;
    b.title = `Layer ${b.l}, head ${b.h}: ${m.name} ${measureText(m, value(b))}${m.unit ? " " + m.unit : ""}`;
    b.setAttribute("aria-label", b.title);
  }
  if (state.sorted) {
    list.sort((a, b) => value(b) - value(a));
    grid.style.gridTemplateColumns = "repeat(auto-fill, minmax(max(58px, 9%), 1fr))";
    grid.replaceChildren(...list);
    return;
  }
  const cells = [], mark = (text) => { const s = document.createElement("span"); s.className = "mark"; s.textContent = text; return s; };
  grid.style.gridTemplateColumns = `1.5em repeat(${columns}, minmax(0, ${columns < 7 ? "92px" : "1fr"}))`;
  cells.push(mark(""));
  for (let h = 0; h < columns; h++) cells.push(mark(h));
  layers.forEach((info, l) => {
    cells.push(mark(l));
    for (let h = 0; h < columns; h++) {
      const b = tiles.get(l + "." + h);
      if (b) cells.push(b);
      else { const s = document.createElement("span"); s.className = info.seen ? "" : "none"; cells.push(s); }
    }
  });
  grid.replaceChildren(...cells);
}

/* ---------------------------------------------------------------- what is chosen */

function drawFacts() {
  const l = state.layer, h = state.head, info = layers[l];
  $("which").textContent = `Layer ${l}, head ${h}`;
  $("facts").replaceChildren();
  $("formula").textContent = "";
  if (!info.seen) return;
  const content = info.distances ? "(Q + u)Kᵀ" : "QKᵀ", inner = `${content} · ${+info.scale.toPrecision(4)}`, cap = info.softcap ? `softcap(${inner})` : inner;
  const full = info.distances ? inner + " + positions" : info.slopes ? `${cap} − ${+info.slopes[h].toPrecision(3)} · distance` : cap;
  $("formula").textContent = { scores: inner, added: full, mask: "who may see whom", weights: `softmax(mask(${full}))` }[state.view];
  const f = figures(l, h);
  for (const m of MEASURES) {
    if (m.key === 5 && !info.sink) continue;
    const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd"), more = document.createElement("small");
    dt.textContent = m.title;
    dd.textContent = measureText(m, f[m.key]);
    if (m.unit) { more.textContent = m.key === 0 ? ` nats ≈ ${Math.exp(f[0]).toFixed(1)} keys` : " " + m.unit; dd.append(more); }
    box.append(dt, dd);
    $("facts").append(box);
  }
}

function drawChoice() {
  for (const [id, b] of tiles) b.setAttribute("aria-pressed", id === state.layer + "." + state.head);
  $("depth").value = $("depth-now").textContent = state.layer;
  $("head").value = $("head-now").textContent = state.head;
  $("head").max = Math.max(0, layers[state.layer].heads - 1);
  for (const b of $("views").children) {
    b.setAttribute("aria-pressed", b.dataset.view === state.view);
    if (b.dataset.view === "added") b.hidden = !adds(state.layer);
  }
  canvas.setAttribute("aria-label", `${{ scores: "Scaled scores", added: "Scores as the softmax takes them", mask: "Mask", weights: "Attention weights" }[state.view]} of layer ${state.layer}, head ${state.head}, ${T} by ${T} tokens`);
}

let waiting = false;
function draw() { /* once per frame */
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawNow(); });
}
function drawNow() {
  drawChoice();
  drawFacts();
  drawMatrix();
  drawLegend();
  readout();
  drawText();
}

const clamp = (v, low, high) => Math.max(low, Math.min(high, v));
function go(l, h) {
  state.layer = clamp(l, 0, layers.length - 1);
  state.head = clamp(h, 0, Math.max(0, layers[state.layer].heads - 1));
  if (state.view === "added" && !adds(state.layer)) state.view = "scores";
  location.replace("#" + state.layer + "." + state.head);
  draw();
}
function pick(i) {
  state.picked = i;
  if (i >= 0) {
    words[i].scrollIntoView({ block: "nearest" });
    if (i < state.y || i + 1 > state.y + state.n) state.x = state.y = clamp(i + 0.5 - state.n / 2, 0, T - state.n);
  }
  draw();
}
const step = (by) => pick(state.picked < 0 ? (by > 0 ? 0 : T - 1) : clamp(state.picked + by, 0, T - 1));
function look(view) {
  if (view === "added" && !adds(state.layer)) view = "scores";
  state.view = view;
  draw();
}
function zoom(factor, fx = 0.5, fy = 0.5) { /* around a point of the plot, 0 to 1 */
  const n = clamp(state.n * factor, Math.min(T, 4), T);
  state.x = clamp(state.x + fx * (state.n - n), 0, T - n);
  state.y = clamp(state.y + fy * (state.n - n), 0, T - n);
  state.n = n;
  draw();
}
/* By key or button: around the chosen token, where there is one. */
function closer(factor) {
  const at = state.picked >= 0 ? state.picked + 0.5 : -1, within = (from) => at < 0 ? 0.5 : clamp((at - from) / state.n, 0, 1);
  zoom(factor, within(state.x), within(state.y));
}
function pan(dx, dy) {
  state.x = clamp(state.x + dx, 0, T - state.n);
  state.y = clamp(state.y + dy, 0, T - state.n);
  draw();
}
function theme(name) {
  document.documentElement.dataset.theme = name;
  for (const b of tiles.values()) if (b.near) drawTile(b);
  draw();
}

/* ---------------------------------------------------------------- hands */

const place = (e) => { /* event -> fractions of the plot */
  const r = canvas.getBoundingClientRect();
  return [(e.clientX - r.left - plot.left) / plot.size, (e.clientY - r.top - plot.top) / plot.size];
};
const cellAt = ([fx, fy]) => {
  const j = Math.floor(state.x + fx * state.n), i = Math.floor(state.y + fy * state.n);
  return fx >= 0 && fx < 1 && fy >= 0 && fy < 1 && i < T && j < T ? [i, j] : null;
};

function listenMatrix() {
  const held = new Map();
  let moved = 0, spread = 0;
  const touching = () => [...held.values()];
  canvas.addEventListener("pointerdown", (e) => {
    held.set(e.pointerId, [e.clientX, e.clientY]);
    moved = 0;
    if (held.size === 2) { const [a, b] = touching(); spread = Math.hypot(a[0] - b[0], a[1] - b[1]); }
    if (state.n < T) canvas.setPointerCapture(e.pointerId);
  });
  canvas.addEventListener("pointermove", (e) => {
    const before = held.get(e.pointerId);
    if (before) {
      const dx = e.clientX - before[0], dy = e.clientY - before[1];
      moved += Math.abs(dx) + Math.abs(dy);
      held.set(e.pointerId, [e.clientX, e.clientY]);
      if (held.size === 2) {
        const [a, b] = touching(), now = Math.hypot(a[0] - b[0], a[1] - b[1]), [fx, fy] = place({ clientX: (a[0] + b[0]) / 2, clientY: (a[1] + b[1]) / 2 });
        if (now > 0 && spread > 0) zoom(spread / now, clamp(fx, 0, 1), clamp(fy, 0, 1));
        spread = now;
        return;
      }
      if (state.n < T && moved > 4) { pan(-dx / plot.size * state.n, -dy / plot.size * state.n); return; }
    }
    const cell = cellAt(place(e));
    if (String(cell) !== String(state.cell)) { state.cell = cell; draw(); }
  });
  const drop = (e) => held.delete(e.pointerId);
  canvas.addEventListener("pointerup", (e) => {
    drop(e);
    if (moved > 6) return;
    const cell = cellAt(place(e));
    state.cell = cell;
    if (cell) pick(cell[0] === state.picked ? -1 : cell[0]);
  });
  canvas.addEventListener("pointercancel", drop);
  canvas.addEventListener("pointerleave", (e) => { if (e.pointerType !== "touch") { state.cell = null; draw(); } });
  canvas.addEventListener("wheel", (e) => {
    const [fx, fy] = place(e);
    if (e.deltaY > 0 && state.n >= T) return; /* the page may scroll */
    zoom(Math.exp(clamp(e.deltaY, -120, 120) / 400), clamp(fx, 0, 1), clamp(fy, 0, 1));
    e.preventDefault();
  }, { passive: false });
  canvas.addEventListener("dblclick", () => { state.x = state.y = 0; state.n = T; draw(); });
}

function key(e) {
  if (e.ctrlKey || e.metaKey || e.altKey || $("help").open) return;
  const target = e.target.tagName;
  const arrows = target === "INPUT" || target === "SELECT";
  const does = {
    ArrowLeft: () => go(state.layer, state.head - 1), ArrowRight: () => go(state.layer, state.head + 1),
    ArrowUp: () => go(state.layer - 1, state.head), ArrowDown: () => go(state.layer + 1, state.head),
    j: () => step(1), k: () => step(-1), 1: () => look("scores"), 2: () => look("mask"), 3: () => look("weights"), 4: () => look("added"),
    "+": () => closer(0.7), "=": () => closer(0.7), "-": () => closer(1 / 0.7), 0: () => zoom(T),
    s: () => $("sort").click(), t: () => $("theme").click(), "?": () => $("ask").click(), Escape: () => pick(-1),
  }[e.key];
  if (!does || (arrows && e.key.startsWith("Arrow"))) return;
  does();
  e.preventDefault();
}

function begin() {
  $("model").textContent = `${meta.model} · ${layers.length} layers × ${columns} heads · ${T} tokens${meta.ablated ? " · without " + meta.ablated : ""}`;
  document.title = "Attention · " + meta.model;
  $("made").textContent = `Made by tril ${meta.version} from one forward pass (${meta.dtype}). The page holds queries and keys as ${meta.half ? "fp16" : "fp32"} and needs no network.`;
  for (const [view, text] of [["scores", "Scaled QKᵀ"], ["added", "+ added"], ["mask", "Mask"], ["weights", "Softmax"]]) {
    const b = document.createElement("button");
    b.type = "button";
    b.dataset.view = view;
    b.textContent = view === "added" ? "+ " + ([...new Set(layers.map((_, l) => addedName(l)))].find(Boolean) || "") : text;
    b.addEventListener("click", () => look(view));
    $("views").append(b);
  }
  MEASURES.forEach((m, i) => {
    if (m.key === 5 && !layers.some((l) => l.sink)) return;
    $("measure").append(new Option(m.name, i));
  });
  $("measure").addEventListener("change", (e) => { state.measure = +e.target.value; arrangeTiles(); });
  $("sort").addEventListener("click", (e) => {
    state.sorted = !state.sorted;
    e.currentTarget.setAttribute("aria-pressed", state.sorted);
    arrangeTiles();
  });
  $("depth").max = layers.length - 1;
  $("depth").addEventListener("input", (e) => go(+e.target.value, state.head));
  $("head").addEventListener("input", (e) => go(state.layer, +e.target.value));
  $("theme").addEventListener("click", () => theme(dark() ? "light" : "dark"));
  $("ask").addEventListener("click", () => $("help").showModal());
  $("closer").addEventListener("click", () => closer(0.7));
  $("farther").addEventListener("click", () => closer(1 / 0.7));
  $("whole").addEventListener("click", () => zoom(T));
  document.addEventListener("keydown", key);
  window.addEventListener("resize", draw);
  const prefers = window.matchMedia("(prefers-color-scheme: dark)");
  prefers.addEventListener("change", () => theme(prefers.matches ? "dark" : "light"));
  document.documentElement.dataset.theme = prefers.matches ? "dark" : "light";
  listenMatrix();
  makeText();
  makeTiles();
  arrangeTiles();
  const asked = /^#(\d+)\.(\d+)$/.exec(location.hash), first = layers.findIndex((l) => l.seen);
  state.layer = clamp(asked ? +asked[1] : meta.start[0] >= 0 ? meta.start[0] : Math.max(0, first), 0, layers.length - 1);
  state.head = clamp(asked ? +asked[2] : Math.max(0, meta.start[1]), 0, Math.max(0, layers[state.layer].heads - 1));
  state.picked = Math.floor(0.6 * Math.min(T, 64)); /* in the midst, so that both sides show */
  drawNow();
  /* What is in sight at once; the rest when it comes near. */
  for (const b of [...tiles.values()].filter((t) => t.getBoundingClientRect().top < window.innerHeight)) { b.near = true; drawTile(b); }
  document.documentElement.dataset.ready = Math.round(performance.now());
}
begin();
})();
