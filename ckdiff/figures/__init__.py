"""Pictures of what was counted: each is a table of rows, and how they are drawn.

A figure is made from plain numbers, the ones that ``--json`` prints, and knows nothing of where
they came from. Vega-Lite draws it: in a report's page, in a notebook, as SVG or PDF.
"""
