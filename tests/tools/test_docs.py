"""`tools/docs`: pages of the reference and the cookbook, in which every reference leads somewhere."""

import inspect
from types import ModuleType

import metablocks as mb
from tools.documentation import main as documentation


def test_the_pages_have_no_reference_that_leads_nowhere(tmp_path):
    assert documentation.build(tmp_path) == []
    page = (tmp_path / "metablocks.html").read_text(encoding="utf-8")
    names = [name for name in mb.__all__ if not inspect.ismodule(getattr(mb, name))]
    assert [name for name in names if f'id="{name}"' not in page] == []
    cookbook = (tmp_path / "from_higher.html").read_text(encoding="utf-8")
    assert "innerloop_ctx" in cookbook
    assert (tmp_path / "index.html").is_file()


def test_a_link_to_a_member_without_a_place_leads_to_its_class(tmp_path):
    (tmp_path / "other.html").write_text('<p id="Rule">')
    links = '<a href="other.html#Rule.eval"> <a href="no.html"> <a href="other.html#Norm.eval">'
    (tmp_path / "page.html").write_text(f'{links} <a href="https://example.org/x.html">')
    assert sorted(documentation.mend_links(tmp_path)) == [
        "page.html: no such page: no.html",
        "page.html: no such place: other.html#Norm.eval",
    ]
    assert 'href="other.html#Rule"' in (tmp_path / "page.html").read_text()


def test_a_name_in_backticks_that_there_is_not_is_found():
    module = ModuleType(
        "made_up", "See `metablocks.rules.KFO`, `metablocks.none`, `NoRule`, `Task`."
    )
    assert documentation.dead_names([module]) == [
        "made_up: no such name: metablocks.none",
        "made_up: no such name: NoRule",
    ]
