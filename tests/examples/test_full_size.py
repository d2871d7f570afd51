"""The configurations for full-size models, checked as far as that goes without the hardware."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import memory
from lightning_proxy.cli import app
from lightning_proxy.config import Settings, load_settings
from lightning_proxy.proxy.engine_process import build_command
from lightning_proxy.runner import read_tasks
from lightning_proxy.store import Store
from tests.trainer.recording import generation, span

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "full_size").glob("*.toml"))
SETTINGS = [
    f"{name}-{setting}"
    for name in ("calculator", "search", "sql")
    for setting in ("one-gpu-lora", "ray-full")
]
CONTEXT = {"qwen2": 32768, "qwen3": 40960, "llama": 131072}  # max_position_embeddings of the models used

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(file: Path) -> Settings:
    return load_settings(config=file)


def flag(settings: Settings, name: str) -> str | None:
    """The value of one of vLLM's flags."""
    args = settings.engine.args
    return args[args.index(name) + 1] if name in args else None


def model_of(file: Path) -> str:
    """The repository whose weights the file is for."""
    [found] = re.findall(r"hf download (\S+)", file.read_text(encoding="utf-8"))
    return str(found)


def write_config(file: Path, directory: Path) -> Path:
    """A model directory with the file's model's config.json, and nothing else."""
    shape = memory.SHAPES[model_of(file)]
    name = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[
        shape.model_type
    ]
    fields = asdict(shape) | {"architectures": [name], "torch_dtype": "bfloat16"}
    fields["max_position_embeddings"] = CONTEXT[shape.model_type]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def test_there_is_one_for_each_experiment_and_setting() -> None:
    assert [file.stem for file in FILES] == SETTINGS


@each_file
def test_it_loads_and_its_parts_agree(file: Path) -> None:
    settings = load(file)
    train, length = settings.train, flag(settings, "--max-model-len")
    assert str(train.max_row_tokens) == str(train.micro_batch_tokens) == length
    assert settings.policy.model is not None
    assert settings.policy.model.name == model_of(file).split("/")[1]
    assert set(train.roles) <= {role.name for role in settings.roles}
    assert bool(train.lora_rank) == (file.stem.endswith("lora")) == (train.workers == 1)


@each_file
def test_agents_that_call_several_times_in_a_conversation_have_a_model_that_keeps_past_turns(
    file: Path,
) -> None:
    """Qwen3's template leaves the empty thoughts of a past turn out; with them its calls make no one row."""
    if not file.stem.startswith("sql"):
        assert model_of(file) not in {"Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "Qwen/Qwen3-32B"}
        assert flag(load(file), "--default-chat-template-kwargs") is None


@each_file
def test_its_header_names_itself_and_commands_that_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert set(re.findall(r"--config (\S+)", text)) == {str(file.relative_to(ROOT))}
    assert "lightning-proxy serve" in text
    assert ("RAY_ADDRESS=auto lightning-proxy train" in text) == file.stem.endswith("full")


@each_file
def test_the_memory_in_its_header_is_what_its_settings_come_to_and_fits_the_card(file: Path) -> None:
    text = re.sub(r" \\\n# +", " ", file.read_text(encoding="utf-8"))
    [words] = re.findall(r"python -m benchmarks\.memory (.*)", text)
    settings = load(file)
    train, apart = settings.train, settings.train.workers > 1
    expected = [model_of(file), *(["--lora-rank", str(train.lora_rank)] if train.lora_rank else [])]
    expected += ["--micro-batch-tokens", str(train.micro_batch_tokens)]
    expected += ["--utilization", str(flag(settings, "--gpu-memory-utilization"))]
    if apart:
        gpus = flag(settings, "--tensor-parallel-size") or "1"
        expected += ["--workers", str(train.workers), "--engine-gpus", gpus, "--apart"]
    assert shlex.split(words) == expected
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        memory.main(shlex.split(words))
    assert "".join(f"#   {line}\n" for line in output.getvalue().splitlines()) in text
    [at_once] = re.findall(r"at once +([0-9.]+)", output.getvalue())
    assert float(at_once) + memory.SPARE_GIB <= memory.CARD_GIB
    [cached] = re.findall(r"\(([0-9,]+) tokens\)", output.getvalue())
    assert int(cached.replace(",", "")) >= 8 * train.max_row_tokens
    disk = memory.disk_gib(memory.SHAPES[model_of(file)], lora_rank=train.lora_rank)
    at_once = memory.versions_at_once(train.keep_versions) * disk
    assert f"{disk:.0f} GiB a version, {at_once:.0f} at once" in text


def test_the_task_and_the_grader_that_the_documentation_shows_work(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "full-size.md").read_text(encoding="utf-8")
    [line], [grader] = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("json", "python"))
    (tmp_path / "tasks.jsonl").write_text(line)
    [task] = read_tasks(tmp_path / "tasks.jsonl", {"group_size": 8})
    (tmp_path / "graded.py").write_text(grader)
    agent = "import json, os, sys; print(json.dumps({'answer': sys.argv[1] + os.getenv('TASK_ANSWER', '')}))"
    posted: list[dict[str, Any]] = []

    class Rewards(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = b'{"reward_id": 1, "rollout_id": "r1", "span_id": null, "created": true}'
            self.send_response(201)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Rewards) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = os.environ | {
            "LIGHTNING_REWARD_URL": f"http://127.0.0.1:{server.server_port}/reward",
            "LIGHTNING_ROLLOUT_ID": "r1",
            "TASK_ANSWER": task["input"]["answer"],
            "PYTHONPATH": str(ROOT),
        }
        for words in (["-c", agent, "6"], ["-c", agent, "7"], ["-c", "raise SystemExit(3)"]):
            command = [sys.executable, "graded.py", sys.executable, *words]
            ran = subprocess.run(command, cwd=tmp_path, env=env, timeout=120)
            assert ran.returncode == (3 if len(words) == 2 else 0)
        server.shutdown()
    assert [(each["rollout_id"], each["value"]) for each in posted] == [("r1", 1.0), ("r1", 0.0)]


@each_file
def test_the_documentation_has_the_same_memory(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    found = {
        word: re.findall(rf"#     {word} +([0-9.]+)", text)[0]
        for word in ("vLLM", "update", "loading", "at once", "host")
    }
    disk, on_disk = re.findall(r"#     disk +([0-9]+)  a version, ([0-9]+) at once", text)[0]
    weights, overhead, cache, tokens = re.findall(
        r"weights ([0-9.]+), overhead ([0-9.]+), KV cache ([0-9.]+) \(([0-9,]+) tokens\)", text
    )[0]
    row = (
        f"| `{file.stem}` | {found['vLLM']} = {weights} + {overhead} + {cache} ({tokens} tokens) "
        f"| {found['update']} | {found['loading']} | {found['at once']} | {found['host']} "
        f"| {disk}, {on_disk} |"
    )
    assert row in (ROOT / "docs" / "full-size.md").read_text(encoding="utf-8")


@each_file
def test_a_dry_run_with_it_shows_what_it_would_train_on(file: Path, tmp_path: Path) -> None:
    settings, database = load(file), tmp_path / "recorded.db"
    roles: list[str | None] = [*(role.name for role in settings.roles)] or [None]
    with Store.open(database) as store:
        for number in range(settings.train.min_rollouts):
            store.create_rollout(rollout_id=f"r{number}", task_id=f"task {number // 8}")
            for role in roles:
                store.add_span(span(f"r{number}", generation([1, 2, number], [4, 5]), role=role))
            store.add_reward(value=float(number % 2), rollout_id=f"r{number}")
    words = ["train", "--dry-run", "--json", "--config", str(file), "--db", str(database)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["outcome"], report["counts"]["rollouts"]) == ("dry_run", settings.train.min_rollouts)
    trained = len(settings.train.roles) or 1
    assert report["counts"]["rows"] == settings.train.min_rollouts * trained
    assert report["left_out"].get("calls", {}).get("other_role", 0) == settings.train.min_rollouts * (
        len(roles) - trained
    )


# Billions of parameters, and of those outside the embeddings, as the models' cards have them.
@pytest.mark.parametrize(
    ("model", "parameters", "inner"),
    [
        ("Qwen/Qwen3-4B-Instruct-2507", 4.0, 3.6),
        ("Qwen/Qwen3-8B", 8.2, 6.95),
        ("Qwen/Qwen3-14B", 14.8, 13.2),
        ("Qwen/Qwen3-32B", 32.8, 31.2),
        ("Qwen/Qwen2.5-32B-Instruct", 32.8, None),
        ("meta-llama/Llama-3.2-3B-Instruct", 3.21, None),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03, None),
    ],
)
def test_the_shapes_come_to_the_sizes_that_the_cards_name(
    model: str, parameters: float, inner: float | None
) -> None:
    shape = memory.SHAPES[model]
    assert shape.parameters / 1e9 == pytest.approx(parameters, abs=0.06)
    if inner is not None:
        layers = shape.num_hidden_layers * shape.layer_parameters
        assert layers / 1e9 == pytest.approx(inner, abs=0.06)


# Peaks in GiB of `python -m benchmarks.cuda_update size`, one H200; docs/full-size.md.
@pytest.mark.parametrize(
    ("model", "rank", "tokens", "update"),
    [
        ("Qwen/Qwen3-8B", 32, 8192, 26.17),
        ("Qwen/Qwen3-8B", 32, 16384, 32.86),
        ("Qwen/Qwen3-4B-Instruct-2507", 32, 16384, 23.36),
        ("meta-llama/Llama-3.2-3B-Instruct", 0, 8192, 59.91),
    ],
)
def test_what_is_counted_lies_just_above_what_was_measured(
    model: str, rank: int, tokens: int, update: float
) -> None:
    shape = memory.SHAPES[model]
    counted = sum(memory.update_gib(shape, lora_rank=rank, tokens=tokens).values())
    assert update <= counted <= 1.1 * update


def test_loading_full_weights_takes_what_was_measured() -> None:
    shape = memory.SHAPES["meta-llama/Llama-3.2-3B-Instruct"]
    assert memory.load_gib(shape, lora_rank=0) == pytest.approx(71.88, abs=0.2)


def test_main_memory_is_counted_once_a_host_unless_head_and_embeddings_are_tied() -> None:
    apart, tied = (
        memory.SHAPES[name] for name in ("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen3-4B-Instruct-2507")
    )
    assert memory.host_gib(apart, workers_here=8) == pytest.approx(32.76e9 * 4 / memory.GIB, rel=1e-3)
    assert memory.host_gib(tied, workers_here=8) == pytest.approx(8 * 4.02e9 * 4 / memory.GIB, rel=1e-2)


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", sorted(memory.SHAPES))
def test_the_count_of_parameters_is_that_of_the_model_that_transformers_makes(model: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = memory.SHAPES[model]
    fields = asdict(shape)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
        assert sum(each.numel() for each in made.parameters()) == shape.parameters
        adapted = get_peft_model(made, LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    assert trained == shape.adapter_parameters(32)


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")
@each_file
def test_verl_takes_what_we_build_of_its_settings(file: Path, tmp_path: Path) -> None:
    from lightning_proxy.trainer.backend import worker
    from lightning_proxy.trainer.backend.verl_backend import worker_config

    train = load(file).train
    model = write_config(file, tmp_path / "model")
    config = replace(worker_config(train.model_copy(update={"device": "cpu"}), model), device="cuda")
    built = worker._training_worker_config(config)
    assert built.model_config.lora_rank == train.lora_rank
    assert built.model_config.enable_gradient_checkpointing
    assert built.engine_config.mixed_precision["param_dtype"] == "bf16"
    assert built.optimizer_config.lr == train.learning_rate
    assert built.model_config.hf_config.num_hidden_layers == memory.SHAPES[model_of(file)].num_hidden_layers
    assert worker._actor_config(config).clip_ratio_high == train.clip_ratio_high


_ASK_VLLM = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
for line in sys.stdin:
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(json.loads(line))
    validate_parsed_serve_args(args)
    assert args.tool_call_parser in ToolParserManager.list_registered()
    engine = AsyncEngineArgs.from_cli_args(args)
    model = engine.create_model_config()
    print("FOUND", json.dumps({
        "max_model_len": model.max_model_len, "dtype": str(model.dtype), "logprobs": model.logprobs_mode,
        "generation_config": model.generation_config, "thinking": args.default_chat_template_kwargs,
        "utilization": engine.gpu_memory_utilization, "gpus": engine.tensor_parallel_size,
        "heads": model.get_total_num_kv_heads() % engine.tensor_parallel_size,
    }))
"""


@pytest.mark.vllm
@pytest.mark.timeout(900)  # vLLM alone is half a minute of imports, more on a busy machine
def test_vllm_takes_the_flags_of_each_for_its_model(tmp_path: Path) -> None:
    lines = []
    for file in FILES:
        settings, model = load(file), write_config(file, tmp_path / file.stem)
        command = build_command(settings.engine, settings.policy.name, model, 8000, cpu=False)
        lines.append(json.dumps(command.argv[3:]))
    asked = subprocess.run(
        [sys.executable, "-c", _ASK_VLLM], input="\n".join(lines), capture_output=True, text=True, timeout=800
    )
    assert asked.returncode == 0, asked.stderr[-3000:]
    answers: list[dict[str, Any]] = [
        json.loads(line.removeprefix("FOUND ")) for line in asked.stdout.splitlines() if line[:5] == "FOUND"
    ]
    for file, found in zip(FILES, answers, strict=True):
        settings = load(file)
        assert found == {
            "max_model_len": int(flag(settings, "--max-model-len") or 0),
            "dtype": "torch.bfloat16",
            "logprobs": "processed_logprobs",
            "generation_config": "vllm",
            "thinking": json.loads(flag(settings, "--default-chat-template-kwargs") or "null"),
            "utilization": float(flag(settings, "--gpu-memory-utilization") or 0),
            "gpus": int(flag(settings, "--tensor-parallel-size") or 1),
            "heads": 0,
        }
