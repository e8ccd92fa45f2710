"""A merge or a comparison as one page that opens offline in a browser.

Each module imports only modules above it::

    facts     what a report shows, as plain data
    recorded  memory and throughput while a run goes on
    statistics what was gathered while merging, beside the output
    gathered  the facts of a merge, of an output with its receipt, and of a comparison
    pictures  heat maps and curves as SVG, by matplotlib
    page      the page
    making    writes reports
"""
