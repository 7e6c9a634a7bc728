"""Checks of the pages that people read: `python -m tools.docs` prints what is wrong, by file and line.

pages.py   a page's code, links, headings and sentences, with their lines; which pages there are
links.py   relative links and anchors exist
names.py   commands, options, settings, make targets and paths exist
prose.py   one sentence a line
"""
