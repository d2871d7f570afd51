"""Several policies in one file: each has settings as if it were the only one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_proxy.config import Settings, for_policy, load_settings, policy_names
from lightning_proxy.errors import ConfigError

TWO = """
[proxy]
port = 9001
[policy]
name = "writer"
model = "models/writer"
[engine]
args = ["--max-model-len", "2048"]
log = "logs/engine.log"
[train]
roles = ["writer"]
learning_rate = 1e-5
epochs = 2
[[policies]]
name = "team/checker"
model = "models/checker"
roles = ["checker"]
route = true
train = { learning_rate = 2e-4, kl_coef = 0.1 }
engine = { args = ["--gpu-memory-utilization", "0.3"] }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lightning.toml"


def loaded(file: Path, text: str = TWO) -> Settings:
    file.write_text(text)
    return load_settings(config=file, env={})


def refusal(file: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(file, text)
    return str(error.value)


def test_a_further_policy_has_what_is_said_for_it_and_else_what_holds_for_all(file: Path) -> None:
    settings = loaded(file)
    assert policy_names(settings) == ("writer", "team/checker")
    own = for_policy(settings, "team/checker")
    assert (own.policy.name, own.policy.model, own.policies) == ("team/checker", Path("models/checker"), ())
    assert own.train.roles == ("checker",)
    assert (own.train.learning_rate, own.train.kl_coef, own.train.epochs) == (2e-4, 0.1, 2)
    assert own.train.proxy_url == "http://127.0.0.1:9001"
    assert own.engine.args == ("--gpu-memory-utilization", "0.3")
    assert own.engine.log == Path("logs/engine-team--checker.log")
    assert (own.store, own.guard, own.failures) == (settings.store, settings.guard, settings.failures)


def test_the_first_policy_stays_as_it_is(file: Path) -> None:
    settings = loaded(file)
    own = for_policy(settings, "writer")
    assert own == settings.model_copy(update={"policies": ()})
    assert for_policy(Settings(), "policy") == Settings()


def test_roles_of_the_first_policy_are_not_those_of_a_further_one_that_names_none(file: Path) -> None:
    settings = loaded(file, TWO.replace('roles = ["checker"]\nroute = true\n', ""))
    assert for_policy(settings, "team/checker").train.roles == ()


def test_a_policy_that_is_not_there_is_named_with_those_that_are(file: Path) -> None:
    with pytest.raises(
        ConfigError, match="no policy 'chekcer' is configured; there are 'writer', 'team/checker'"
    ):
        for_policy(loaded(file), "chekcer")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("model = 'm'", "[[policies]] number 1 in {file}, line 1: name is missing"),
        ("name = 'b'", "neither upstream nor model"),
        ("name = 'b'\nmodel = 'm'\nroute = true", "route = true but no roles"),
        ("name = 'b'\nmodel = 'm'\nrole = ['x']", "unknown setting role; there are name, model"),
        ("name = 'b'\nupstream = 'x'", "upstream is 'x'; allowed: a text"),
        ("name = 'b'\nupstream = 'http://x'\napi_key_env = 'A'\napi_key_file = 'f'", "keep one"),
        ("name = 'b'\nmodel = 'm'\ntrain = 3", "train is 3; allowed: a table of settings"),
        (
            "name = 'b'\nmodel = 'm'\ntrain = { learningrate = 1 }",
            "[[policies]] in {file}, line 1: unknown setting train.learningrate; did you mean learning_rate?",
        ),
        (
            "name = 'b'\nmodel = 'm'\ntrain = { learning_rate = -1 }",
            "train.learning_rate is -1: Input should be",
        ),
        (
            "name = 'b'\nmodel = 'm'\ntrain = { max_rollouts = 2 }",
            "train.max_rollouts is 2 but train.min_rollouts",
        ),
        ("name = 'b'\nmodel = 'm'\ntrain = { roles = ['x'] }", "give `roles` beside the policy's name"),
        ("name = 'b'\nmodel = 'm'\ntrain = { proxy_url = 'http://x' }", "one proxy is before all policies"),
        ("name = 'b'\nmodel = 'm'\nengine = { arg = [] }", "unknown setting engine.arg; did you mean args?"),
        ("name = 'policy'\nmodel = 'm'", "'policy' and 'policy' need names that differ"),
        (
            "name = 'a/b'\nmodel = 'm'\n[[policies]]\nname = 'a--b'\nmodel = 'm'",
            "'a/b' and 'a--b' need names that differ, and not in / and -- only",
        ),
        (
            "name = 'b'\nmodel = 'm'\nroles = ['x']\nroute = true\n"
            "[[policies]]\nname = 'c'\nmodel = 'm'\nroles = ['y', 'x']\nroute = true",
            "calls of the role 'x' cannot go to 'b' and to 'c'",
        ),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(file: Path, entry: str, said: str) -> None:
    assert said.format(file=file) in refusal(file, f"[[policies]]\n{entry}\n")


def test_a_mistake_in_the_table_for_all_is_said_for_that_table_only(file: Path) -> None:
    said = refusal(file, "[train]\nepochs = 0\n[[policies]]\nname = 'b'\nmodel = 'm'\n")
    assert said == f"train.epochs in {file}, line 2 is 0; allowed: a whole number of at least 1"
