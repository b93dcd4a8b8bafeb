"""What the tests of recipe files share: `check`, the command on a text."""

import pytest

from metablocks.cli import main


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def check(text, *arguments):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "bad.yaml").write_bytes(data)
        status = main(["check", "bad.yaml", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return check
