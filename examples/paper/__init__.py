"""The claims about sparse RL updates, tested on real runs of a small model.

``make paper`` runs everything, ``make paper-report`` writes ``docs/paper.md`` from the results.
"""
