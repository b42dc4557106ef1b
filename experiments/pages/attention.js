// Shows attention weights that Python has computed. Nothing is computed here but exp(entropy).
// experiments/attention_page.py says what is in `data`.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { tokens, causal, layers, heads, maps } = data;
const T = tokens.length;
const at = { token: data.token, key: 0, layer: data.layer, head: data.head }; // what the reader has chosen
const $ = (id) => document.getElementById(id);

// Five letters are four bytes, as in Python's b85encode, but with a comma in the place of "<".
const LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~";
const VALUES = Object.fromEntries([...LETTERS].map((letter, value) => [letter, value]));
function bytesOf(text) {
  const words = Math.ceil(text.length / 5), padded = text.padEnd(5 * words, "~");
  const bytes = new DataView(new ArrayBuffer(4 * words));
  for (let n = 0; n < words; n++) {
    let word = 0;
    for (let i = 5 * n; i < 5 * n + 5; i++) word = 85 * word + VALUES[padded[i]];
    bytes.setUint32(4 * n, word);
  }
  return bytes.buffer.slice(0, Math.floor(text.length * 4 / 5));
}

// Whole numbers below 65536: compressed bytes, first all low ones, then all high ones.
async function unpack(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const numbers = new Uint16Array(planes.length / 2);
  for (let n = 0; n < numbers.length; n++) numbers[n] = planes[n] + 256 * planes[n + numbers.length];
  return numbers;
}

// Weights are stored head by head and query by query. A causal query i has the keys 0 to i only.
const rowStart = (i) => causal ? i * (i + 1) / 2 : i * T;
const headNumber = () => at.layer * heads + at.head;
const seen = (i, j) => !causal || j <= i;
function weight(map, i, j) {
  return seen(i, j) ? map.weights[headNumber() * rowStart(T) + rowStart(i) + j] / data.steps : 0;
}
const entropy = (map, i) => map.entropies[headNumber() * T + i] / 1000; // in nats

const visible = (token) => token === "" ? "∅" : token.replace("\n", "↵\n").replace("\t", "→\t").replace("\r", "␍");
const quoted = (i) => `“${visible(tokens[i]).replace("\n", "")}”`;
const lookedAt = (nats) => `looks at ${Math.exp(nats).toFixed(1)} tokens`;
const shade = (share) => `rgb(var(--shade) / ${Math.min(1, share).toFixed(3)})`;

function add(parent, tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return parent.appendChild(made);
}

// ------------------------------------------------ the parts of the page, made once

function addTokens(box) {
  return tokens.map((token, i) => {
    const span = add(box, "span", visible(token));
    span.dataset.token = i;
    return span;
  });
}

function build() {
  $("about").textContent = data.about;
  $("made").textContent = data.made;
  at.spans = addTokens($("text"));
  for (const span of at.spans) span.setAttribute("role", "option");
  at.spans.forEach((span, i) => span.id = `token-${i}`);
  for (const map of maps) {
    const card = add($("maps"), "article", "", "card");
    card.dataset.map = map.name;
    add(card, "h2", map.label);
    map.ofToken = add(card, "p");
    map.spans = addTokens(add(card, "div", "", "tokens"));
    map.ofKey = add(card, "p");
    map.most = add(card, "p", "", "soft");
    map.ofHead = add(card, "p", "", "soft");
    add($("of"), "option", map.label).value = map.name;
  }
  $("of").value = maps[Math.min(1, maps.length - 1)].name;
  for (const w of [0, 0.02, 0.1, 0.25, 0.5, 1]) {
    add($("legend"), "span", w).style.backgroundColor = shade(Math.sqrt(w));
  }
  buildGrid();
}

function buildGrid() {
  const grid = $("grid");
  grid.style.gridTemplateColumns = `auto repeat(${heads}, minmax(0, 1fr))`;
  add(grid, "span", "head");
  for (let h = 0; h < heads; h++) add(grid, "span", h).style.textAlign = "center";
  at.cells = [];
  for (let l = 0; l < layers; l++) {
    add(grid, "span", `layer ${l} `);
    for (let h = 0; h < heads; h++) {
      const cell = add(grid, "button");
      cell.addEventListener("click", () => choose({ layer: l, head: h }));
      at.cells.push(cell);
    }
  }
}

// ------------------------------------------------ what is shown of the chosen token and head

function choose(change) {
  Object.assign(at, change);
  const i = at.token;
  $("where").innerHTML = "";
  add($("where"), "b", `Token ${i}, ${quoted(i)}, in layer ${at.layer}, head ${at.head}:`);
  at.spans.forEach((span, j) => {
    span.classList.toggle("chosen", j === i);
    span.setAttribute("aria-selected", j === i);
  });
  $("text").setAttribute("aria-activedescendant", `token-${i}`);
  for (const map of maps) showMap(map, i);
  showGrid();
}

function showMap(map, i) {
  const weights = tokens.map((_, j) => weight(map, i, j));
  map.spans.forEach((span, j) => {
    span.style.backgroundColor = shade(Math.sqrt(weights[j]));
    span.dataset.weight = weights[j].toFixed(3);
    span.title = seen(i, j) ? `token ${j}: weight ${weights[j].toFixed(3)}` : `token ${j} comes later: not seen`;
    span.classList.toggle("unseen", !seen(i, j));
    span.classList.toggle("chosen", j === i);
    span.classList.toggle("read", j === at.key);
  });
  map.ofKey.textContent = `token ${at.key}, ${quoted(at.key)}: ` +
    (seen(i, at.key) ? `weight ${weights[at.key].toFixed(3)}` : "comes later, not seen");
  map.ofToken.innerHTML = "";
  add(map.ofToken, "span", lookedAt(entropy(map, i)), "number");
  add(map.ofToken, "span", ` (entropy ${entropy(map, i).toFixed(3)} nats)`, "soft");
  const most = weights.map((w, j) => [w, j]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  map.most.textContent = "most at " + most.map(([w, j]) => `${quoted(j)} (token ${j}) ${w.toFixed(3)}`).join(", ");
  const of = (measure) => map[measure][at.layer][at.head];
  map.ofHead.textContent = `This head: ${lookedAt(of("entropy"))} (entropy ${of("entropy").toFixed(3)} nats), ` +
    `KL ${of("kl").toFixed(3)} nats, Kendall's tau ${of("tau").toFixed(3)}`;
}

function showGrid() {
  const map = maps.find((map) => map.name === $("of").value), measure = $("measure").value;
  const values = map[measure].flat(), most = Math.max(...values, 1e-9);
  at.cells.forEach((cell, n) => {
    const name = `layer ${Math.floor(n / heads)}, head ${n % heads}`;
    cell.style.backgroundColor = shade(values[n] / most);
    cell.title = `${name}: ${values[n].toFixed(3)} nats`;
    cell.setAttribute("aria-label", cell.title);
    cell.setAttribute("aria-pressed", n === headNumber());
    cell.textContent = heads <= 8 ? values[n].toFixed(2) : "";
  });
  const meaning = measure === "kl" ? "0 is a perfect mimic of softmax" : "small is spiky";
  $("range").textContent = `From no colour, 0 nats, to blue, ${most.toFixed(2)} nats: ${meaning}.`;
}

// ------------------------------------------------ pointer and keyboard

function listen() {
  const tokenOf = (event) => event.target.closest("[data-token]")?.dataset.token;
  const choosing = (what) => (event) => { if (tokenOf(event)) choose({ [what]: Number(tokenOf(event)) }); };
  for (const event of ["pointerover", "click"]) { // a tap is a click
    $("text").addEventListener(event, choosing("token"));
    $("maps").addEventListener(event, choosing("key"));
  }
  $("of").addEventListener("change", showGrid);
  $("measure").addEventListener("change", showGrid);
  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || event.target.tagName === "SELECT" || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const [down, right] = step, inGrid = $("grid").contains(document.activeElement);
    const moved = (name, by, n) => ({ [name]: Math.min(n - 1, Math.max(0, at[name] + by)) });
    if (down) choose(moved("layer", down, layers));
    else if (event.shiftKey || inGrid) choose(moved("head", right, heads));
    else choose(moved("token", right, T));
    if (inGrid) at.cells[headNumber()].focus();
    else at.spans[at.token].scrollIntoView({ block: "nearest" });
  });
}

async function start() {
  for (const map of maps) {
    map.weights = await unpack(map.weights);
    map.entropies = await unpack(map.entropies);
  }
  const seenFirst = tokens.map((_, j) => weight(maps[0], at.token, j));
  at.key = seenFirst.indexOf(Math.max(...seenFirst));
  build();
  listen();
  choose({});
  document.body.dataset.ready = "yes";
}
start();
