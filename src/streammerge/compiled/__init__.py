"""What numpy and torch do in several operations, compiled to do it in one; the bits are the same.

Each module imports only modules above it::

    library      the compiled functions, if the package was built with them
    sums         weighted sums of rows of numbers
"""
