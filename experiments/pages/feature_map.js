// Attention in two dimensions. A test holds phi and weights equal to feature_maps.py and attention.py.
"use strict";

const { keys, start, labels } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const now = structuredClone(start); // q, t, W (2 x 4), b (4), form: what the reader can change
const SOFTMAX = "softmax", NAMES = ["softmax", "elu", "exp", "hedgehog"];

// ------------------------------------------------ the mathematics: feature_maps.py in a few lines

const sum = (x) => x.reduce((a, b) => a + b, 0);
const dot = (x, y) => sum(x.map((_, i) => x[i] * y[i]));
const divided = (x) => { const total = sum(x); return x.map((a) => a / total); };
const softmax = (x) => { const most = Math.max(...x); return divided(x.map((a) => Math.exp(a - most))); };

const phi = {
  elu: (x) => x.map((a) => a > 0 ? a + 1 : Math.exp(a)),
  exp: (x, { t }) => x.map((a) => Math.exp(t * a)),
  hedgehog: (x, { W, b, form }) => {
    const u = b.map((bias, f) => W[0][f] * x[0] + W[1][f] * x[1] + bias), minus = u.map((a) => -a);
    return form === "hedgehog" ? [...softmax(u), ...softmax(minus)] : [...u, ...minus].map(Math.exp);
  },
};

function weights(name, q, p) {
  if (name === SOFTMAX) return softmax(keys.map((k) => dot(q, k) / Math.SQRT2)); // Eq. 1
  const phiQ = phi[name](q, p);
  return divided(keys.map((k) => dot(phiQ, phi[name](k, p)))); // Eq. 2
}

const crossEntropy = (A, B) => -sum(A.map((a, j) => a * Math.log(Math.max(B[j], 1e-30)))); // Eq. 3, nats
const entropy = (A) => crossEntropy(A, A);

// Kendall's tau: pairs of keys in the order of q.k, less those in the opposite order. Rounding makes ties.
function tau(A, scores) {
  const sign = (a) => Math.abs(a) < 1e-12 ? 0 : Math.sign(a);
  let order = 0, n = 0, m = 0;
  for (let i = 0; i < A.length; i++) {
    for (let j = 0; j < i; j++) {
      const x = sign(A[i] - A[j]), y = sign(scores[i] - scores[j]);
      order += x * y; n += x * x; m += y * y;
    }
  }
  return n * m ? order / Math.sqrt(n * m) : 0;
}

// ------------------------------------------------ learning W and b: Eq. 3, with every key also as a query

const teachers = keys.map((q) => weights(SOFTMAX, q));
function loss(p) {
  const features = keys.map((k) => phi.hedgehog(k, p));
  const linear = (i) => divided(features.map((f) => dot(features[i], f)));
  return sum(keys.map((_, i) => crossEntropy(teachers[i], linear(i)))) / keys.length;
}

// One step down the gradient, which is measured: each number is moved a little up and a little down.
function learnStep(p, rate = 1, h = 1e-4) {
  const places = [...p.W, p.b].flatMap((row) => row.map((_, f) => [row, f]));
  const gradient = places.map(([row, f]) => {
    const old = row[f];
    const at = (value) => { row[f] = value; return loss(p); };
    const slope = (at(old + h) - at(old - h)) / (2 * h);
    row[f] = old;
    return slope;
  });
  const size = Math.max(1, Math.sqrt(dot(gradient, gradient)));
  places.forEach(([row, f], n) => { row[f] = Math.max(-6, Math.min(6, row[f] - rate * gradient[n] / size)); });
}

// ------------------------------------------------ pictures: y goes down in SVG, so y is negated

const circle = (x, y, w, j) => `<circle class="key" data-key="${j}" data-weight="${w.toFixed(3)}" cx="${x}" cy="${y}"
  r="${0.1 + 0.3 * Math.sqrt(w)}" fill-opacity="${Math.sqrt(w)}"><title>weight ${w.toFixed(3)}</title></circle>`;
const line = (x1, y1, x2, y2, name) => `<line class="${name}" x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`;
const words = (x, y, text, end = "start") => `<text x="${x}" y="${y}" text-anchor="${end}">${text}</text>`;

function plane(name, A) {
  const [x, y] = now.q;
  let inside = line(-3.4, 0, 3.4, 0, "axis") + line(0, -3.4, 0, 3.4, "axis") + words(3.3, -0.1, "x₁", "end") +
    words(0.1, -3, "x₂");
  if (name === "hedgehog") now.b.forEach((_, f) => inside += line(0, 0, now.W[0][f], -now.W[1][f], "column"));
  keys.forEach((k, j) => inside += circle(k[0], -k[1], A[j], j));
  return inside + line(0, 0, x, -y, "query");
}

// Weight on a logarithmic scale from 0.001 to 1, against q.k / sqrt(D) from -6 to 6.
function curve(A, scores) {
  const X = (s) => Math.max(-3, Math.min(3, s / 2)), Y = (w) => -Math.max(0, 3 + Math.log10(Math.max(w, 1e-9)));
  const order = keys.map((_, j) => j).sort((i, j) => scores[i] - scores[j]);
  let inside = "";
  for (const w of [0.001, 0.01, 0.1, 1]) inside += line(-3, Y(w), 3, Y(w), "axis") + words(-3.1, Y(w) + 0.13, w, "end");
  for (const s of [-6, 0, 6]) inside += words(X(s), 0.5, s, "middle");
  inside += words(0, 0.95, "q·k / √D", "middle") + words(-3, -3.2, "weight");
  inside += `<polyline class="line" points="${order.map((j) => `${X(scores[j])},${Y(A[j])}`).join(" ")}"/>`;
  return inside + order.map((j) => circle(X(scores[j]), Y(A[j]), A[j], j)).join("");
}

// The plane of two features: those that are largest for the query.
function features(name, A) {
  if (name === SOFTMAX) return words(3, -2.9, "Softmax needs infinitely many", "middle") + words(3, -2.3, "features", "middle");
  const phiQ = phi[name](now.q, now), phiK = keys.map((k) => phi[name](k, now));
  const [f, g] = phiQ.map((_, i) => i).sort((i, j) => phiQ[j] - phiQ[i]).slice(0, 2).sort();
  const most = Math.max(...[phiQ, ...phiK].flatMap((p) => [p[f], p[g]])), place = (a) => 5.6 * a / most;
  let inside = line(0, 0, 6, 0, "axis") + line(0, 0, 0, -5.8, "axis");
  inside += words(6, 0.5, `φ${f + 1}, to ${most < 100 ? most.toPrecision(2) : Math.round(most)}`, "end") + words(0.1, -5.7, `φ${g + 1}`);
  phiK.forEach((p, j) => inside += circle(place(p[f]), -place(p[g]), A[j], j));
  return inside + line(0, 0, place(phiQ[f]), -place(phiQ[g]), "query");
}

// ------------------------------------------------ the page

const cards = {};

function buildCards() {
  const svg = (name, box) => `<svg class="${name}" viewBox="${box}"></svg>`;
  for (const name of NAMES) {
    const card = cards[name] = document.createElement("article");
    card.className = "card";
    card.dataset.map = name;
    card.innerHTML = `<h2></h2><p class="number"></p><p class="measures"></p>
      <svg class="plane" viewBox="-3.4 -3.4 6.8 6.8" tabindex="0" role="application"
        aria-label="The plane of queries and keys: arrows move the query"><g></g><circle class="handle" r=".32"/></svg>
      ${svg("curve", "-4.3 -3.7 7.7 4.8")}<p class="soft">φ of the keys, the two features that are largest for q; the line is φ(q):</p>${svg("features", "-.4 -6.2 6.8 6.9")}`;
    $("maps").append(card);
    listenToPlane(card.querySelector(".plane"));
  }
}

function show() {
  const scores = keys.map((k) => dot(now.q, k) / Math.SQRT2), teacher = weights(SOFTMAX, now.q);
  for (const name of NAMES) {
    const A = weights(name, now.q, now), part = (selector) => cards[name].querySelector(selector);
    part("h2").textContent = name === "exp" ? `exp(t x), t = ${now.t.toFixed(1)}` : labels[name === "hedgehog" ? now.form : name];
    part(".number").textContent = `looks at ${Math.exp(entropy(A)).toFixed(1)} of ${keys.length} keys`;
    part(".measures").textContent = `entropy ${entropy(A).toFixed(2)} nats, KL(softmax, it) ` +
      `${Math.abs(crossEntropy(teacher, A) - entropy(teacher)).toFixed(2)} nats, Kendall's tau ${tau(A, scores).toFixed(2)}`;
    part(".plane g").innerHTML = plane(name, A);
    part(".handle").setAttribute("cx", now.q[0]);
    part(".handle").setAttribute("cy", -now.q[1]);
    part(".curve").innerHTML = curve(A, scores);
    part(".features").innerHTML = features(name, A);
  }
  $("loss").textContent = `Eq. 3 for this query: L = ${crossEntropy(teacher, weights("hedgehog", now.q, now)).toFixed(3)} nats. ` +
    `Mean with each key as the query: ${loss(now).toFixed(3)} nats.`;
  for (const input of document.querySelectorAll("input")) input.update();
}

// Light up a symbol in the equations for a second.
const timers = {};
function moved(symbol) {
  const light = (on) => document.querySelectorAll(`[data-symbol=${symbol}]`).forEach((s) => s.classList.toggle("moved", on));
  clearTimeout(timers[symbol]);
  light(true);
  timers[symbol] = setTimeout(light, 1500, false);
}

function moveQuery(x, y) {
  const inside = (a) => Math.max(-3, Math.min(3, a));
  now.q = [inside(x), inside(y)];
  moved("q");
  show();
}

function listenToPlane(svg) {
  const follow = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    moveQuery(at.x, -at.y);
  };
  const handle = svg.querySelector(".handle");
  handle.addEventListener("pointerdown", (event) => handle.setPointerCapture(event.pointerId));
  handle.addEventListener("pointermove", (event) => { if (handle.hasPointerCapture(event.pointerId)) follow(event); });
  svg.addEventListener("click", follow);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    moveQuery(now.q[0] + 0.1 * step[0], now.q[1] + 0.1 * step[1]);
  });
}

// A slider for row[n]: symbol is what it moves in the equations, name what is written above it.
function addSlider(parent, symbol, name, row, n, least, most) {
  const label = document.createElement("label"), text = document.createElement("span"), input = document.createElement("input");
  Object.assign(input, { type: "range", min: least, max: most, step: 0.1 });
  input.dataset.name = name;
  input.update = () => {
    input.value = row()[n];
    text.textContent = `${name} = ${(Math.round(10 * row()[n]) / 10 || 0).toFixed(1)}`; // not -0.0
  };
  input.addEventListener("input", () => {
    row()[n] = Number(input.value);
    moved(symbol);
    show();
  });
  label.append(text, input);
  parent.append(label);
}

function buildSliders() {
  for (const n of [0, 1]) addSlider($("q"), "q", `q${n + 1}`, () => now.q, n, -3, 3);
  addSlider($("t"), "t", "t", () => now, "t", 0.1, 3);
  for (const [name, row, what] of [["W1", () => now.W[0], "of x₁"], ["W2", () => now.W[1], "of x₂"], ["b", () => now.b, "b"]]) {
    $("W").append(Object.assign(document.createElement("span"), { textContent: what }));
    for (let f = 0; f < 4; f++) addSlider($("W"), name[0], `${name}${f + 1}`, row, f, -6, 6);
  }
}

let steps = 0;
function learn() {
  if (steps-- <= 0) return;
  learnStep(now);
  moved("W");
  moved("b");
  show();
  requestAnimationFrame(learn);
}

buildCards();
buildSliders();
$("form").addEventListener("change", () => { now.form = $("form").value; show(); });
$("learn").addEventListener("click", () => { const idle = steps <= 0; steps = 100; if (idle) learn(); });
$("forget").addEventListener("click", () => { steps = 0; Object.assign(now, structuredClone({ W: start.W, b: start.b })); show(); });
for (let n = 0; n < 100; n++) learnStep(now); // so that the first look is at a learned map
show();
document.body.dataset.ready = "yes";
