"""Pages of docs/reference, written from what they describe: `python -m tools.reference` writes all of them.

settings.py   settings.md, from the tree of settings
commands.py   commands.md, from the commands' own declarations
site.py       for mkdocs: a page for each module, from its docstrings, and the pages that do not lie in docs/
"""
