from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from lightning_proxy.config.train import TrainSettings
from lightning_proxy.errors import CheckpointInvalid, PublishFailed
from lightning_proxy.store import PolicyVersion, Store, VersionStatus
from lightning_proxy.trainer.publish import (
    Lineage,
    clear_away,
    clear_leftovers,
    promote,
    read_lineage,
    state_directory,
    version_directory,
    write_version,
)
from tests.trainer.checkpoints import PaperBackend, write_checkpoint
from tests.trainer.fake_proxy import Mode, fake_proxy

LINEAGE = Lineage("/base", workers=1, lora_rank=0, lora_alpha=32)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base")


def test_a_written_version_holds_weights_companions_and_the_state_of_the_trainer(
    base: Path, tmp_path: Path
) -> None:
    path = write_version(tmp_path / "runs" / "v1", PaperBackend(), base=base, lineage=LINEAGE)
    assert sorted(entry.name for entry in path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    version = PolicyVersion("p", 1, str(path), VersionStatus.STAGED)
    assert read_lineage(version) == LINEAGE
    assert (state_directory(version) / "state").is_file()
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["v1"]


def test_what_a_crashed_run_left_in_the_way_is_replaced(base: Path, tmp_path: Path) -> None:
    for leftover in ("v1", "v1.unfinished"):
        (tmp_path / leftover / "weights").mkdir(parents=True)
        (tmp_path / leftover / "weights" / "junk").write_text("junk")
    path = write_version(tmp_path / "v1", PaperBackend(), base=base, lineage=LINEAGE)
    assert not (path / "junk").exists()
    assert not (tmp_path / "v1.unfinished").exists()


def test_weights_that_are_not_finite_are_refused_and_leave_nothing_behind(base: Path, tmp_path: Path) -> None:
    broken = PaperBackend(a=np.full((2, 3), np.nan, np.float32))
    with pytest.raises(CheckpointInvalid, match="not finite"):
        write_version(tmp_path / "runs" / "v1", broken, base=base, lineage=LINEAGE)
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_adapter_is_written_beside_the_weights_that_contain_it(base: Path, tmp_path: Path) -> None:
    lineage = Lineage(str(base), 1, lora_rank=4, lora_alpha=8)
    path = write_version(tmp_path / "v1", PaperBackend(), base=base, lineage=lineage)
    assert (path.parent / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "misfit"),
    [
        ({}, None),
        ({"workers": 2}, "workers = 1, now it is 2"),
        ({"lora_rank": 8}, "lora_rank = 0, now it is 8"),
        ({"lora_alpha": 64}, None),  # of no effect without LoRA
        ({"learning_rate": 1.0}, None),
    ],
)
def test_a_saved_state_is_used_only_by_settings_that_can_load_it(
    changes: dict[str, object], misfit: str | None
) -> None:
    found = LINEAGE.misfit(TrainSettings.model_validate(changes))
    assert (found is None) == (misfit is None)
    assert misfit is None or misfit in str(found)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    path = tmp_path / "store.db"
    with Store.open(path) as store:
        store.add_base_version("a/b", "/base")
        run = store.begin_run("a/b", owner="test", lease_s=60)
        store.commit_run(
            run.run_id, report={}, version=PolicyVersion("a/b", 1, "/new", VersionStatus.STAGED, parent=0)
        )
    return path


def ask(url: str, token: str | None = None) -> object:
    return promote(url, "a/b", 1, token=token, timeout_s=10)


def test_promoting_asks_the_proxy_for_that_version_with_the_token(db: Path) -> None:
    with fake_proxy(db) as proxy:
        answer = ask(proxy.url + "/", token="secret")
    assert isinstance(answer, dict)
    assert answer["status"] == "active"
    assert proxy.asked == [("a/b", 1)]
    assert proxy.authorization == ["Bearer secret"]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refuses", "409: another swap runs"),
        ("rejects", "502: differs"),
        ("forgets to answer", "no answer from the proxy"),
    ],
)
def test_a_proxy_that_does_not_promote_is_a_publish_failure_that_says_why(
    db: Path, mode: Mode, message: str
) -> None:
    with fake_proxy(db, mode) as proxy, pytest.raises(PublishFailed, match=message):
        ask(proxy.url)


def test_a_proxy_that_is_not_there_is_a_publish_failure(db: Path) -> None:
    with fake_proxy(db) as proxy:
        url = proxy.url
    with pytest.raises(PublishFailed, match="no answer from the proxy at http"):
        ask(url)


def test_an_adapter_without_the_weights_that_it_belongs_to_is_no_state(tmp_path: Path) -> None:
    settings = TrainSettings(lora_rank=4, lora_alpha=8)
    assert Lineage(str(tmp_path), 1, lora_rank=4, lora_alpha=8).misfit(settings) is None
    gone = Lineage(str(tmp_path / "gone"), 1, lora_rank=4, lora_alpha=8)
    assert str(tmp_path / "gone") in str(gone.misfit(settings))


def test_weights_that_an_adapter_is_relative_to_stay_as_long_as_it(tmp_path: Path) -> None:
    settings = TrainSettings(runs_dir=tmp_path / "runs", keep_versions=1)
    paths = {number: version_directory(settings, "p", number, 7) / "weights" for number in range(1, 6)}
    for number, path in paths.items():
        path.mkdir(parents=True)
        if number > 2:  # adapters of version 2's weights
            lineage = Lineage(str(paths[2]), 1, lora_rank=4, lora_alpha=8)
            path.with_name("trainer").mkdir()
            path.with_name("trainer").joinpath("lineage.json").write_text(json.dumps(asdict(lineage)))
    statuses = dict.fromkeys(range(1, 5), VersionStatus.RETIRED) | {5: VersionStatus.ACTIVE}
    versions = [PolicyVersion("p", number, str(paths[number]), statuses[number]) for number in paths]
    assert clear_away(settings, "p", versions) == [3, 1]


def lay_out(settings: TrainSettings, **statuses: str) -> list[PolicyVersion]:
    """Versions and their directories, by number (``v3="retired"``); each was made from the one before."""
    versions = []
    for name, status in statuses.items():
        number = int(name[1:])
        path = version_directory(settings, "p", number, 10 + number) / "weights"
        path.mkdir(parents=True)
        versions.append(PolicyVersion("p", number, str(path), VersionStatus(status), parent=number - 1))
    return versions


@pytest.fixture
def kept(tmp_path: Path) -> TrainSettings:
    return TrainSettings(runs_dir=tmp_path / "runs", keep_versions=2)


def left(settings: TrainSettings) -> list[str]:
    return sorted(entry.name for entry in (settings.runs_dir / "p").iterdir())


def test_only_old_checkpoints_of_versions_that_no_longer_serve_are_deleted(
    kept: TrainSettings, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign" / "weights"
    foreign.mkdir(parents=True)
    base = PolicyVersion("p", 0, str(foreign), VersionStatus.RETIRED)
    versions = lay_out(kept, v1="retired", v2="retired", v3="retired", v4="retired", v5="active", v6="staged")
    assert sorted(clear_away(kept, "p", [base, *versions])) == [1, 2]
    assert left(kept) == ["v00003-run13", "v00004-run14", "v00005-run15", "v00006-run16"]
    assert foreign.is_dir()


def test_rejected_versions_go_at_once_and_take_nobodys_place(kept: TrainSettings) -> None:
    versions = lay_out(
        kept, v1="retired", v2="retired", v3="rejected", v4="rejected", v5="rejected", v6="active"
    )
    assert sorted(clear_away(kept, "p", versions)) == [3, 4, 5]
    assert left(kept) == ["v00001-run11", "v00002-run12", "v00006-run16"]


def test_the_parent_of_the_version_that_serves_stays_after_a_rollback(kept: TrainSettings) -> None:
    versions = lay_out(
        kept, v1="retired", v2="retired", v3="active", v4="retired", v5="retired", v6="retired"
    )
    assert sorted(clear_away(kept, "p", versions)) == [1, 4]
    assert clear_away(kept, "p", versions, keep=frozenset((5,))) == []


def test_directories_of_former_times_named_by_their_number_alone_go_too(kept: TrainSettings) -> None:
    old = kept.runs_dir / "p" / "v00001" / "weights"
    old.mkdir(parents=True)
    rejected = PolicyVersion("p", 1, str(old), VersionStatus.REJECTED)
    assert clear_away(kept, "p", [rejected, *lay_out(kept, v2="active")]) == [1]
    assert left(kept) == ["v00002-run12"]


def test_what_runs_left_behind_that_have_ended_is_deleted_and_nothing_else(kept: TrainSettings) -> None:
    versions = lay_out(kept, v1="active")
    names = ["v00002-run2", "v00002-run3", "v00002-run4.unfinished", "v00002", "notes", "v00002-run5"]
    for name in names:
        (kept.runs_dir / "p" / name).mkdir()
    clear_leftovers(kept, "p", versions, {2, 4, 11}.__contains__)
    assert left(kept) == ["notes", "v00001-run11", "v00002", "v00002-run3", "v00002-run5"]
