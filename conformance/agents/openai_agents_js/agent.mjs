// OpenAI Agents SDK for JavaScript. The first argument is the API: chat_completions or responses.
import { Agent, run as runAgent, setOpenAIAPI, setTracingDisabled, tool } from "@openai/agents";
import { z } from "zod";

const [api, ...tasks] = process.argv.slice(2);
setOpenAIAPI(api);
setTracingDisabled(true);

async function run(line, how) {
  const called = [];
  const nextStation = tool({
    name: "next_station",
    description: "Name the station that comes after this one.",
    parameters: z.object({ station: z.string() }),
    execute: async ({ station }) => {
      called.push(station);
      const [name, number] = station.split("-");
      return `${name}-${Number(number) + 1}`;
    },
  });
  const agent = new Agent({ name: "rider", instructions: "You ride trains.", model: "policy", tools: [nextStation] });
  const task = `Ride from ${line}-0 to the terminus.`;
  if (how !== "stream") return { line, called, answer: (await runAgent(agent, task)).finalOutput };
  const result = await runAgent(agent, task, { stream: true });
  let pieces = 0;
  for await (const _ of result.toTextStream()) pieces += 1;
  await result.completed;
  return { line, called, answer: result.finalOutput, pieces };
}

for (const result of await Promise.all(tasks.map((task) => run(...task.split(":"))))) {
  console.log(JSON.stringify(result));
}
