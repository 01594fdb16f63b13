import json
import subprocess
from pathlib import Path

import torch

from hyperfunc.environment import environment, git_state


def test_versions_and_device_can_be_written_as_json(tmp_path: Path) -> None:
    found = environment(torch.device("cpu"), tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["device"].startswith("cpu")


def test_the_state_of_the_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path / "nowhere") is None

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert git_state(tmp_path) is None  # nothing is committed
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "other").write_text("b")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("c")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}
