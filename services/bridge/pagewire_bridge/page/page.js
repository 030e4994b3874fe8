"use strict";

const root = new URL("..", document.currentScript.src); // where the APIs are
const $ = (id) => document.getElementById(id);
let messages = []; // of the conversation that is shown, as the API wants them
let running = null; // the AbortController of the answer that is being written

function headers() {
  const key = $("key").value;
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function listModels() {
  const response = await fetch(new URL("v1/models", root), { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  const options = (await response.json()).data.map((model) => new Option(model.id));
  $("model").replaceChildren(...options);
}

function show(role, text) {
  const article = document.createElement("article");
  article.className = role;
  const body = document.createElement("pre");
  body.textContent = text;
  article.append(body, document.createElement("footer"));
  $("conversation").append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

// The data of every event of a stream, in order.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function account(began, first, event) {
  const { usage, pagewire } = event;
  const seconds = (performance.now() - first) / 1000;
  const rate = usage.completion_tokens > 1 ? `${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "1 token";
  const parts = [
    rate,
    `first token after ${Math.round(first - began)} ms`,
    `${usage.prompt_tokens} prompt tokens, ${usage.prompt_tokens_details.cached_tokens} from the cache`,
  ];
  const { prefill_worker: prefill, decode_worker: decode, transferred_bytes: bytes } = pagewire;
  parts.push(prefill ? `prefill by ${prefill}, decode by ${decode}` : `served by ${decode}`);
  if (bytes) parts.push(`${(bytes / 1024).toFixed(0)} KiB of KV over ${pagewire.lane}`);
  return parts.join(" · ");
}

// Writes an answer to the conversation into the article. Returns its text; null if there is none.
async function answer(conversation, article) {
  const [body, foot] = article.children;
  const system = $("system").value.trim();
  const request = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    temperature: $("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("max-tokens").value) request.max_tokens = $("max-tokens").valueAsNumber;
  const began = performance.now();
  let first = 0;
  try {
    const { signal } = running;
    const response = await fetch(new URL("v1/chat/completions", root), {
      method: "POST", headers: headers(), body: JSON.stringify(request), signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const { content, reasoning } = event.choices[0]?.delta ?? {};
      if (content || reasoning) first ||= performance.now(); // thoughts are counted, too
      if (content) {
        body.textContent += content;
        article.scrollIntoView({ block: "end" });
      }
      if (event.usage) foot.textContent = account(began, first || performance.now(), event);
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    foot.className = stopped ? "" : "error";
    foot.textContent = stopped ? "stopped" : error.message;
    return (stopped && body.textContent) || null;
  }
  return body.textContent;
}

function send(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  ask(text);
}

async function ask(text) {
  const shown = [show("user", text), show("assistant", "")];
  const conversation = messages; // an answer that is late belongs to no later one
  const question = { role: "user", content: text };
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  const told = await answer([...conversation, question], shown[1]);
  if (told === null) offerAgain(text, shown); // what was not answered is not asked with the next question
  else conversation.push(question, { role: "assistant", content: told });
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  $("prompt").focus();
}

function offerAgain(text, shown) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Try again";
  button.addEventListener("click", () => {
    if (running) return;
    shown.forEach((article) => article.remove());
    ask(text);
  });
  shown[1].lastElementChild.append(" ", button);
}

$("composer").addEventListener("submit", send);
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("conversation").replaceChildren();
  $("prompt").focus();
});
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  begin();
});

function begin() {
  listModels().catch((error) => {
    const [, foot] = show("assistant", "").children;
    foot.className = "error";
    foot.textContent = error.message;
  });
}
begin();
