// Ollama's own client for JavaScript on the running system at BASE_URL, which serves the demo model as `demo`.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Ollama } from "ollama";

const client = new Ollama({ host: process.env.BASE_URL });
const options = { temperature: 0, num_predict: 24 };
const question = { model: "demo", messages: [{ role: "user", content: "What is the capital of Japan?" }], options };
const tool = {
  type: "function",
  function: {
    name: "get_weather",
    description: "weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
      required: ["city", "unit"],
    },
  },
};

test("a chat is the same whole and streamed, and is accounted for", async () => {
  const whole = await client.chat(question);
  assert.equal(whole.message.content, "The capital of Japan is Tokyo.");
  assert.equal(whole.done_reason, "stop");
  assert.ok(whole.eval_count > 0 && whole.prompt_eval_count > 0 && whole.total_duration > 0);
  let text = "";
  let last = null;
  for await (const part of await client.chat({ ...question, stream: true })) {
    assert.ok(last === null || !last.done);
    text += part.message.content;
    last = part;
  }
  assert.equal(text, whole.message.content);
  assert.ok(last.done);
  assert.equal(last.eval_count, whole.eval_count);
});

test("a prompt is continued, whole, streamed and with its context", async () => {
  const asked = { model: "demo", prompt: "What is the capital of Japan?", options };
  const whole = await client.generate(asked);
  assert.equal(whole.response, "The capital of Japan is Tokyo.");
  let text = "";
  for await (const part of await client.generate({ ...asked, stream: true })) text += part.response;
  assert.equal(text, whole.response);
  const more = await client.generate({ ...asked, prompt: "And of Italy?", context: whole.context });
  assert.ok(more.context.length > whole.context.length);
});

test("calls of tools have objects as arguments", async () => {
  const asked = {
    model: "demo",
    messages: [{ role: "user", content: "Call get_weather for Rome in celsius." }],
    tools: [tool],
    options: { temperature: 0, num_predict: 80 },
  };
  const whole = await client.chat(asked);
  const [call] = whole.message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(Object.keys(call.function.arguments).sort(), ["city", "unit"]);
  const streamed = [];
  for await (const part of await client.chat({ ...asked, stream: true })) streamed.push(...(part.message.tool_calls ?? []));
  assert.deepEqual(streamed.map((one) => one.function), [call.function]);
});

test("a format is followed", async () => {
  const format = {
    type: "object",
    properties: { age: { type: "integer", minimum: 0, maximum: 99 } },
    required: ["age"],
    additionalProperties: false,
  };
  const answer = await client.chat({ ...question, format, options: { temperature: 0, num_predict: 80 } });
  assert.ok(Number.isInteger(JSON.parse(answer.message.content).age));
});

test("models are listed, shown and running", async () => {
  assert.deepEqual((await client.list()).models.map((model) => model.name), ["demo:latest"]);
  assert.deepEqual((await client.ps()).models.map((model) => model.name), ["demo:latest"]);
  const shown = await client.show({ model: "demo" });
  assert.ok(shown.capabilities.includes("completion"));
  assert.match((await client.version()).version, /^\d+\.\d+\.\d+$/);
});

test("embeddings have length 1", async () => {
  const answer = await client.embed({ model: "demo", input: ["Tokyo", "a fox"] });
  assert.equal(answer.embeddings.length, 2);
  for (const vector of answer.embeddings) {
    assert.ok(Math.abs(Math.hypot(...vector) - 1) < 1e-4);
  }
});

test("errors have a status and a sentence", async () => {
  await assert.rejects(client.chat({ ...question, model: "none" }), (error) => {
    assert.equal(error.status_code, 404);
    assert.match(error.message, /not found/);
    return true;
  });
  await assert.rejects(client.chat({ ...question, format: "yaml" }), (error) => error.status_code === 400);
});

test("a stream may be aborted", async () => {
  const format = { type: "array", items: { type: "integer" }, minItems: 150 }; // a long answer
  const stream = await client.chat({ ...question, stream: true, format, options: { temperature: 0, num_predict: 400 } });
  let last = null;
  try {
    for await (const part of stream) {
      last = part;
      stream.abort();
    }
    assert.ok(last.done); // all of it was here before that
  } catch (error) {
    assert.equal(error.name, "AbortError");
  }
  assert.equal(last.model, "demo");
});
