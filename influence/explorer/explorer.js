/* The explorer's page: what is drawn and what is chosen. Texts are set as text, never as HTML. */

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "text", "line", "polyline", "circle", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") element.addEventListener("click", value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A text with some words marked. */
function parts(text, words) {
  return marked(text, words).map(([part, is]) => (is ? make("mark", {}, part) : part));
}

/** An example's text, its tokens coloured where something is known of them. */
function said(example, tokens) {
  if (!tokens) return [kinds.examples.texts[example]];
  const coloured = data.pieces[example].map((piece, t) => {
    const part = tokens.steps[t];
    const word = piece.trimStart();
    if (!part || !word) return [piece];
    const span = make("span", { class: `token ${part > 0 ? "more" : "less"}`, title: short(part * tokens.largest) }, word);
    span.style.setProperty("--much", `${Math.round(Math.abs(part) * 60)}%`);
    return [piece.slice(0, piece.length - word.length), span];
  });
  return [...coloured.flat(), data.texts[example]];
}

function hitsOf(view, i, lists, list, shared) {
  const most = Math.max(...lists.flat().map((hit) => Math.abs(hit.score)), 1e-300);
  return make("ol", { class: "hits" }, ...list.map((hit) => {
    const bar = make("i", { class: `bar ${hit.score >= 0 ? "more" : "less"}` });
    bar.style.width = `${(Math.abs(hit.score) / most) * 100}%`;
    const left = make("span", { class: "score" }, short(hit.score), bar);
    if (shared.has(hit.example)) left.append(make("span", { class: "both", title: "found by both" }, "in both"));
    const text = make("span", { class: "said" }, make("span", { class: "number" }, `#${kinds.examples.numbers[hit.example]}`),
      ...said(hit.example, tokensOf(view, i, lists, hit.pair)));
    const go = () => choose("examples", hit.example);
    return make("li", {}, make("button", { class: "hit", type: "button", "data-example": hit.example, on: go }, left, text));
  }));
}

function histogramOf(view, i, lists) {
  if (!view.counts) return make("p", { class: "note" }, "these scores were not all kept");
  const [counts, [low, high]] = [row(view.counts, i), row(view.edges, i)];
  const [width, height, most] = [340, 90, Math.max(...counts)];
  // the axis reaches the hits too, which may lie outside the examples of the histogram
  const scores = lists.flat().map((hit) => hit.score);
  const [left, right] = [Math.min(low, ...scores), Math.max(high, ...scores)];
  const x = (score) => ((score - left) / (right - left || 1)) * width;
  const step = (high - low) / counts.length;
  const bins = Array.from(counts, (count, bin) => make("rect", {
    class: "bin", x: x(low + bin * step), width: Math.max(0.5, x(low + step) - x(low) - 0.5),
    y: height - (Math.sqrt(count / most) * (height - 12)), height: Math.sqrt(count / most) * (height - 12),
  }, make("title", {}, `${count} from ${short(low + bin * step)} to ${short(low + (bin + 1) * step)}`)));
  const ticks = lists.flatMap((list, end) => list.map((hit) => make("rect", {
    class: end ? "less" : "more", x: x(hit.score) - 1, width: 2, y: height, height: 7 })));
  const zero = left < 0 && right > 0 ? [make("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: height })] : [];
  const label = (text, at, anchor) => make("text", { x: at, y: height + 20, "text-anchor": anchor }, text);
  return make("svg", { viewBox: `0 0 ${width} ${height + 24}`, role: "img", "aria-label": "histogram of scores" },
    ...zero, ...bins, ...ticks, label(short(left), 0, "start"), label(short(right), width, "end"));
}

function blocksOf(view, i) {
  if (!view.parts) return make("p", { class: "note" }, "scores that were computed as the corpus streamed by keep no blocks");
  const [sums, count] = [row(view.parts, i), view.blocks.length];
  const shown = view.blocks.map((block, b) => ({ ...block, ends: [sums[b], sums[count + b]] }))
    .sort((a, b) => Math.max(...b.ends.map(Math.abs)) - Math.max(...a.ends.map(Math.abs))).slice(0, 20);
  const most = Math.max(...shown.flatMap((block) => block.ends.map(Math.abs)), 1e-300);
  const cell = (value) => {
    const bar = make("i", { class: value >= 0 ? "more" : "less" });
    bar.style.width = `${(Math.abs(value) / most) * 50}%`;
    bar.style[value >= 0 ? "left" : "right"] = "50%";
    return make("span", { class: "cell", title: short(value) }, bar);
  };
  const head = ["block", "in the largest", "in the smallest", "rank"].map((name) => make("span", { class: "note" }, name));
  const rows = shown.flatMap((block) => [make("span", { class: "name", title: block.name }, block.name), ...block.ends.map(cell),
    make("span", { class: "rank", title: `effective rank, of ${block.dim}` }, short(Number(block.rank.toPrecision(3))))]);
  const more = count - shown.length;
  return make("div", {}, make("div", { class: "blocks" }, ...head, ...rows),
    ...(more ? [make("p", { class: "note" }, `and ${more} smaller`)] : []));
}

function spectrumOf(view) {
  if (!view.spectrum) return make("p", { class: "note" }, "scores keep no rows, and so no spectrum");
  const { values, rank, of, dim } = view.spectrum;
  const positive = values.filter((value) => value > values[0] * 1e-9);
  const [width, height] = [340, 100];
  if (positive.length < 2) return make("p", { class: "note" }, `effective rank ${short(rank)}`);
  const decades = Math.log10(positive[0] / positive.at(-1)) || 1;
  const points = positive.map((value, n) => [
    (Math.log(n + 1) / Math.log(positive.length)) * (width - 8) + 4,
    (Math.log10(positive[0] / value) / decades) * (height - 8) + 4]);
  return make("div", {},
    make("svg", { viewBox: `0 0 ${width} ${height + 18}`, role: "img", "aria-label": "eigenvalues, both axes logarithmic" },
      make("polyline", { class: "line", points: points.join(" ") }),
      ...points.map(([x, y], n) => make("circle", { class: "dot", cx: x, cy: y, r: 2 },
        make("title", {}, `eigenvalue ${n + 1}: ${short(positive[n])}`))),
      make("text", { x: 4, y: height + 14 }, "1"),
      make("text", { x: width, y: height + 14, "text-anchor": "end" }, String(positive.length)),
      make("text", { x: width, y: 14, "text-anchor": "end" }, `${short(positive[0])} down to ${short(positive.at(-1))}`)),
    make("p", { class: "note" }, `effective rank ${short(rank)} of at most ${Math.min(of, dim).toLocaleString("en")}`));
}

function panelOf(kind, side, i, shared) {
  const views = kinds[kind].views;
  const view = views[kinds[kind].chosen[side]];
  const select = make("select", { "aria-label": `measure of panel ${side + 1}`, "data-side": side },
    ...views.map((one, n) => make("option", { value: n }, one.name)));
  select.value = String(kinds[kind].chosen[side]);
  select.addEventListener("change", () => {
    kinds[kind].chosen[side] = Number(select.value);
    draw();
    document.querySelector(`select[data-side="${side}"]`).focus();
  });
  const lists = listsOf(view, i);
  return make("article", { class: "panel" }, select,
    make("h3", {}, "histogram of scores (height: square root of the count)"), histogramOf(view, i, lists),
    make("h3", {}, "largest scores (positive helps)"), hitsOf(view, i, lists, lists[0], shared[0]),
    make("h3", {}, "smallest scores (negative hurts)"), hitsOf(view, i, lists, lists[1], shared[1]),
    make("h3", {}, "what blocks add to these sums"), blocksOf(view, i),
    make("h3", {}, "eigenvalues of the rows"), spectrumOf(view));
}

const at = { kind: present[0], item: null, found: [], limit: 100 };
const $ = (id) => document.getElementById(id);

function words() {
  const typed = $("search").value.trim();
  return typed.startsWith("#") ? [] : typed.split(/\s+/);
}

function choose(kind, item) {
  const hash = `#${kind}=${item}`;
  if (location.hash === hash) draw();
  else location.hash = hash; // so that the browser's way back works
}

function fromHash() {
  const found = /^#(examples|queries)=(\d+)$/.exec(location.hash);
  if (!found || !present.includes(found[1]) || Number(found[2]) >= kinds[found[1]].texts.length) return;
  const other = at.kind !== found[1];
  [at.kind, at.item] = [found[1], Number(found[2])];
  if (other) search();
  draw();
}

function draw() {
  if (at.item === null) return;
  const [i, kind] = [at.item, kinds[at.kind]];
  const views = kind.chosen.map((n) => kind.views[n]);
  const two = views[0] !== views[1] || kind.views.length > 1;
  const [a, b] = views.map((view) => listsOf(view, i).map((list) => new Set(list.map((hit) => hit.example))));
  const shared = [0, 1].map((end) => (views[0] === views[1] ? new Set() : new Set([...a[end]].filter((one) => b[end].has(one)))));
  const facts = [at.kind === "examples" ? `example #${kind.numbers[i]}` : `query ${i}`];
  if (at.kind === "examples") facts.push(`loss ${short(row(data.loss, i)[0])}`);
  if (views[0] !== views[1]) facts.push(`the panels share ${shared[0].size} of the largest and ${shared[1].size} of the smallest`);
  $("facts").textContent = facts.join(" · ");
  $("text").replaceChildren(...parts(kind.texts[i], words()));
  $("panels").replaceChildren(...(two ? [0, 1] : [0]).map((side) => panelOf(at.kind, side, i, shared)));
  $("shown").hidden = false;
  $("shown").scrollTop = 0;
  for (const one of $("results").children) one.setAttribute("aria-selected", String(Number(one.dataset.item) === i));
}

function search() {
  const kind = kinds[at.kind];
  at.found = matching($("search").value, kind.lowered, kind.numbers);
  at.limit = 100;
  $("count").textContent = `${at.found.length.toLocaleString("en")} of ${kind.texts.length.toLocaleString("en")} ${at.kind}`;
  for (const one of $("kinds").children) one.setAttribute("aria-pressed", String(one.dataset.kind === at.kind));
  list();
}

function list() {
  const kind = kinds[at.kind];
  const found = at.found.slice(0, at.limit).map((i) => make("button", {
    class: "found", type: "button", role: "option", "data-item": i, "aria-selected": i === at.item, on: () => choose(at.kind, i),
  }, make("span", {}, make("span", { class: "number" }, `#${kind.numbers[i]}`), ...parts(kind.texts[i].slice(0, 300), words()))));
  const more = at.found.length > at.limit
    ? [make("button", { type: "button", id: "more", on: () => { at.limit += 200; list(); } }, "show more")] : [];
  $("results").replaceChildren(...found, ...more);
}

function keys(event) {
  const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("search").focus();
    $("search").select();
  }
  const inFinder = $("finder").contains(event.target);
  if (inFinder && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    const items = [$("search"), ...$("results").children];
    const next = items.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1);
    items[Math.max(0, Math.min(next, items.length - 1))].focus();
  }
  if (event.target === $("search") && event.key === "Enter" && at.found.length) choose(at.kind, at.found[0]);
}

function theme() {
  const order = ["", "light", "dark"];
  const root = document.documentElement;
  root.dataset.theme = order[(order.indexOf(root.dataset.theme ?? "") + 1) % 3];
  $("theme").textContent = root.dataset.theme || "theme";
}

function start() {
  $("notes").append(...data.notes.map((note) => make("li", {}, note)));
  if (present.length > 1) {
    $("kinds").append(...present.map((name) => make("button", {
      type: "button", "data-kind": name, on: () => { at.kind = name; at.item = null; search(); choose(name, at.found[0] ?? 0); },
    }, name)));
  }
  $("search").addEventListener("input", search);
  $("theme").addEventListener("click", theme);
  document.addEventListener("keydown", keys);
  window.addEventListener("hashchange", fromHash);
  search();
  fromHash();
  if (at.item === null) choose(at.kind, 0);
  document.documentElement.dataset.ready = "yes";
}
start();
