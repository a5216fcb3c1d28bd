/* Runs at the end of the page, with `due` (what tril printed of one head), `layer` and `head` (not 0):
 * real events in, what the page says out. */
(async () => {
  const report = document.createElement("pre"), $ = (id) => document.getElementById(id);
  const lines = [], failures = [], T = due.tokens.length;
  report.id = "report";
  const check = (what, good, got) => {
    lines.push((good ? "ok " : "FAILED ") + what + (good ? "" : ": " + got));
    if (!good) failures.push(what);
  };
  /* Nobody sees frames here, and under virtual time they may never come. */
  window.requestAnimationFrame = (draw) => setTimeout(draw, 10);
  const frame = () => new Promise((go) => setTimeout(go, 60));
  const press = async (key, on) => {
    (on || document.body).dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    await frame();
  };
  const canvas = $("matrix");
  /* The drawn square is square and ends 4 pixels from the right: its size follows from a label. */
  const point = (i, j, type) => {
    const r = canvas.getBoundingClientRect(), left = canvas.plot.left, top = canvas.plot.top, size = canvas.plot.size;
    canvas.dispatchEvent(new PointerEvent(type, {
      clientX: r.left + left + (j + 0.5) / T * size, clientY: r.top + top + (i + 0.5) / T * size,
      pointerId: 1, pointerType: "mouse", bubbles: true,
    }));
  };
  const pixel = (i, j) => { /* of the canvas, at the middle of a cell */
    const k = canvas.width / canvas.clientWidth, p = canvas.plot;
    const x = (p.left + (j + 0.5) / T * p.size) * k, y = (p.top + (i + 0.5) / T * p.size) * k;
    return [...canvas.getContext("2d").getImageData(Math.floor(x), Math.floor(y), 1, 1).data];
  };
  const shown = () => $("readout").textContent;
  /* "3·10⁻⁵" is how small weights are written. */
  const value = (text) => {
    const small = /(\d+)·10⁻([⁰¹²³⁴⁵⁶⁷⁸⁹]+)/.exec(text);
    return small ? small[1] * 10 ** -[...small[2]].reduce((n, c) => 10 * n + "⁰¹²³⁴⁵⁶⁷⁸⁹".indexOf(c), 0) : parseFloat(text);
  };
  const near = (text, w) => Math.abs(value(text) - w) <= (w < 0.0005 ? 0.5 * w + 1e-12 : (w < 0.0098 ? 0.00005 : 0.0005) * 1.01 + 0.003 * w);
  try {
    check("ready", +document.documentElement.dataset.ready > 0, document.documentElement.dataset.ready);
    lines.push("ready " + document.documentElement.dataset.ready);
    if (T >= 512) check("ready within bounds", +document.documentElement.dataset.ready < 15000, document.documentElement.dataset.ready);
    check("head title", /^Layer \d+, head \d+$/.test($("which").textContent), $("which").textContent);

    /* The grid: a picture for every head, drawn in more than one colour. */
    const tiles = [...document.querySelectorAll("#grid button")];
    const heads = new Set(tiles.map((t) => t.l + "." + t.h));
    check("tiles", tiles.length > 3 && heads.size === tiles.length, tiles.length);
    /* Drawn when they come into sight, which takes frames: only where they were in it at once. */
    const insight = tiles[0].getBoundingClientRect().top < window.innerHeight;
    const small = tiles[0].querySelector("canvas");
    await frame();
    const data = small.getContext("2d").getImageData(0, 0, small.width, small.height).data;
    if (insight) check("thumbnail drawn", small.width === Math.min(T, 64) && new Set(new Uint32Array(data.buffer)).size > 3, small.width);

    /* Choose the head by its tile, then read cells of it. */
    tiles.find((t) => t.l === layer && t.h === head).click();
    await frame();
    check("chosen", $("which").textContent === `Layer ${layer}, head ${head}`, $("which").textContent);
    check("in the address", location.hash === `#${layer}.${head}`, location.hash);
    const cells = [[T - 1, 0], [T - 1, T - 1], [T - 2, T - 3], [Math.floor(T / 2), 1], [0, 0], [5, 5], [7, 4], [2, T - 1]];
    for (const [i, j] of cells) {
      point(i, j, "pointermove");
      await frame();
      const given = typeof some === "undefined" ? null : some.find((c) => c[0] === i && c[1] === j);
      const w = due.weights ? due.weights[i][j] : given ? given[2] : null, sees = due.mask ? due.mask[i][j] : j <= i;
      const numbers = shown().match(/with ([\d.·⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)/);
      check(`seen ${i}, ${j}`, !!numbers === !!sees && shown().includes(sees ? "looks at" : "does not see"), shown());
      if (sees && w !== null) check(`weight ${i}, ${j}`, near(numbers[1], w), `${shown()} instead of ${w}`);
      const score = due.scores ? due.scores[i][j] : null, said = /score (-?[\d.]+)/.exec(shown());
      if (score !== null) check(`score ${i}, ${j}`, Math.abs(+said[1] - score) <= 0.006 + 0.002 * Math.abs(score), `${said[1]} instead of ${score}`);
      if (due.added && sees) {
        const added = /score -?[\d.]+, (-?[\d.]+) after/.exec(shown());
        check(`added ${i}, ${j}`, added && Math.abs(+added[1] - due.added[i][j]) <= 0.006 + 0.002 * Math.abs(due.added[i][j]), shown());
      }
    }
    /* Pixels: a large weight is far from the hidden colour. */
    canvas.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
    await press("Escape");
    const hidden = pixel(1, T - 2), own = pixel(0, 0);
    if (T < 100 && (!due.weights || due.weights[0][0] > 0.5)) check("colours", Math.abs(hidden[0] - own[0]) > 60 || Math.abs(hidden[2] - own[2]) > 60, hidden + " / " + own);

    /* Pick by the matrix: the lists are the row and the column. */
    point(T - 1, 2, "pointerdown");
    point(T - 1, 2, "pointerup");
    await frame();
    const span = document.querySelector('#text [aria-selected="true"]');
    check("picked", span && span.id === "w" + (T - 1), span && span.id);
    const first = $("out").firstElementChild;
    if (due.weights) check("looks most at", near(first.lastElementChild.textContent, Math.max(...due.weights[T - 1])), first.textContent);
    check("coloured text", [...document.querySelectorAll("#text span")].some((s) => s.style.background.includes("rgba")), "none");
    /* ... and by the text. */
    $("w1").click();
    await frame();
    check("picked in the text", $("w1").getAttribute("aria-selected") === "true" && $("out-title").textContent.includes("looks at"), $("out-title").textContent);
    if (due.weights) {
      const column = due.weights.map((row, i) => [row[1], i]).sort((a, b) => b[0] - a[0])[0];
      check("looked at by", near($("in").firstElementChild.lastElementChild.textContent, column[0]), $("in").firstElementChild.textContent);
    }
    await press("j");
    check("j", $("w2").getAttribute("aria-selected") === "true", "");
    await press("Escape");
    check("Escape", !document.querySelector('#text [aria-selected="true"]'), "");

    /* Views, keys, sliders, sorting, zoom, help, theme. */
    await press("1");
    check("scores view", document.querySelector('[data-view="scores"]').getAttribute("aria-pressed") === "true", "");
    await press("2");
    check("mask view", canvas.getAttribute("aria-label").startsWith("Mask"), canvas.getAttribute("aria-label"));
    await press("3");
    await press("ArrowLeft");
    check("left", $("which").textContent === `Layer ${layer}, head ${head - 1}`, $("which").textContent);
    await press("ArrowRight");
    await press("ArrowUp");
    const above = tiles.some((t) => t.l === layer - 1) ? head : 0; /* a layer without softmax has no heads */
    check("up", $("which").textContent === `Layer ${layer - 1}, head ${above}`, $("which").textContent);
    $("depth").value = layer;
    $("depth").dispatchEvent(new Event("input"));
    await frame();
    check("depth slider", $("which").textContent.startsWith(`Layer ${layer},`), $("which").textContent);
    $("measure").value = 1;
    $("measure").dispatchEvent(new Event("change"));
    $("sort").click();
    const order = [...document.querySelectorAll("#grid button small")].map((s) => parseFloat(s.textContent.split(/\s+/)[1]));
    check("sorted", order.length === tiles.length && order.every((v, i) => i === 0 || v <= order[i - 1]), order);
    const distances = due.heads.map((h) => h.distance);
    check("distance", order.some((v) => Math.abs(v - distances[0]) < 0.06), distances);
    $("sort").click();
    await press("+");
    check("zoomed", canvas.classList.contains("zoomed"), "");
    await press("0");
    check("whole again", !canvas.classList.contains("zoomed"), "");
    $("ask").click();
    check("help", $("help").open, "");
    $("help").close();
    const before = document.documentElement.dataset.theme, ground = getComputedStyle(document.body).backgroundColor;
    await press("t");
    check("theme", document.documentElement.dataset.theme !== before && getComputedStyle(document.body).backgroundColor !== ground, before);
    check("fits", document.documentElement.scrollWidth <= window.innerWidth + 1, document.documentElement.scrollWidth + " wide in " + window.innerWidth);
  } catch (e) {
    check("no exception", false, e.stack);
  }
  lines.push(failures.length ? failures.length + " failed" : "all good");
  report.textContent = lines.join("\n");
  for (const s of document.querySelectorAll("script")) s.remove(); /* the report alone is wanted */
  document.body.append(report);
})();
