"""Runs a notebook in the current folder and prints the text of its outputs; tests/test_notebook.py
starts it in an environment with nbclient.

    python with_notebook.py NOTEBOOK "code that follows the cell with the tag `parameters`"
"""

import sys

import nbclient
import nbformat


def main(path, code):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    position = next(index for index, names in enumerate(tags) if "parameters" in names)
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(code))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": "."}}
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            print(output.get("text") or output.get("data", {}).get("text/html", ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
