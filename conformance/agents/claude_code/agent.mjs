// Claude Code: one `claude --print` for each task, all at once. Its tool is Bash.
import { spawn } from "node:child_process";

async function run(line) {
  const child = spawn(
    "claude",
    [
      "--print",
      `Ride from ${line}-0 to the terminus.`,
      "--verbose",
      "--output-format",
      "stream-json",
      "--model",
      "policy",
      "--allowed-tools",
      "Bash(echo:*)",
    ],
    { stdio: ["ignore", "pipe", "inherit"] },
  );
  let output = "";
  for await (const piece of child.stdout) output += piece;
  const events = output.split("\n").filter(Boolean).map((event) => JSON.parse(event));
  const blocks = events
    .filter((event) => event.type === "user")
    .flatMap((event) => event.message.content)
    .filter((block) => block.type === "tool_result");
  const called = blocks.map((block) => before(text(block.content).trim()));
  return { line, called, answer: events.find((event) => event.type === "result").result };
}

function text(content) {
  return typeof content === "string" ? content : content.map((block) => block.text).join("");
}

function before(station) {
  const [line, number] = station.split("-");
  return `${line}-${Number(number) - 1}`;
}

for (const result of await Promise.all(process.argv.slice(2).map(run))) {
  console.log(JSON.stringify(result));
}
