"""The code in the documentation runs."""

import re
from pathlib import Path
from unittest import mock

import pytest

from elmo_jax.models import combiners

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))


@mock.patch.dict(combiners.COMBINERS)  # the page registers a combiner
def test_python_blocks_of_the_extension_page_run():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extend.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "extend.md", "exec"), {})


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_notebook_has_the_cells_of_its_guide(guide):
    jupytext = pytest.importorskip("jupytext")
    text, notebook = jupytext.read(guide), jupytext.read(guide.with_suffix(".ipynb"))
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in text.cells]


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guide_runs_from_top_to_bottom(guide, tmp_path, monkeypatch):
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONWARNINGS", "")
    client = nbclient.NotebookClient(
        jupytext.read(guide), timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
