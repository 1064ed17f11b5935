// What openai's client does in a page of another origin: run by tests/test_clients.py in Chromium.
// The page's server has node_modules; ES modules are loaded from it as they are, without a bundler.
async ([url, apiKey]) => {
  const { OpenAI, AuthenticationError, BadRequestError } = await import("/node_modules/openai/index.mjs");
  const settings = { baseURL: url, apiKey, maxRetries: 0, dangerouslyAllowBrowser: true };
  const client = new OpenAI(settings);
  const messages = [{ role: "user", content: "hi" }];
  const common = { model: "tiny", messages, max_tokens: 8, seed: 1 };
  const results = { origin: location.origin };

  const reply = await client.chat.completions.create(common);
  results.tokens = reply.usage.completion_tokens;

  results.chunks = 0;
  for await (const chunk of await client.chat.completions.create({ ...common, stream: true })) {
    results.chunks += chunk.choices.length;
  }

  const parameters = {
    type: "object",
    properties: { city: { enum: ["Ulm", "Rome"] } },
    required: ["city"],
  };
  const tools = [{ type: "function", function: { name: "go", parameters } }];
  const asked = { ...common, max_tokens: 200, tools, tool_choice: "required" };
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  results.calls = final.choices[0].message.tool_calls.map((call) => JSON.parse(call.function.arguments));

  const flat = [{ type: "function", name: "go", parameters, strict: false }];
  const body = { model: "tiny", input: "hi", max_output_tokens: 200, tools: flat, tool_choice: "required" };
  const response = await client.responses.stream(body).finalResponse();
  results.items = response.output.map((item) => [item.type, JSON.parse(item.arguments)]);

  results.models = (await client.models.list()).data.map((model) => model.id);

  const kindOf = async (call) => {
    try {
      await call();
      return "no error";
    } catch (error) {
      if (error instanceof AuthenticationError) return `401 ${error.code}`;
      return error instanceof BadRequestError ? `400 ${error.code}` : error.constructor.name;
    }
  };
  const long = [{ role: "user", content: "x".repeat(600) }];
  results.long = await kindOf(() => client.chat.completions.create({ ...common, messages: long }));
  const stranger = new OpenAI({ ...settings, apiKey: "another-key-of-sixteen" });
  results.stranger = await kindOf(() => stranger.models.list());
  return results;
};
