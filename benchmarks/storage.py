"""How much room a long conversation takes: a coding agent's 50 calls with a context of 60,000 tokens.

The conversation is made on the spot from what this machine has: files of Python's standard library as the
agent reads them, tracebacks of code that really fails, edits of those files; its tokens are those of a BPE
tokenizer of 32,000 tokens, trained on the same library. Prints the sizes in Markdown, and how long it
takes to read everything back. Everything that was written must come back equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import sysconfig
import tempfile
import textwrap
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_proxy.store import Fidelity, Generation, Span, Store

TURNS = 50
CONTEXT_TOKENS = 60_000
VOCABULARY = 32_000
_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
_TURN_MARKS = ["<|im_start|>", "<|im_end|>"]

_SYSTEM = """
You are a coding agent. You work in a checkout of a Python project on the user's machine and you are done
when the task is solved and all tests pass. Work in small steps. Before you change a file, read the part
that you are about to change; never guess what is in it. After every change run the tests that cover it,
and read the whole traceback when one fails before you try the next thing. Keep the style of the code
around you: its names, its quotes, its way with errors. Do not add dependencies. Do not touch files that
the task does not need. Explain in one or two sentences what you are about to do, then call exactly one
tool. When you are done, say what you changed and why, in plain words. The project uses Python's own
unittest. Paths are relative to the root of the checkout. Output of commands longer than 30,000
characters is cut in the middle. Commands that run for more than two minutes are stopped.
"""


def _tool(name: str, description: str, **arguments: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in arguments.items()}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(arguments),
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


_TOOLS = [
    _tool(
        "read_file",
        "Read a part of a file, with line numbers. Use it before every edit.",
        path="File to read, relative to the root of the checkout",
        first_line="Number of the first line, counted from 1",
        last_line="Number of the last line, at most 400 lines after the first",
    ),
    _tool(
        "edit_file",
        "Replace a piece of a file. The old text must be in the file exactly once, indentation included.",
        path="File to change, relative to the root of the checkout",
        old_text="The text that is there now, letter by letter",
        new_text="The text that takes its place",
    ),
    _tool(
        "run_tests",
        "Run tests with unittest and return what they print.",
        target="Module, class or test to run, dotted; empty for all",
    ),
    _tool(
        "search",
        "Find a regular expression in the files of the checkout; returns file, line number and line.",
        pattern="Regular expression in Python's syntax",
        path="File or directory to search in",
    ),
    _tool(
        "shell",
        "Run a command in the root of the checkout, without network, and return its output and exit code.",
        command="Command line for bash",
    ),
]


@dataclass(slots=True)
class Conversation:
    """The messages so far, and the tokens that the engine has seen of them."""

    messages: list[dict[str, Any]]
    ids: array[int]


class Library:
    """Python's standard library as the project that the agent works on."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.paths = sorted(_LIBRARY.glob("*.py")) + sorted(_LIBRARY.glob("[a-z]*/*.py"))
        self.paths = [path for path in self.paths if not {"site-packages", "test"} & set(path.parts)]

    def train_tokenizer(self) -> Tokenizer:
        """Byte-level BPE, as most engines have it."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=_TURN_MARKS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_text, self.paths), trainer)
        return tokenizer

    def lines(self, count: int) -> tuple[Path, int, list[str]]:
        """So many lines of some file, with the number of the first."""
        while True:
            path = self.random.choice(self.paths)
            lines = _text(path).splitlines()
            if len(lines) > count:
                first = self.random.randrange(len(lines) - count)
                return path.relative_to(_LIBRARY), first + 1, lines[first : first + count]

    def traceback(self) -> str:
        """Of something in the library that really fails."""
        calls: list[Callable[[], object]] = [
            lambda: json.loads('{"a": [1, 2,, 3]}'),
            lambda: textwrap.dedent("a" * 3)[7],
            lambda: Path("/nowhere/at/all").read_text(),
            lambda: array("i", [2**40]),
            lambda: tempfile.mkdtemp(dir="/nowhere"),
            lambda: random.Random(0).sample([1, 2], 3),
        ]
        try:
            self.random.choice(calls)()
        except Exception:  # noqa: BLE001  # whatever it is, its traceback is wanted
            return traceback.format_exc()
        raise AssertionError("none of these calls can succeed")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def spans(tokenizer: Tokenizer, library: Library, rollout_id: str) -> Iterator[Span]:
    """The agent's calls: each request holds everything before it."""
    random_ = library.random
    talk = Conversation([], array("i"))
    _say(talk, tokenizer, {"role": "system", "content": _SYSTEM.strip() + "\n\n" + _guidelines()})
    talk.ids.extend(tokenizer.encode(json.dumps(_TOOLS)).ids)
    _say(talk, tokenizer, {"role": "user", "content": "The tests fail since the last change. Find out why."})
    for turn in range(TURNS):
        reply, arguments, result = _step(library)
        call_id = f"call_{random_.randbytes(12).hex()}"
        call = {"id": call_id, "type": "function", "function": arguments}
        answer = {"role": "assistant", "content": reply, "tool_calls": [call]}
        said = reply + "\n<tool_call>\n" + json.dumps(arguments) + "\n</tool_call>"
        written = array("i", [*tokenizer.encode(said).ids, tokenizer.token_to_id("<|im_end|>")])
        prompt = talk.ids + array("i", tokenizer.encode("<|im_start|>assistant\n").ids)
        yield _span(
            rollout_id,
            turn,
            talk.messages,
            answer,
            Generation(prompt, written, _logprobs(random_, len(written)), "tool_calls"),
        )
        talk.messages.append(answer)
        talk.ids = prompt + written
        room = (CONTEXT_TOKENS - len(talk.ids)) // max(1, TURNS - 1 - turn) - 300
        shortened = tokenizer.decode(tokenizer.encode(result).ids[: max(room, 40)])
        _say(talk, tokenizer, {"role": "tool", "tool_call_id": call_id, "content": shortened})


def _guidelines() -> str:
    """What a project's own AGENTS.md adds to the system prompt: here the beginning of a module."""
    return "Guidelines of this project:\n\n" + _text(_LIBRARY / "argparse.py")[:9000]


def _say(talk: Conversation, tokenizer: Tokenizer, message: dict[str, Any]) -> None:
    talk.messages.append(message)
    text = f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    talk.ids.extend(tokenizer.encode(text).ids)


def _step(library: Library) -> tuple[str, dict[str, str], str]:
    """What the agent says, the tool that it calls, and what the tool returns."""
    random_ = library.random
    path, first, lines = library.lines(120)
    why = " ".join(line.strip() for line in lines[:60] if " " in line.strip())[: random_.randrange(150, 500)]
    reply = f"The failure comes from `{path}`. {why} I look at that next."
    kind = random_.random()
    if kind < 0.5:
        arguments = {"path": str(path), "first_line": str(first), "last_line": str(first + len(lines) - 1)}
        result = "\n".join(f"{number:6}\t{line}" for number, line in enumerate(lines, first))
        return reply, _call("read_file", arguments), result
    if kind < 0.75:
        old = "\n".join(lines[: random_.randrange(4, 14)])
        new = old.replace("self", "self_").replace("return", "result =")
        shown = "\n".join(f"{number:6}\t{line}" for number, line in enumerate(lines, first))
        edit = _call("edit_file", {"path": str(path), "old_text": old, "new_text": new})
        return reply, edit, f"{path} has been changed. The lines around it are now:\n{shown}"
    target = f"test.test_{path.stem}"
    failed = "\n".join(f"FAIL: {target}\n{'-' * 70}\n{library.traceback()}" for _ in range(3))
    context = "\n".join(lines)
    return reply, _call("run_tests", {"target": target}), f"{failed}\nRan 112 tests in 3.214s\n\n{context}"


def _call(name: str, arguments: dict[str, str]) -> dict[str, str]:
    return {"name": name, "arguments": json.dumps(arguments)}


def _logprobs(random_: random.Random, count: int) -> array[float]:
    """Most tokens of a coding model are nearly sure, the others are not."""
    return array(
        "f",
        [
            -(10 ** random_.gauss(-3, 1.5)) if random_.random() < 0.7 else -random_.expovariate(1.2)
            for _ in range(count)
        ],
    )


def _span(
    rollout_id: str, turn: int, messages: list[Any], answer: dict[str, Any], generation: Generation
) -> Span:
    request = {
        "model": "policy",
        "messages": messages,
        "tools": _TOOLS,
        "temperature": 1.0,
        "max_tokens": 4096,
    }
    read, written = len(generation.prompt_token_ids), len(generation.response_token_ids)
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    response = {
        "id": f"chatcmpl-{rollout_id}-{turn:032x}",
        "object": "chat.completion",
        "created": 1_790_000_000 + 17 * turn,
        "model": "policy",
        "choices": [{"index": 0, "message": answer, "logprobs": None, "finish_reason": "tool_calls"}],
        "usage": usage,
    }
    return Span(
        rollout_id=rollout_id,
        attempt=1,
        wire="chat",
        started_at=1_790_000_000.0 + 17 * turn,
        first_byte_at=1_790_000_001.5 + 17 * turn,
        ended_at=1_790_000_012.25 + 17 * turn,
        request=json.dumps(request, ensure_ascii=False).encode(),
        response=json.dumps(response, ensure_ascii=False).encode(),
        fidelity=Fidelity.EXACT,
        model="policy",
        policy="policy",
        policy_version=0,
        policy_version_end=0,
        attributed_by="header",
        attribution_confidence=1.0,
        status=200,
        response_id=str(response["id"]),
        usage=usage,
        sampling={"temperature": 1.0, "max_tokens": 4096},
        generations=(generation,),
        conversation=os.urandom(16),
    )


def engine_bytes(span: Span, tokenizer: Tokenizer) -> int:
    """Bytes of the bodies as they pass between proxy and engine: with token ids and logprobs."""
    generation = span.generations[0]
    request = json.loads(span.request) | {"logprobs": True, "return_token_ids": True}
    response = json.loads(span.response or b"{}")
    texts = [tokenizer.id_to_token(token) for token in generation.response_token_ids]
    content = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in zip(texts, generation.logprobs, strict=True)
    ]
    response["prompt_token_ids"] = generation.prompt_token_ids.tolist()
    response["choices"][0] |= {
        "token_ids": generation.response_token_ids.tolist(),
        "logprobs": {"content": content},
    }
    return len(json.dumps(request)) + len(json.dumps(response))


def measure(tokenizer: Tokenizer, library: Library, db: Path, rollouts: int) -> dict[str, float]:
    """Write the rollouts, read one back, and say how large everything is."""
    own = engine = 0
    written: list[Span] = []
    with Store.open(db) as store:
        for _ in range(rollouts):
            written = list(spans(tokenizer, library, f"ro-{library.random.randbytes(8).hex()}"))
            started = time.thread_time()
            ids = [store.add_span(span) for span in written]
            write_s = time.thread_time() - started
            own += sum(len(span.request) + len(span.response or b"") for span in written)
            engine += sum(engine_bytes(span, tokenizer) for span in written)
        store.scalar("PRAGMA wal_checkpoint(TRUNCATE)")
    with Store.open(db) as store:
        started = time.perf_counter()
        read = store.spans_of_attempt(written[0].rollout_id, 1)
        read_s = time.perf_counter() - started
        started = time.perf_counter()
        store.get_span(ids[-1])
        last_s = time.perf_counter() - started
    if read != tuple(replace(span, span_id=i) for i, span in zip(ids, written, strict=True)):
        sys.exit("what was read is not what was written")
    size = db.stat().st_size
    return {
        "rollouts": rollouts,
        "context_tokens": len(written[-1].generations[0].prompt_token_ids),
        "own_bytes": own,
        "engine_bytes": engine,
        "file_bytes": size,
        "ratio": own / size,
        "engine_ratio": engine / size,
        "write_ms_per_span": write_s * 1000 / TURNS,
        "read_rollout_ms": read_s * 1000,
        "read_last_span_ms": last_s * 1000,
    }


def main() -> None:
    """One rollout in a file of its own, and then several in one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rollouts", type=int, default=10, help="in the second file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every figure to this file too")
    args = parser.parse_args()
    library = Library(args.seed)
    tokenizer = library.train_tokenizer()
    with tempfile.TemporaryDirectory(prefix="lightning-storage-") as folder:
        figures = [
            measure(tokenizer, library, Path(folder) / f"{rollouts}.db", rollouts)
            for rollouts in (1, args.rollouts)
        ]
    print(f"Rollouts of {TURNS} calls; the last prompt has {figures[0]['context_tokens']} tokens.\n")
    print(
        "| rollouts | agent's bodies | file | ratio | bodies with ids and logprobs | ratio "
        "| read a rollout | read its last call | write, CPU per call |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for f in figures:
        print(
            f"| {f['rollouts']} | {f['own_bytes'] / 1e6:.2f} MB | {f['file_bytes'] / 1e6:.3f} MB "
            f"| {f['ratio']:.1f} | {f['engine_bytes'] / 1e6:.2f} MB | {f['engine_ratio']:.1f} "
            f"| {f['read_rollout_ms']:.0f} ms | {f['read_last_span_ms']:.0f} ms "
            f"| {f['write_ms_per_span']:.2f} ms |"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    if min(f["ratio"] for f in figures) < 20:
        sys.exit("the file is not 20 times smaller than the agent's requests and responses")


if __name__ == "__main__":
    main()
