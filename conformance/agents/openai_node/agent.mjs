// openai-node: Chat Completions, whole and with the stream helper.
import OpenAI from "openai";

const client = new OpenAI();
const tool = {
  type: "function",
  function: {
    name: "next_station",
    description: "Name the station that comes after this one.",
    parameters: { type: "object", properties: { station: { type: "string" } }, required: ["station"] },
  },
};

function nextStation(station) {
  const [line, number] = station.split("-");
  return `${line}-${Number(number) + 1}`;
}

async function run(line, how) {
  const called = [];
  let pieces = 0;
  const messages = [
    { role: "system", content: "You ride trains." },
    { role: "user", content: `Ride from ${line}-0 to the terminus.` },
  ];
  for (;;) {
    const wanted = { model: "policy", messages, tools: [tool] };
    let message;
    if (how === "stream") {
      const stream = client.chat.completions.stream(wanted).on("content", () => (pieces += 1));
      message = await stream.finalMessage();
    } else {
      message = (await client.chat.completions.create(wanted)).choices[0].message;
    }
    if (!message.tool_calls?.length) return { line, called, answer: message.content, pieces };
    messages.push(message);
    for (const call of message.tool_calls) {
      const { station } = JSON.parse(call.function.arguments);
      called.push(station);
      messages.push({ role: "tool", tool_call_id: call.id, content: nextStation(station) });
    }
  }
}

const tasks = process.argv.slice(2).map((task) => task.split(":"));
for (const result of await Promise.all(tasks.map((task) => run(...task)))) {
  console.log(JSON.stringify(result));
}
