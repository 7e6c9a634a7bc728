"""Pages of docs/reference, written from what they describe: `python -m tools.reference` writes all of them.

settings.py   settings.md, from the tree of settings
commands.py   commands.md, from the commands' own declarations
tree.py       what the site shows beside docs/: modules, READMEs, the pages at the top of the project
site.py       hooks of mkdocs, which add those to the site; only this file needs mkdocs
"""
