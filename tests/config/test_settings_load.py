"""Where settings come from, and what is said when one is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_proxy.config import Settings, load_settings
from lightning_proxy.config.load import allowed
from lightning_proxy.config.train import TrainSettings
from lightning_proxy.errors import ConfigError


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LIGHTNING_")]:
        monkeypatch.delenv(name)
    return tmp_path


def toml(text: str, name: str = "lightning.toml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def refusal(text: str = "", *, env: dict[str, str] | None = None, **overrides: object) -> str:
    toml(text)
    with pytest.raises(ConfigError) as error:
        load_settings(
            overrides={key.replace("__", "."): value for key, value in overrides.items()}, env=env or {}
        )
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_any_source_the_defaults_hold() -> None:
    assert load_settings(env={}) == Settings()


def test_each_source_beats_the_one_before_it() -> None:
    toml("[proxy]\nport = 1111\n")
    assert load_settings(env={}).proxy.port == 1111
    env = {"LIGHTNING_PROXY__PORT": "2222"}
    assert load_settings(env=env).proxy.port == 2222
    assert load_settings(env=env, overrides={"proxy.port": 3333}).proxy.port == 3333


def test_a_flag_can_unset_what_the_file_sets() -> None:
    toml('[proxy]\nupstream = "http://127.0.0.1:9/v1"\n')
    assert load_settings(env={}, overrides={"proxy.upstream": None}).proxy.upstream is None


def test_a_named_file_is_read_instead_of_the_one_here() -> None:
    toml("[proxy]\nport = 1111\n")
    other = toml("[proxy]\nport = 4444\n", "other.toml")
    assert load_settings(config=other, env={}).proxy.port == 4444


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_STORE__DB", "elsewhere.db")
    assert load_settings().store.db == Path("elsewhere.db")


@pytest.mark.parametrize("text", ["--max-num-seqs 8 --x 'a b'", '["--max-num-seqs", "8", "--x", "a b"]'])
def test_lists_in_the_environment_are_shell_words_or_json(text: str) -> None:
    assert load_settings(env={"LIGHTNING_ENGINE__ARGS": text}).engine.args == (
        "--max-num-seqs",
        "8",
        "--x",
        "a b",
    )


def test_tables_in_the_environment_are_json() -> None:
    assert load_settings(env={"LIGHTNING_ENGINE__ENV": '{"A": "1"}'}).engine.env == {"A": "1"}
    assert "a table of texts" in refusal(env={"LIGHTNING_ENGINE__ENV": "A=1"})


def test_other_programs_variables_with_our_prefix_are_left_alone() -> None:
    env = {"LIGHTNING_API_KEY": "x", "LIGHTNING_ROLLOUT_ID": "r-1", "LIGHTNING_DEBUG": "1"}
    assert load_settings(env=env) == Settings()


# --- what is refused, and how -------------------------------------------------------------------


def test_a_given_file_that_is_missing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at gone\.toml; .*init gone\.toml"):
        load_settings(config=Path("gone.toml"), env={})


def test_broken_toml_says_where_it_breaks() -> None:
    assert "line 2" in refusal("[proxy]\nport = = 1\n")


def test_an_unknown_setting_names_its_line_and_the_nearest_known_one() -> None:
    message = refusal("# comment\n[proxy]\nhost = '127.0.0.1'\nprot = 9000\n")
    assert message == "unknown setting proxy.prot in lightning.toml, line 4; did you mean proxy.port?"


def test_a_setting_in_the_wrong_table_is_found_by_its_name() -> None:
    assert refusal("[train]\nupstream = 'x'\n").endswith("did you mean proxy.upstream?")
    assert refusal("port = 8080\n").endswith("line 1; did you mean proxy.port?")


def test_an_unknown_table_names_the_nearest_one() -> None:
    assert refusal("[trian]\nepochs = 2\n").endswith("did you mean the table [train]?")
    assert "there are [proxy], [store]" in refusal("[xyzzy]\nplugh = 2\n")


def test_unknown_variables_name_the_nearest_setting() -> None:
    assert refusal(env={"LIGHTNING_PROXY__PROT": "1"}).endswith(
        "LIGHTNING_PROXY__PROT; did you mean proxy.port?"
    )
    assert "did you mean LIGHTNING_PROXY__PORT" in refusal(env={"LIGHTNING_PROXY_PORT": "1"})


def test_a_bad_value_names_the_setting_the_value_the_place_and_what_is_allowed() -> None:
    assert refusal("[proxy]\nport = 99999\n") == (
        "proxy.port in lightning.toml, line 2 is 99999; allowed: a whole number from 0 to 65535"
    )
    assert refusal(env={"LIGHTNING_PROXY__CAPTURE": "all"}) == (
        "proxy.capture in LIGHTNING_PROXY__CAPTURE is 'all'; allowed: one of auto, tokens, text"
    )
    assert refusal(train__proxy_url="http://127.0.0.1:8080/v1").startswith(
        "train.proxy_url in --proxy-url is 'http://127.0.0.1:8080/v1'; allowed: a text ("
    )


def test_every_bad_value_is_named_at_once() -> None:
    message = refusal("[proxy]\nport = -1\n[train]\nepochs = 0\n")
    assert "proxy.port" in message
    assert "train.epochs" in message


def test_a_secret_is_never_repeated() -> None:
    message = refusal("[proxy]\ntoken = 12345678\n")
    assert "proxy.token in lightning.toml, line 2" in message
    assert "12345678" not in message
    assert "hunter2" not in repr(
        load_settings(env={}, overrides={"proxy.token": "hunter2", "proxy.port": 1}, config=toml(""))
    )


def test_a_table_that_is_none_is_refused() -> None:
    assert "must be a table" in refusal("proxy = 3\n")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.168.1.7"])
def test_listening_to_other_machines_needs_a_token(host: str) -> None:
    message = refusal(proxy__host=host)
    assert host in message
    assert "set proxy.token (or LIGHTNING_PROXY__TOKEN), or listen on 127.0.0.1" in message
    assert load_settings(env={}, overrides={"proxy.host": host, "proxy.token": "s"}).proxy.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_loopback_needs_no_token(host: str) -> None:
    assert load_settings(env={}, overrides={"proxy.host": host}).proxy.token is None


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x/v1", "http://", "http://x/v1?a=b"])
def test_an_upstream_that_is_no_base_url_is_refused(url: str) -> None:
    assert "proxy.upstream" in refusal(proxy__upstream=url)


def test_a_base_url_loses_its_last_slash() -> None:
    assert load_settings(env={}, overrides={"proxy.upstream": "http://x/v1/"}).proxy.upstream == "http://x/v1"


def test_a_run_that_could_never_begin_is_refused() -> None:
    assert "raise the first or lower the second" in refusal("[train]\nmin_rollouts = 9\nmax_rollouts = 8\n")


def test_the_trainer_finds_the_proxy_where_the_file_says_it_listens() -> None:
    toml("[proxy]\nport = 9001\n")
    assert load_settings(env={}).train.proxy_url == "http://127.0.0.1:9001"
    env = {"LIGHTNING_TRAIN__PROXY_URL": "http://proxy:80/"}
    assert load_settings(env=env).train.proxy_url == "http://proxy:80"
    everywhere = {"proxy.host": "0.0.0.0", "proxy.token": "s"}
    assert load_settings(env={}, overrides=everywhere).train.proxy_url == "http://127.0.0.1:9001"


def test_settings_import_without_anything_heavy() -> None:
    program = (
        "import sys, lightning_proxy.config; "
        "print([m for m in ('torch', 'aiohttp', 'pydantic_settings', 'sqlite_utils') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


# --- lists of tables ----------------------------------------------------------------------------


def test_roles_are_read_in_their_order() -> None:
    toml(
        '[[roles]]\nname = "writer"\nfingerprint = "ab12cd34"\n\n'
        '[[roles]]\nname = "critic"\nsystem_contains = "You judge"\ntools = ["open"]\n'
    )
    first, second = load_settings(env={}).roles
    assert (first.name, first.fingerprint) == ("writer", "ab12cd34")
    assert (second.system_contains, second.tools) == ("You judge", ("open",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[[roles]]\nname = "a"\nfingerprint = "xyz"\n',
            "number 1 in lightning.toml, line 1: fingerprint is",
        ),
        (
            '[proxy]\n[[roles]]\nname = "a"\ntools = ["x"]\n[[roles]]\nname = "b"\nfoo = 1\n',
            "[[roles]] number 2 in lightning.toml, line 2: unknown setting foo; there are name, fingerprint",
        ),
        ('[[roles]]\nname = "a"\n', "needs a fingerprint, system_contains or tools"),
        ('[[roles]]\ntools = ["x"]\n', "name is missing"),
        ('[[roles]]\nname = "a b"\ntools = ["x"]\n', "name is 'a b'; allowed: a text matching"),
        ('[roles]\nname = "a"\n', "write [[roles]]"),
        ("roles = [3]\n", "[[roles]] number 1"),
        ('[[role]]\nname = "a"\n', "did you mean the table [[roles]]?"),
    ],
)
def test_what_is_wrong_with_a_role_is_said(text: str, said: str) -> None:
    assert said in refusal(text)


UPSTREAMS = """
[[upstreams]]
models = ["gpt-*", "o3"]
url = "https://api.openai.com/v1/"
api_key_env = "THEIR_KEY"

[[upstreams]]
models = ["claude-*"]
provider = "anthropic"
"""


def test_there_may_be_several_upstreams_and_their_order_is_the_files() -> None:
    toml(UPSTREAMS)
    first, second = load_settings(env={}).upstreams
    assert (first.url, first.models, first.api_key_env) == (
        "https://api.openai.com/v1",
        ("gpt-*", "o3"),
        "THEIR_KEY",
    )
    assert (second.url, second.provider, second.models) == (None, "anthropic", ("claude-*",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models = ['x']\n", "the upstream for x has neither url nor provider"),
        ("url = 'http://x/v1'\n", "[[upstreams]] number 1 in lightning.toml, line 1: models is missing"),
        ("models = []\nurl = 'http://x/v1'\n", "models is []; allowed: a list of texts"),
        ("models = ['x']\nurl = 'x'\n", "url is 'x'; allowed: a text"),
        ("model = ['x']\n", "unknown setting model; there are models, url"),
        ("models = ['x']\nprovider = 'p'\napi_key_env = 'A'\napi_key_file = 'b'\n", "keep one"),
    ],
)
def test_an_upstream_that_cannot_be_is_refused_by_name(text: str, said: str) -> None:
    assert said in refusal(f"[[upstreams]]\n{text}")


def test_rewards_have_weights_with_a_sign() -> None:
    entries = [
        {"name": "style", "weight": 0.5},
        {"name": "latency", "direction": "minimize"},
        {"name": "cost", "weight": 0},
    ]
    settings = Settings.model_validate({"rewards": entries})
    assert settings.reward_weights == {"style": 0.5, "latency": -1.0, "cost": 0.0}


def test_a_reward_may_be_for_some_roles_where_groups_are_by_role() -> None:
    entries = [{"name": "style", "roles": ["writer"]}, {"name": "right"}]
    settings = Settings.model_validate({"rewards": entries, "train": {"group_by_role": True}})
    assert settings.reward_roles == {"style": ("writer",)}
    with pytest.raises(ValueError, match=r"'style' is for the roles writer only.*group_by_role = true"):
        Settings.model_validate({"rewards": entries})
    apart = {
        "name": "critic",
        "upstream": "http://127.0.0.1:8001/v1",
        "roles": ["critic"],
        "train": {"group_by_role": False},
    }
    with pytest.raises(ValueError, match=r"group_by_role = true, of every policy"):
        Settings.model_validate({"rewards": entries, "train": {"group_by_role": True}, "policies": [apart]})


def test_an_optional_number_is_told_as_one() -> None:
    assert allowed(TrainSettings.model_fields["clip_ratio_high"]) == "a number above 0"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"kl_coef": 0.1}, r"train\.workers is 2 but train\.kl_coef is 0\.1"),
        ({"algorithm": "dpo", "dpo_reference": "base"}, r"train\.dpo_reference is 'base'"),
    ],
)
def test_version_0_beside_several_workers_is_refused(train: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings.model_validate({"train": {"workers": 2, **train}})
    assert Settings.model_validate({"train": {"workers": 1, **train}}).train.workers == 1
    other = {**train, "algorithm": "sft"}  # which has no reference
    assert Settings.model_validate({"train": {"workers": 2, **other}}).train.workers == 2


def test_a_discount_without_an_effect_is_refused() -> None:
    for credit in ("discounted", "return_to_go"):
        train = Settings.model_validate({"train": {"credit": credit, "discount": 0.9}}).train
        assert (train.credit, train.discount) == (credit, 0.9)
    with pytest.raises(ValueError, match=r"train\.discount is 0\.9 but train\.credit is 'identical'"):
        Settings.model_validate({"train": {"discount": 0.9}})


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ('name = "a"\nweight = -1', "weight is -1; allowed: a number of at least 0"),
        ('name = "a"\ndirection = "up"', "one of maximize, minimize"),
        ('name = "a"\n[[rewards]]\nname = "a"', "the reward 'a' has two entries"),
        ("weight = 1", "name is missing"),
    ],
)
def test_a_reward_entry_that_makes_no_sense_is_said(tmp_path: Path, entries: str, said: str) -> None:
    path = tmp_path / "lightning.toml"
    path.write_text(f"[[rewards]]\n{entries}\n")
    with pytest.raises(ConfigError, match=said):
        load_settings(config=path, env={})
