// The playground: one question, the base model and up to four prompts, side by side. No library, nothing from elsewhere.
// Whatever the server or a user says is put into the page as text, never as markup.

const MOST = 4;
const $ = (id) => document.getElementById(id);
const make = (tag, text = "", className = "") => Object.assign(document.createElement(tag), { textContent: text, className });
const nats = (value) => value.toFixed(2);
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 2 });

let key = ""; // in memory only
let base = null;
let models = new Map(); // id -> model
let picked = []; // ids, in the order of their columns
let cards = new Map(); // id -> elements of its column
let running = null; // an AbortController while answers are being written

async function call(path, body, signal) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw Object.assign(new Error(said?.error?.message ?? `The server answered ${answer.status}.`), { status: answer.status });
}

// Events of a stream, as JSON; lines may be cut anywhere.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data: ") ? line.slice(6).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// Opening

async function open() {
  try {
    const found = (await (await call("/v1/models")).json()).data;
    base = found.find((model) => !model.parent);
    models = new Map(found.filter((model) => model.parent).map((model) => [model.id, model]));
  } catch (error) {
    const wrong = key !== "";
    $("unlock").hidden = error.status !== 401 && error.status !== 403;
    $("unlock-hint").textContent = wrong ? error.message : $("unlock-hint").textContent;
    if ($("unlock").hidden) say(error.message, true);
    else $("key").focus();
    return;
  }
  $("unlock").hidden = true;
  $("ask").hidden = false;
  $("about").textContent = base.id;
  picked = [...models.keys()].slice(0, 2);
  say(models.size ? "" : "There are no prompts for this key yet: the base model answers alone.");
  showChips();
  showCards();
  $("question").focus();
  watch();
}

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").className = failed ? "failed" : "";
}

// Picking

function showChips() {
  const wanted = $("filter").value.trim().toLowerCase();
  const shown = [...models.keys()].filter((id) => picked.includes(id) || id.toLowerCase().includes(wanted)).slice(0, 200);
  $("chips").replaceChildren(...shown.map((id) => {
    const chip = make("button", id);
    const place = picked.indexOf(id);
    chip.type = "button";
    chip.disabled = place < 0 && picked.length >= MOST;
    chip.setAttribute("aria-pressed", place >= 0);
    chip.style.setProperty("--hue", `var(--hue-${place + 1})`);
    chip.addEventListener("click", () => toggle(id));
    return chip;
  }));
  $("picked").textContent = `${picked.length} of ${MOST}, beside ${base.id}`;
}

function toggle(id) {
  picked = picked.includes(id) ? picked.filter((other) => other !== id) : [...picked, id].slice(0, MOST);
  const focused = document.activeElement?.textContent;
  showChips();
  showCards();
  [...$("chips").children].find((chip) => chip.textContent === focused)?.focus();
}

// A name may be typed in full: one with a version, or several joined by +.
async function addTyped() {
  const id = $("filter").value.trim();
  if (!id || picked.includes(id)) return;
  if (picked.length >= MOST) return say(`${MOST} prompts are compared already: put one away first.`, true);
  try {
    if (!models.has(id)) models.set(id, await (await call(`/v1/models/${encodeURIComponent(id)}`)).json());
    $("filter").value = "";
    toggle(id);
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

// Cards

function showCards() {
  const wanted = [base.id, ...picked];
  cards = new Map(wanted.map((id) => [id, cards.get(id) ?? makeCard(id)]));
  wanted.forEach((id, place) => cards.get(id).root.style.setProperty("--hue", `var(--hue-${place})`));
  $("answers").replaceChildren(...wanted.map((id) => cards.get(id).root));
}

function makeCard(id) {
  const root = $("card").content.firstElementChild.cloneNode(true);
  const find = (selector) => root.querySelector(selector);
  const about = models.get(id)?.prompt;
  find("h2").textContent = id;
  find(".kind").textContent = id === base.id ? "the frozen model, as it is"
    : about ? `${about.kind === "kv_prefix" ? "keys and values" : "virtual tokens"}, ${about.num_virtual_tokens} long` : "joined";
  const details = find("details");
  details.hidden = !about;
  details.addEventListener("toggle", () => details.open && describe(id, root), { once: true });
  return { root, answer: find(".answer"), figures: find(".figures") };
}

async function describe(id, root) {
  let about;
  try {
    about = (await (await call(`/v1/models/${encodeURIComponent(id)}`)).json()).prompt;
  } catch (error) {
    root.querySelector("dl").replaceChildren(make("dt", "Error"), make("dd", error.message));
    return;
  }
  const { metrics } = about;
  const rows = {
    Method: about.method?.name ?? about.method?.method,
    Version: about.version,
    Length: `${about.num_virtual_tokens} virtual tokens`,
    Parameters: about.parameters?.toLocaleString("en"),
    File: `${number(about.bytes / 1024)} KiB`,
    Template: about.template,
    Loss: typeof metrics.loss !== "number" ? null
      : typeof metrics.frozen_loss === "number" ? `${nats(metrics.frozen_loss)} → ${nats(metrics.loss)}` : nats(metrics.loss),
    Steps: metrics.steps,
    Owner: about.shared ? "shared with all" : null,
  };
  const shown = Object.entries(rows).filter(([, value]) => value !== null && value !== undefined && value !== "");
  root.querySelector("dl").replaceChildren(...shown.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  showCurve(root.querySelector("figure"), metrics);
  const words = root.querySelector(".words");
  words.hidden = !about.nearest_words?.length;
  words.querySelector("ol").replaceChildren(...(about.nearest_words ?? []).map((near) => make("li", near.join("  ·  "))));
}

function showCurve(figure, metrics) {
  const good = (curve) => Array.isArray(curve) && curve.length > 1 && curve.every((point) => point?.every?.(Number.isFinite));
  const curves = Object.entries({ train: metrics.train_curve, dev: metrics.dev_curve }).filter(([, curve]) => good(curve));
  figure.hidden = !curves.length;
  if (!curves.length) return;
  const points = curves.flatMap(([, curve]) => curve);
  const [left, right, low, high] = [0, 0, 1, 1].map((axis, i) => (i % 2 ? Math.max : Math.min)(...points.map((p) => p[axis])));
  const at = ([step, loss]) => `${(100 * (step - left)) / (right - left || 1)},${50 - (50 * (loss - low)) / (high - low || 1)}`;
  const draw = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const picture = draw("svg", { class: "curve", viewBox: "0 0 100 50", preserveAspectRatio: "none", role: "img",
    "aria-label": `Loss from ${nats(points[0][1])} to ${nats(points.at(-1)[1])} in ${right} steps` });
  picture.append(draw("line", { x1: 0, y1: 50, x2: 100, y2: 50 }));
  for (const [name, curve] of curves) picture.append(draw("polyline", { class: name, points: curve.map(at).join(" ") }));
  const ends = make("p", "", "ends hint");
  ends.append(make("span", `${nats(points[0][1])} nats`), make("span", `${nats(points.at(-1)[1])} after ${right} steps`));
  figure.append(picture, ends);
}

// Asking

async function ask() {
  running?.abort();
  running = new AbortController();
  const mine = running;
  busy(true);
  say("");
  await Promise.all([...cards.keys()].map((id) => write(id, mine.signal)));
  if (running === mine) busy(false);
}

function busy(yes) {
  if (!yes) running = null;
  $("stop").hidden = !yes;
  $("answers").setAttribute("aria-busy", yes);
}

async function write(id, signal) {
  const { answer, figures } = cards.get(id);
  answer.className = "answer writing";
  answer.textContent = figures.textContent = "";
  const chat = $("mode").value === "chat";
  const text = $("question").value;
  const input = chat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const body = { model: id, ...input, max_tokens: +$("most").value || 96, temperature: +$("temperature").value || 0,
    seed: +$("seed").value || 0, stream: true, stream_options: { include_usage: true } };
  const started = performance.now();
  let first = 0, usage = null;
  try {
    const stream = await call(chat ? "/v1/chat/completions" : "/v1/completions", body, signal);
    for await (const event of events(stream)) {
      if (event.error) throw new Error(event.error.message);
      const more = event.choices[0]?.delta?.content ?? event.choices[0]?.text ?? "";
      if (more) {
        first ||= performance.now();
        answer.append(more);
      }
      usage = event.usage ?? usage;
    }
    const seconds = (performance.now() - first) / 1000;
    const pace = usage?.completion_tokens > 1 && seconds > 0 ? `, ${number(Math.round((usage.completion_tokens - 1) / seconds))} a second` : "";
    figures.textContent = usage ? `${usage.completion_tokens} tokens${pace}, the first after ${Math.round(first - started)} ms` : "";
    if (!answer.textContent) answer.textContent = "(an empty answer)";
  } catch (error) {
    if (signal.aborted) figures.textContent = "stopped";
    else {
      answer.classList.add("failed");
      answer.textContent = error.message;
    }
  }
  answer.classList.remove("writing");
}

// The load of the server

async function watch() {
  for (;;) {
    if (!document.hidden) {
      try {
        showLoad(await (await call("/v1/load")).json());
      } catch {
        $("gauges").hidden = true;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function showLoad({ answers, engine, tiers }) {
  const gauge = (name, text, value, most) => {
    const box = make("div");
    box.append(make("dt", name), make("dd", text));
    if (most) box.lastChild.append(Object.assign(make("meter"), { min: 0, max: most, value, title: `${name}: ${text}` }));
    return box;
  };
  const writing = engine.running === undefined ? `${answers} under way` : `${engine.running} writing, ${engine.waiting} waiting`;
  const gauges = [gauge("Answers", writing)];
  if (engine.cache_budget) {
    gauges.push(gauge("Cache", `${number(engine.cache_bytes / 2 ** 20)} MiB`, engine.cache_bytes, engine.cache_budget));
  }
  for (const [name, tier] of Object.entries(tiers)) {
    const asked = tier.hits + tier.misses;
    const rate = asked ? `, ${Math.round((100 * tier.hits) / asked)} % hits` : "";
    gauges.push(gauge(name === "memory" ? "Prompts in memory" : name === "prefixes" ? "Ready prompts" : `Prompts on ${name}`,
      `${tier.entries}${rate}`, tier.bytes, tier.budget));
  }
  $("gauges").replaceChildren(...gauges);
  $("gauges").hidden = false;
}

// Events of the page

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  open();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => running?.abort());
$("filter").addEventListener("input", showChips);
$("filter").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  addTyped();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
open();
