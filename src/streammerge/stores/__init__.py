"""Places where bytes live, and the way an output appears. Only this room opens, lists or writes a file.

Each module imports only modules above it::

    names        names within a folder
    crc32c       CRC-32C by the instruction of the processor
    checksums    CRC-32 and CRC-32C, and joining those of parts
    faults       mapped files that shrink
    keys         names within a store
    streams      a file read at offsets, as a stream of Python
    remembering  answers of remote stores, while a plan is made
    buffers      memory of blocks, used again
    ahead        blocks of remote files, fetched before they are read
    base         the protocol: Location, Store, Input, Output, Staging
    space        errors of outputs that cannot be written
    caching      ranges of local files, read into the cache of the system
    digests      the bytes of a file without some of its ranges
    descriptors  open files, bounded
    system       calls that a file system or platform may lack
    libc         calls of the C library that Python lacks
    files        local files that are read
    written_files local files that are written
    lock         who makes an output
    journal      which pieces of an output are on the disk
    commit       the hidden folder of a local output, the rename
    joint        local files that several machines write
    local        the files of this machine
    memory       the store memory://
    repositories names of the hub's repositories, and its cache
    tags         entity tags that are digests
    remote       the common part of stores behind a network
    profiles     the profiles of the AWS command line
    refusals     what stores say when they refuse
    signing      signatures of S3 requests, credentials
    multipart    uploads to S3 in parts
    direct       ranges of S3 objects without TLS
    parts        files that are sent in parts
    staged       outputs of object stores
    joint_objects uploads to S3 that several machines send
    objects      what object stores have in common
    s3           s3://
    gs           gs://
    az           az://
    web          https://, http://
    hub_client   the client of the hub
    hub_output   outputs of the hub
    hub          hf://
    registry     stores by scheme
    hub_places   where a repository of the hub is read
    locations    from text to a Location
    inputs       the inputs of a run
    scratch      files for a while
    spilled      unnamed files for what memory has no room for
    claims       which machine makes which unit
    remains      what interrupted runs have left in object stores
    leftovers    what interrupted runs have left
"""
