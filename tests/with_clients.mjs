// What openai's client for Node does with a server: run by tests/test_clients.py.
//
//     node tests/with_clients.mjs FOLDER URL
//
// FOLDER has node_modules. The server's model has random weights: replies are judged by their shape.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, url] = process.argv.slice(2);
const { OpenAI, BadRequestError } = createRequire(`${folder}/`)("openai");

const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [
  { role: "system", content: "Be brief." },
  { role: "user", content: "hi" },
  { role: "user", content: "are you there?" },
];
const parameters = {
  type: "object",
  properties: { city: { enum: ["Ulm", "Rome"] }, isWarm: { type: "boolean" } },
  required: ["city", "isWarm"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const common = { model: "tiny", messages, max_tokens: 8, seed: 1 };

const reply = await client.chat.completions.create({ ...common, frequency_penalty: 0.5 });
assert.ok(reply.usage.completion_tokens > 0);

let chunks = 0;
for await (const chunk of await client.chat.completions.create({ ...common, stream: true })) {
  assert.equal(chunk.object, "chat.completion.chunk");
  chunks += 1;
}
assert.ok(chunks > 1);

common.max_tokens = 120;
const format = { type: "json_schema", json_schema: { name: "a", schema: parameters, strict: true } };
const json = await client.chat.completions.parse({ ...common, response_format: format });
assert.equal(typeof JSON.parse(json.choices[0].message.content).isWarm, "boolean");

for (const tool_choice of ["required", { type: "function", function: { name: "get_weather" } }]) {
  const stream = client.chat.completions.stream({ ...common, tools, tool_choice });
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].finish_reason, "tool_calls");
  const calls = final.choices[0].message.tool_calls;
  for (const call of calls) {
    assert.equal(call.function.name, "get_weather");
    assert.ok(["Ulm", "Rome"].includes(JSON.parse(call.function.arguments).city));
  }
  assert.ok(tool_choice === "required" || calls.length === 1);
}

const text = await client.completions.create({ model: "tiny", prompt: "hi", max_tokens: 3 });
assert.equal(text.choices.length, 1);
assert.equal((await client.models.retrieve("tiny")).id, "tiny");
for await (const model of client.models.list()) assert.equal(model.id, "tiny");

const response = await client.responses.create({ model: "tiny", input: "hi", max_output_tokens: 8 });
assert.equal(typeof response.output_text, "string");
const events = client.responses.stream({ model: "tiny", input: messages, max_output_tokens: 8 });
const whole = await events.finalResponse();
assert.ok(["completed", "incomplete"].includes(whole.status));

const flat = tools.map((tool) => ({ type: "function", strict: false, ...tool.function }));
const asked = { model: "tiny", input: "hi", tools: flat, tool_choice: "required" };
for (const called of [
  await client.responses.create(asked),
  await client.responses.stream(asked).finalResponse(),
]) {
  for (const item of called.output) {
    assert.equal(item.type, "function_call");
    assert.ok(["Ulm", "Rome"].includes(JSON.parse(item.arguments).city));
  }
  assert.ok(called.output.length > 0);
}

const long = [{ role: "user", content: "x".repeat(600) }];
await assert.rejects(
  client.chat.completions.create({ ...common, messages: long }),
  (error) => error instanceof BadRequestError && error.code === "context_length_exceeded",
);
console.log(JSON.stringify({ client: "openai-node", passed: true }));
