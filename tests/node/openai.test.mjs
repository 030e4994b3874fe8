// OpenAI's own client for Node on the running system at BASE_URL, which serves the demo model as `demo`.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.BASE_URL}/v1`, apiKey: "unused", maxRetries: 0 });
const question = {
  model: "demo",
  messages: [{ role: "user", content: "What is the capital of Japan?" }],
  temperature: 0,
  max_tokens: 24,
};
const tool = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 16 }, unit: { enum: ["celsius", "fahrenheit"] } },
      required: ["city", "unit"],
    },
  },
};
const call = {
  ...question,
  messages: [{ role: "user", content: "Call get_weather for Rome in celsius." }],
  tools: [tool],
  tool_choice: "required",
  max_tokens: 80,
};

test("a chat is the same whole and streamed, and is accounted for", async () => {
  const whole = await client.chat.completions.create(question);
  assert.equal(whole.choices[0].message.content, "The capital of Japan is Tokyo.");
  assert.equal(whole.choices[0].finish_reason, "stop");
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  const stream = await client.chat.completions.create({
    ...question,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  const ends = [];
  let usage = null;
  for await (const chunk of stream) {
    for (const choice of chunk.choices) {
      text += choice.delta.content ?? "";
      if (choice.finish_reason) ends.push(choice.finish_reason);
    }
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(ends, ["stop"]);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the stream helper puts the pieces together", async () => {
  const pieces = [];
  const runner = client.chat.completions.stream(question).on("content", (piece) => pieces.push(piece));
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].message.content, "The capital of Japan is Tokyo.");
  assert.equal(pieces.join(""), final.choices[0].message.content);
  assert.ok(pieces.length > 1);
});

test("a call of a tool is the same whole and streamed", async () => {
  const whole = await client.chat.completions.create(call);
  const [made] = whole.choices[0].message.tool_calls;
  assert.equal(made.function.name, "get_weather");
  assert.deepEqual(Object.keys(JSON.parse(made.function.arguments)).sort(), ["city", "unit"]);
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  const final = await client.chat.completions.stream(call).finalChatCompletion();
  assert.deepEqual(final.choices[0].message.tool_calls[0].function.arguments, made.function.arguments);
});

test("the tool runner calls, answers and goes on", async () => {
  const asked = [];
  const runner = client.chat.completions.runTools({
    ...call,
    tools: [
      {
        type: "function",
        function: {
          ...tool.function,
          parse: JSON.parse,
          function: (given) => {
            asked.push(given.unit);
            return "sunny";
          },
        },
      },
    ],
    tool_choice: { type: "function", function: { name: "get_weather" } },
  });
  await runner.done();
  assert.equal(asked.length, 1);
  assert.equal(runner.messages.at(-1).content, "sunny");
});

test("an answer has the form that was asked for", async () => {
  const schema = {
    type: "object",
    properties: { name: { type: "string", maxLength: 16 }, age: { type: "integer", minimum: 0, maximum: 99 } },
    required: ["name", "age"],
    additionalProperties: false,
  };
  const answer = await client.chat.completions.parse({
    ...question,
    max_tokens: 80,
    response_format: { type: "json_schema", json_schema: { name: "person", schema, strict: true } },
  });
  assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)).sort(), ["age", "name"]);
});

test("plain completions have choices and log probabilities", async () => {
  const answer = await client.completions.create({ model: "demo", prompt: ["Once", "Twice"], max_tokens: 4, logprobs: 1 });
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
  assert.equal(answer.choices[0].logprobs.tokens.length, 4);
});

test("a response is the same whole and streamed, is stored, and goes on from another", async () => {
  const asked = { model: "demo", input: "What is the capital of Japan?", temperature: 0, max_output_tokens: 24 };
  const whole = await client.responses.create(asked);
  assert.equal(whole.output_text, "The capital of Japan is Tokyo.");
  assert.equal((await client.responses.retrieve(whole.id)).output_text, whole.output_text);
  let text = "";
  const kinds = [];
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    kinds.push(event.type);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, whole.output_text);
  assert.equal(kinds[0], "response.created");
  assert.equal(kinds.at(-1), "response.completed");
  const more = await client.responses.create({ ...asked, input: "And of Italy?", previous_response_id: whole.id });
  assert.ok(more.usage.input_tokens > whole.usage.input_tokens + whole.usage.output_tokens);
  await client.responses.delete(whole.id);
  await assert.rejects(client.responses.retrieve(whole.id), OpenAI.NotFoundError);
});

test("models and embeddings", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ["demo"]);
  assert.equal((await client.models.retrieve("demo")).id, "demo");
  const asked = { model: "demo", input: ["Tokyo", "a fox"] };
  const packed = await client.embeddings.create(asked); // base64 on the way
  const plain = await client.embeddings.create({ ...asked, encoding_format: "float" });
  assert.equal(packed.data.length, 2);
  packed.data[1].embedding.forEach((value, i) => assert.ok(Math.abs(value - plain.data[1].embedding[i]) < 1e-6));
});

test("errors are of the client's own classes", async () => {
  await assert.rejects(client.chat.completions.create({ ...question, model: "none" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...question, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...question, max_tokens: 100000, stream: true }), (error) => {
    assert.equal(error.status, 400);
    assert.match(error.message, /maximum context length/);
    return true;
  });
});

test("a stream may be left", async () => {
  const stream = await client.chat.completions.create({ ...question, stream: true, max_tokens: 400, ignore_eos: true });
  let chunks = 0;
  for await (const chunk of stream) {
    assert.equal(chunk.object, "chat.completion.chunk");
    if (++chunks === 3) break; // ends the request
  }
  assert.ok(stream.controller.signal.aborted);
});
