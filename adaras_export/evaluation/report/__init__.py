"""What evaluations show, for people who doubt it: one page, a text for papers, or JSON, all from the same figures.

`reading` takes files, `results` makes figures of them, `text` puts these into blocks, and `markdown` and `page` write
blocks. Knows no model; figures are made anew from the verdicts in the files.
"""
