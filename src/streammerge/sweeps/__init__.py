"""Many merges of the same inputs: which, made in one read, scored by the user's own program, and the best kept.

Each module imports only modules above it::

    points   the merges of a sweep: their settings and names
    results  what a sweep has made, as table, CSV and record
    scoring  the user's own evaluation
    making   makes the outputs of points in as few reads as the memory allows
    soup     greedy soups
    sweeping a sweep from its arguments to its end
"""
