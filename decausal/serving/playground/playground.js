// The page: reads the form, asks the server, and plays what comes back pass by pass.

import { Pane, count } from "./playground-view.js";

const $ = (id) => document.getElementById(id);
const GAP = /\[\[(\d+|\?)\]\]/;
const SCHEDULES = {
  threshold: { name: "Threshold", value: 0.9, step: 0.05, min: 0, max: 1 },
  num_steps: { name: "Steps", value: 8, step: 1, min: 1, max: "" },
  entropy_bound: { name: "Nats", value: 1, step: 0.1, min: 0, max: "" },
};
const EXAMPLES = {
  fill: "class Point:\n    def __init__(self, x, y):[[8]]\n        self.y = y\n",
  several: "def read(path):\n    with open([[4]]) as file:\n        return[[6]]\n\n\nclass Reader:\n    def[[8]]\n        pass\n",
  continue: "def __init__(self, name, value=None):",
};

const panes = { model: new Pane($("pane-model")), source: new Pane($("pane-source")) };
let models = [];
let defaults = {};
let running = null;
let timer = null;

// What the text asks for: given texts and gaps in turn (null where a gap's length is unknown), or a prompt to continue.
function readText(text) {
  const pieces = text.split(GAP).map((piece, i) => (i % 2 ? gapLength(piece) : piece));
  const parts = pieces.filter((piece) => piece !== "");
  const tokens = Number($("max_tokens").value);
  if (pieces.length === 1) return { parts: null, pieces: [text, tokens, ""], isUnknown: false, numTokens: tokens };
  const isUnknown = pieces.includes(null);
  const numTokens = isUnknown ? tokens : pieces.reduce((sum, piece, i) => sum + (i % 2 ? piece : 0), 0);
  return { parts, pieces, isUnknown, numTokens };
}

function gapLength(digits) {
  if (digits === "?") return null;
  const length = Number(digits);
  if (Number.isSafeInteger(length)) return length; // what is too long for a row the server refuses
  const shown = `${digits.slice(0, 9)}… (${digits.length} digits)`;
  throw new Error(`a gap of ${shown} tokens is not accepted: a row has at most ${models[0]?.max_model_len}`);
}

function settings() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  return {
    temperature: number("temperature"),
    top_p: number("top_p"),
    seed: number("seed"),
    // Verified decoding has no steps to schedule.
    ...($("speculative").checked
      ? {}
      : { confidence: $("confidence").value, [$("schedule").value]: number("schedule-value") }),
    speculative: $("speculative").checked || (defaults.speculative ? false : undefined),
    remask: $("remask").checked ? defaults.remask || true : defaults.remask ? false : undefined,
  };
}

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const options = body ? { method: "POST", body: JSON.stringify(body), headers, signal } : { headers, signal };
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("key-field").hidden = false;
    $("key").focus();
  }
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered with status ${answer.status}`);
}

// Yields the events of a stream as objects.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      const data = piece.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function write(pane, model, body, signal) {
  const started = performance.now();
  const answer = await ask("v1/completions", { model, stream: true, ...body }, signal);
  let text = "";
  for await (const event of events(answer)) {
    text += event.choices[0]?.text ?? "";
    if (event.choices[0]?.finish_reason) {
      pane.text = text;
      pane.numForwards = event.choices[0].decausal.num_forwards;
      pane.drafts = event.choices[0].decausal.drafts;
      pane.seconds = (performance.now() - started) / 1000;
    }
    if (event.decausal?.draft) pane.add(event.decausal);
    follow();
  }
}

async function submit() {
  if (running) running.abort();
  pause();
  tellError(null);
  let asked;
  try {
    asked = { ...readText($("text").value), sampler: settings() };
  } catch (error) {
    return tellError(error.message);
  }
  const { parts, pieces, isUnknown, numTokens, sampler } = asked;
  const [model, source] = [models.find((m) => !m.decausal.is_source), models.find((m) => m.decausal.is_source)];
  const withSource = Boolean(source) && $("with-source").checked;
  running = new AbortController();
  const { signal } = running;
  setBusy(true, isUnknown ? "Trying lengths …" : "Writing …");
  $("result").hidden = false;
  $("pane-source").hidden = !withSource;
  panes.model.begin(pieces);
  panes.source.begin([pieces[0], numTokens, ""]);
  bringIntoView($("result"));
  const gaps = parts ? { decausal: { events: true, parts } } : { prompt: pieces[0], max_tokens: numTokens, decausal: { events: true } };
  const tasks = [write(panes.model, model?.id, { ...sampler, ...gaps }, signal)];
  if (withSource) {
    const { temperature, top_p, seed } = sampler;
    const row = { prompt: pieces[0], max_tokens: numTokens, temperature, top_p, seed, decausal: { events: true } };
    tasks.push(write(panes.source, source.id, row, signal));
  }
  try {
    await Promise.all(tasks);
    const passes = panes.model.frames.length;
    setBusy(false, `Done in ${count(passes, "pass")}${told(panes.model.drafts)}. The slider goes back through them.`);
  } catch (error) {
    if (signal !== running?.signal) return;
    running.abort();
    const wasStopped = error.name === "AbortError";
    setBusy(false, wasStopped ? "Stopped." : "");
    if (!wasStopped) tellError(error.message);
    if (!panes.model.frames.length) $("result").hidden = true;
  }
}

// What became of drafts, where the answer was speculated.
function told(drafts) {
  if (!drafts?.acceptance.length) return "";
  const shares = drafts.acceptance.map((share) => share.toFixed(2)).join(" ");
  const [shape] = Object.entries(drafts.passes).sort((one, other) => other[1] - one[1])[0];
  return `, ${drafts.tokens_per_pass.toFixed(2)} tokens each; drafts right: ${shares} (${shape})`;
}

// On a small screen what is written stands below the form.
function bringIntoView(element) {
  const { top } = element.getBoundingClientRect();
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (top > innerHeight * 0.75) element.scrollIntoView({ block: "start", behavior: isCalm ? "auto" : "smooth" });
}

const numPasses = () => Math.max(panes.model.frames.length, panes.source.frames.length);

// While a row is being written the slider stands at its end.
function follow() {
  $("pass").max = numPasses();
  showPass(numPasses());
}

function showPass(pass) {
  $("pass").value = pass;
  const name = `pass ${pass} of ${numPasses()}`;
  $("pass-name").textContent = name;
  $("pass").setAttribute("aria-valuetext", name);
  panes.model.show(pass);
  panes.source.show(pass);
}

function play() {
  if (timer) return pause();
  let pass = Number($("pass").value) >= numPasses() ? 0 : Number($("pass").value);
  setPlaying(true);
  const advance = () => {
    showPass(pass);
    if (pass++ >= numPasses()) pause();
  };
  timer = setInterval(advance, Math.max(60, Math.min(400, 6000 / Math.max(1, numPasses()))));
  advance();
}

function pause() {
  clearInterval(timer);
  timer = null;
  setPlaying(false);
}

function setPlaying(isPlaying) {
  $("play").firstElementChild.textContent = isPlaying ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", isPlaying ? "Pause" : "Replay");
}

function setBusy(isBusy, message) {
  $("stop").disabled = !isBusy;
  $("result").setAttribute("aria-busy", isBusy);
  $("status").textContent = message;
  if (!isBusy) running = null;
}

function tellError(message) {
  $("error").hidden = !message;
  $("error").textContent = message ?? "";
}

function setSchedule(name, value) {
  const { min, max, step, ...own } = SCHEDULES[name];
  $("schedule").value = name;
  $("schedule-name").textContent = own.name;
  Object.assign($("schedule-value"), { min, max, step, value: value ?? own.value });
}

function setColour() {
  const colour = $("colour").value;
  for (const pane of Object.values(panes)) pane.page.dataset.colour = colour;
  const legend = document.querySelector(".legend");
  legend.hidden = colour === "none";
  legend.dataset.colour = colour;
  [$("legend-low").textContent, $("legend-high").textContent] = colour === "order" ? ["first", "last"] : ["unsure", "sure"];
}

function insertGap() {
  const field = $("text");
  field.setRangeText("[[?]]", field.selectionStart, field.selectionEnd, "end");
  field.focus();
}

// The checkpoint's own sampler settings are what the form begins with.
function useDefaults(sampler) {
  for (const id of ["temperature", "top_p", "confidence"]) if (sampler[id] != null) $(id).value = sampler[id];
  for (const name of Object.keys(SCHEDULES)) if (sampler[name] != null) setSchedule(name, sampler[name]);
  $("remask").checked = Boolean(sampler.remask);
  $("speculative").checked = Boolean(sampler.speculative);
  defaults = sampler;
}

async function begin() {
  setSchedule("threshold");
  setColour();
  try {
    models = (await (await ask("v1/models")).json()).data;
  } catch (error) {
    $("model").textContent = "";
    return tellError(error.message);
  }
  const { id, max_model_len: longest, decausal: facts } = models.find((m) => !m.decausal.is_source);
  const layout = facts.block_size ? `${facts.layout}s of ${facts.block_size}` : facts.layout;
  $("model").textContent = `${id}: ${layout}, made from ${facts.source}, rows of up to ${longest} tokens`;
  $("source-choice").hidden = !models.some((m) => m.decausal.is_source);
  $("remask").closest("label").hidden = facts.layout !== "bidirectional";
  $("speculative").closest("label").hidden = facts.layout !== "block";
  if (!$("text").value) $("text").value = facts.has_infill ? EXAMPLES.fill : EXAMPLES.continue;
  for (const button of document.querySelectorAll("#gap, [data-example=fill], [data-example=several]"))
    button.hidden = !facts.has_infill;
  $("text-hint").hidden = !facts.has_infill;
  useDefaults(facts.sampler);
  tellError(null);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  if (event.key === "Escape" && running) running.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("gap").addEventListener("click", insertGap);
$("schedule").addEventListener("change", () => setSchedule($("schedule").value));
$("colour").addEventListener("change", setColour);
$("play").addEventListener("click", play);
$("pass").addEventListener("input", () => {
  pause();
  showPass(Number($("pass").value));
});
$("key").addEventListener("change", begin);
for (const button of document.querySelectorAll(".example"))
  button.addEventListener("click", () => {
    $("text").value = EXAMPLES[button.dataset.example];
    $("text").focus();
  });
begin();
