"""Faults, injected into every command that writes and every file that is read: `python -m tests.faults`.

    shim.c       before the C library, by LD_PRELOAD: counts what a process does to files, and kills it at the k-th
    forks.py     children of one process that has imported all: armed, limited, watched until they end
    world.py     a tiny model, data and finished runs; what a folder holds, and what is read of it
    commands.py  every command and function that writes
    kills.py     a command is killed, read, typed again, and compared with one that nobody killed
    damage.py    a file is damaged and read; formats.py knows how facts stand in files
    pairs.py     two writers of one directory at once
    foreign.py   a command is run in a folder of the user's
    mutations.py a check of the library is taken out, and its faults must show
    results.py   what came of each, and the table

A fault is a `Task`: a kind, the name of a command or a reader, and what happens to it. Its name replays it:
`python -m tests.faults --replay kill/build/17` kills `build` at its 17th file event. Linux alone, with a C compiler.
"""
