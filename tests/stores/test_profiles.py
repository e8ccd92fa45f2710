"""The profiles of the AWS command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.stores import profiles
from streammerge.stores.profiles import endpoint, profile


def test_a_profile_is_read_from_the_usual_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("[profile work]\nregion = eu-north-1\n[default]\nregion = us-west-2\n")
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = A\naws_secret_access_key = B%C\n")
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert profile() == {"region": "us-west-2"}
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert profile() == {"region": "eu-north-1", "aws_access_key_id": "A", "aws_secret_access_key": "B%C"}
    (tmp_path / "config").write_text("[profile work]\nregion = eu-north-2\n")  # as long as it was
    assert profile()["region"] == "eu-north-2"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path))
    assert profile() == {"aws_access_key_id": "A", "aws_secret_access_key": "B%C"}


def test_the_address_of_a_service_may_be_a_variable_or_in_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://profile/\n")
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert endpoint() == "http://profile"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
    assert endpoint() == "http://all"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3/")
    assert endpoint() == "http://s3"


def test_a_file_is_read_once_in_each_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("[default]\nregion = us-west-2\n")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_DEFAULT_PROFILE", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    read = list[Path]()

    class Parser(profiles.configparser.RawConfigParser):
        def read(self, path: Path) -> list[str]:  # type: ignore[override]
            read.append(path)
            return super().read(path)

    monkeypatch.setattr(profiles.configparser, "RawConfigParser", Parser)
    assert [profile()["region"] for _ in range(3)] == ["us-west-2"] * 3
    assert read == [tmp_path / "config"]
    profile()["region"] = "another"  # what a caller does to its answer is its own
    assert profile()["region"] == "us-west-2"
