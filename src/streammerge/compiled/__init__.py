"""What numpy and torch do in several operations, compiled to do it in one; the bits are the same.

Each module imports only modules above it::

    library      the compiled functions, if the package was built with them
    numbers      the dtypes that they know
    sums         weighted sums of rows of numbers
    products     sums of products of rows of numbers
    differences  weighted sums of masked differences from a base
"""
