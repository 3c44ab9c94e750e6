"use strict";
// The page asks the same routes as any client. All text goes in as text, never as markup.
const $ = (id) => document.getElementById(id);
const KINDS = ["summarize", "classify", "extract", "generate"];
const HEADERS = { "Content-Type": "application/json", "X-Granite-Page": "1" };
const MAX_SHOWN = 200;
let rows = [], asked = null, abort = null;

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function say(text, isBad) {
  $("state").textContent = text;
  $("state").className = isBad ? "bad" : "soft";
}

// what is asked ///////////////////////////////////////////////////////////////////////////////////

function documents() {
  return $("documents").value.split(/^---$/m).map((one) => one.trim()).filter(Boolean);
}

function kind() {
  return $("task").selectedOptions[0].dataset.kind;
}

function section() {
  const chosen = $("task").selectedOptions[0];
  if (chosen.dataset.name) return chosen.dataset.name;
  const task = {}, lines = (id) => $(id).value.split("\n").map((x) => x.trim()).filter(Boolean);
  if (kind() !== "generate" && $("instruction").value.trim()) {
    task.instruction = $("instruction").value.trim();
  }
  if (kind() === "summarize") task.length = $("length").value;
  if (kind() === "classify") task.labels = lines("labels");
  if (kind() === "generate") task.template = $("template").value;
  if (kind() === "extract") {
    const text = $("schema").value.trim();
    task.schema = text.startsWith("{") ? JSON.parse(text) : {
      type: "object",
      properties: Object.fromEntries(lines("schema").map((name) => [name, { type: "string", "x-copy": true }])),
    };
  }
  return task;
}

function fitForm() {
  const own = !$("task").selectedOptions[0].dataset.name;
  for (const field of document.querySelectorAll("[data-for]")) {
    field.hidden = !own || !field.dataset.for.split(" ").includes(kind());
  }
}

function fitCount() {
  const number = documents().length;
  $("count").textContent = number === 1 ? "1 document" : `${number} documents`;
}

async function take(files) {
  const texts = [];
  for (const file of files) {
    const text = await file.text();
    if (!file.name.endsWith(".jsonl")) { texts.push(text.trim()); continue; }
    for (const line of text.split("\n")) {
      if (line.trim()) texts.push(String(JSON.parse(line).text ?? "").trim());
    }
  }
  const before = $("documents").value.trim();
  $("documents").value = [before, ...texts].filter(Boolean).join("\n---\n");
  fitCount();
}

// what comes back /////////////////////////////////////////////////////////////////////////////////

function scores(row, box) {
  for (const { label, probability } of row.scores.slice(0, 12)) {
    const chosen = label === row.label || (row.labels || []).includes(label);
    const line = make("div", undefined, chosen ? "score best" : "score");
    const bar = make("span", undefined, "bar"), fill = make("i");
    fill.style.width = `${100 * probability}%`;
    bar.append(fill);
    line.append(make("span", label), bar, make("span", `${(100 * probability).toFixed(1)} %`));
    box.append(line);
  }
  if (row.scores.length > 12) box.append(make("p", `and ${row.scores.length - 12} more labels`, "soft"));
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function fields(row, box) {
  const table = make("table");
  for (const [name, value] of Object.entries(row.fields ?? {})) {
    const line = make("tr");
    line.append(make("td", name), make("td", shown(value)));
    line.addEventListener("mouseenter", () => light(box, `/${name}`, true));
    line.addEventListener("mouseleave", () => light(box, `/${name}`, false));
    table.append(line);
  }
  box.append(table);
}

function light(box, path, on) {
  for (const mark of box.querySelectorAll("mark")) {
    if (mark.dataset.path.startsWith(path)) mark.classList.toggle("on", on);
  }
}

function source(row, text, box) {
  // Offsets count code points, which a string of JavaScript does not.
  const points = Array.from(text), place = make("div", undefined, "source");
  const found = (row.evidence || []).filter((one) => one.start !== null);
  found.sort((a, b) => a.start - b.start);
  let at = 0;
  for (const { path, start, end } of found) {
    if (start < at) continue;
    const mark = make("mark", points.slice(start, end).join(""));
    mark.dataset.path = mark.title = path;
    place.append(points.slice(at, start).join(""), mark);
    at = end;
  }
  place.append(points.slice(at).join(""));
  box.append(place);
}

function show(row) {
  rows.push(row);
  $("json").disabled = $("parquet").disabled = false;
  if (rows.length > MAX_SHOWN) return;
  const box = make("article", undefined, "card");
  box.dataset.row = row.source_row;
  box.append(make("h2", `Document ${row.source_row + 1}`));
  if (row.error) {
    box.append(make("p", row.error.message, "answer bad"));
  } else if (row.status === "failed") {
    box.append(make("p", `${row.error_type}: ${row.error_message}`, "answer bad"));
  } else {
    for (const text of [row.summary, row.text]) if (text) box.append(make("p", text, "answer"));
    if (row.key_points) for (const point of row.key_points) box.append(make("p", `• ${point}`, "answer"));
    if (row.scores) scores(row, box);
    if (row.fields) fields(row, box);
    if (row.num_prompt_tokens) {
      const tokens = row.num_prompt_tokens + row.num_completion_tokens;
      box.append(make("p", `${tokens.toLocaleString("en")} tokens`, "soft"));
    }
  }
  source(row, asked.documents[row.source_row] ?? "", box);
  const after = [...$("results").children].find((one) => +one.dataset.row > row.source_row);
  $("results").insertBefore(box, after ?? null);
}

async function problem(response) {
  try { return (await response.json()).error.message; } catch { return response.statusText; }
}

async function readLines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) show(JSON.parse(line));
    say(`${rows.length} of ${asked.documents.length} documents`);
    if (done) return;
  }
}

async function readBatch(batch, signal) {
  while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    batch = await (await fetch(`/v1/batches/${batch.id}`, { signal })).json();
    const { completed, failed, total } = batch.request_counts;
    say(`a batch, since these are many: ${completed + failed} of ${total} documents`);
  }
  if (batch.status !== "completed") throw new Error(`the batch has ${batch.status}`);
  const content = await fetch(`/v1/files/${batch.output_file_id}/content`, { signal });
  for (const line of (await content.text()).split("\n")) if (line) show(JSON.parse(line));
}

async function post(format, signal) {
  const response = await fetch(`/v1/${asked.kind}`, {
    method: "POST", headers: HEADERS, signal,
    body: JSON.stringify({ documents: asked.documents, task: asked.task, format }),
  });
  if (!response.ok) throw new Error(await problem(response));
  return response;
}

async function ask(event) {
  event.preventDefault();
  try {
    asked = { kind: kind(), task: section(), documents: documents() };
  } catch (error) {
    return say(`The schema is no JSON: ${error.message}`, true);
  }
  if (!asked.documents.length) return say("Paste or drop a document first.", true);
  rows = [];
  $("results").replaceChildren();
  $("json").disabled = $("parquet").disabled = $("ask").disabled = true;
  $("stop").hidden = false;
  abort = new AbortController();
  say("asking");
  const started = performance.now();
  try {
    const response = await post("jsonl", abort.signal);
    await (response.status === 202 ? readBatch(await response.json(), abort.signal) : readLines(response));
    const failed = rows.filter((row) => row.error || row.status === "failed").length;
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    say(`${rows.length} documents in ${seconds} s${failed ? `, ${failed} failed` : ""}`);
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  } finally {
    $("ask").disabled = false;
    $("stop").hidden = true;
  }
}

function download(blob, name) {
  const link = make("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function downloadParquet() {
  say("asking again, for a typed file");
  try {
    let response = await post("parquet");
    if (response.status === 202) {
      let batch = await response.json();
      while (batch.status !== "completed") {
        if (["failed", "expired", "cancelled"].includes(batch.status)) throw new Error(`the batch has ${batch.status}`);
        await new Promise((resolve) => setTimeout(resolve, 1000));
        batch = await (await fetch(`/v1/batches/${batch.id}`)).json();
      }
      response = await fetch(`/v1/files/${batch.output_file_id}/content`);
    }
    download(await response.blob(), "results.parquet");
    say("results.parquet is ready");
  } catch (error) {
    say(error.message, true);
  }
}

// start ///////////////////////////////////////////////////////////////////////////////////////////

async function start() {
  const [models, tasks] = await Promise.all(
    ["/v1/models", "/v1/tasks"].map(async (path) => (await (await fetch(path)).json()).data));
  $("model").textContent = models[0].id;
  const option = (text, kind, name) => {
    const one = make("option", text);
    one.dataset.kind = kind;
    if (name) one.dataset.name = name;
    $("task").append(one);
  };
  for (const { id, kind } of tasks) option(`${id} (${kind})`, kind, id);
  for (const kind of KINDS) option(kind, kind);
  fitForm();
  fitCount();
}

$("form").addEventListener("submit", ask);
$("stop").addEventListener("click", () => abort.abort());
$("task").addEventListener("change", fitForm);
$("documents").addEventListener("input", fitCount);
$("files").addEventListener("change", (event) => take(event.target.files));
$("documents").addEventListener("dragover", (event) => {
  event.preventDefault();
  $("documents").classList.add("over");
});
$("documents").addEventListener("dragleave", () => $("documents").classList.remove("over"));
$("documents").addEventListener("drop", (event) => {
  event.preventDefault();
  $("documents").classList.remove("over");
  take(event.dataTransfer.files).catch((error) => say(error.message, true));
});
$("json").addEventListener("click", () => {
  const sorted = [...rows].sort((a, b) => a.source_row - b.source_row);
  download(new Blob([JSON.stringify(sorted, null, 1)], { type: "application/json" }), "results.json");
});
$("parquet").addEventListener("click", downloadParquet);
start().catch((error) => say(error.message, true));
