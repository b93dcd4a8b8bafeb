"""What is no recipe: text that cannot be read, and names that lead to none."""

import pytest
from recipe_texts import GOOD

from metablocks.cli import main


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "bad.yaml:1:1: empty; a recipe is a mapping (name, seed, tasks, model, …)"),
        (
            b"# only a comment\n",
            "bad.yaml:1:1: empty; a recipe is a mapping (name, seed, tasks, …)",
        ),
        (
            b"- a\n- b\n",
            "bad.yaml:1:1: takes a mapping of name, cite, seed, tasks, model, surgery, inner, ",
        ),
        (b"name: caf\xe9\n", "bad.yaml:1:10: not UTF-8 text (byte 0xe9)"),
        (b"\xff\xfen\x00", "bad.yaml:1:1: not UTF-8 text (byte 0xff)"),
        (b"%YAML 1.1\n---\nname: x\n", "bad.yaml:1:1: YAML directives are not part of a recipe"),
        (b"[" * 50, "bad.yaml:"),
        (b"name: [" + b"[" * 50 + b"]" * 51, "bad.yaml:1:27: nested more than 20 levels deep"),
        (b'cite: x\nname: "\\UFFFFFFFF"', "bad.yaml:2:10: not valid YAML"),
        (b"x" * 1_000_001, "bad.yaml: more than 1000000 bytes; this is no recipe"),
    ],
)
def test_text_that_is_no_recipe_is_refused(check, data, message):
    status, out, err = check(data)
    assert (status, out) == (2, "")
    assert err.startswith(message.replace("tasks, …)", ""))


def test_good_recipe_with_byte_order_mark_and_windows_line_ends_passes(check):
    status, _, err = check(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maml_sinusiod", 'maml_sinusiod: no recipe of that name; did you mean "maml_sinusoid"?'),
        ("maml_sinusiod.yaml", 'maml_sinusiod.yaml: no such file; did you mean "maml_sinusoid"?'),
        ("xyz", 'xyz: no recipe of that name; "metablocks recipes" lists those that ship'),
        ("no/such.yaml", 'no/such.yaml: no such file; "metablocks recipes" lists those that ship'),
        ("folder", "folder: a directory; a recipe is one file, such as folder/inside.yaml"),
        ("folder/", "folder/: a directory; a recipe is one file, such as folder/inside.yaml"),
        ("plain", "plain: no recipe of that name; ./plain is a file, give it with ./; "),
        ("", "an empty name; "),
        ("a\0b.yaml", r"a\u0000b.yaml: no such file; "),
    ],
)
def test_name_that_leads_to_no_recipe_is_explained(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside.yaml").write_text(GOOD)
    (tmp_path / "plain").write_text(GOOD)
    assert main(["check", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert "Traceback" not in err
