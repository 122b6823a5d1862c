"""Execute the guides and write each one's notebook beside it: python docs/notebooks.py."""

import re
import tempfile
from pathlib import Path

import jupytext
import nbclient


def main() -> None:
    """Write a notebook for every guide."""
    for guide in sorted((Path(__file__).parent / "guides").glob("*.md")):
        notebook = jupytext.read(guide)
        with tempfile.TemporaryDirectory() as folder:
            client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}})
            client.execute()
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell-{number}"  # stable, so that a new run changes outputs alone
            cell.metadata.pop("execution", None)
            for output in cell.get("outputs", ()):
                if output.get("name") == "stderr":
                    output["text"] = ""
                elif "text" in output:
                    output["text"] = re.sub(re.escape(folder), ".", output["text"])
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
        jupytext.write(notebook, guide.with_suffix(".ipynb"))
        print(guide.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
