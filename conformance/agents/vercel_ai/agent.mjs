// Vercel AI SDK: generateText and streamText with a tool. The first argument is the API: chat or responses.
import { openai } from "@ai-sdk/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [api, ...tasks] = process.argv.slice(2);
const model = api === "chat" ? openai.chat("policy") : openai("policy");

async function run(line, how) {
  const called = [];
  const wanted = {
    model,
    prompt: `Ride from ${line}-0 to the terminus.`,
    stopWhen: stepCountIs(5),
    // Where `store` is on, what was said comes back as a reference, which needs a server that keeps it.
    providerOptions: { openai: { store: false } },
    tools: {
      next_station: tool({
        description: "Name the station that comes after this one.",
        inputSchema: z.object({ station: z.string() }),
        execute: async ({ station }) => {
          called.push(station);
          const [name, number] = station.split("-");
          return `${name}-${Number(number) + 1}`;
        },
      }),
    },
  };
  if (how !== "stream") return { line, called, answer: (await generateText(wanted)).text };
  const result = streamText(wanted);
  let pieces = 0;
  for await (const _ of result.textStream) pieces += 1;
  return { line, called, answer: await result.text, pieces };
}

for (const result of await Promise.all(tasks.map((task) => run(...task.split(":"))))) {
  console.log(JSON.stringify(result));
}
