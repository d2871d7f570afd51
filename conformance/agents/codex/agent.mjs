// Codex: one `codex exec` for each task, all at once. Its tool is a shell.
import { spawn } from "node:child_process";

async function run(line) {
  const child = spawn(
    "codex",
    [
      "exec",
      "--json",
      "--skip-git-repo-check",
      "--model",
      "policy",
      "--config",
      `openai_base_url="${process.env.OPENAI_BASE_URL}"`,
      "--config",
      "analytics.enabled=false",
      "--sandbox",
      "danger-full-access",
      `Ride from ${line}-0 to the terminus.`,
    ],
    { stdio: ["ignore", "pipe", "inherit"] },
  );
  let output = "";
  for await (const piece of child.stdout) output += piece;
  const items = output
    .split("\n")
    .filter((event) => event.includes('"item.completed"'))
    .map((event) => JSON.parse(event).item);
  const commands = items.filter((item) => item.type === "command_execution");
  const called = commands.map((item) => before(item.aggregated_output.trim()));
  return { line, called, answer: items.findLast((item) => item.type === "agent_message").text };
}

function before(station) {
  const [line, number] = station.split("-");
  return `${line}-${Number(number) - 1}`;
}

for (const result of await Promise.all(process.argv.slice(2).map(run))) {
  console.log(JSON.stringify(result));
}
