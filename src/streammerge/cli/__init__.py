"""The command line: arguments in; plan, progress and errors out. What things mean is decided elsewhere.

Each module imports only modules above it::

    streams    the standard streams
    terminal   text as the terminal can show it
    failures   errors as a sentence or as JSON
    signals    being stopped
    flags      an option as it is typed
    formula    TeX as Unicode
    pages      the pages of merge methods
    render     what results look like
    advice     what a mistyped command line probably meant
    progress   the bar, the log, the JSON lines
    options    the options of commands
    arguments  from what was typed to the arguments of the Python API
    reports    printing what a command found or did
    commands   a file per command
    main       the group of commands, errors, exit
"""
